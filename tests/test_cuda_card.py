"""The CUDA C++ kernels on a card, through the public functions: `make gpu` runs these, and the few whose names begin
with test_sanitized under compute-sanitizer too. Without a card they are executed on the host twin (test_twin_*.py).
"""

import functools
import math

import pytest
import torch
from row_checks import assert_right
from row_checks import check_gradients as check_row_gradients
from test_attention_backward import check as check_gradients
from test_attention_backward import inputs

import fastattn
from fastattn import _cuda_library, masks, reference, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _cuda_library.loaded(), reason=str(_cuda_library.LIBRARY)),
]
BF16, FP16 = torch.bfloat16, torch.float16
attend = functools.partial(fastattn.attention, backend="cuda")


@pytest.fixture(autouse=True)
def on_card():
    with torch.device("cuda"):
        yield


# B, Hq, Hkv, Sq, Sk, D, Dv: one of each head size, D != Dv, single elements, Hopper's three sizes with whole rows of
# 16 bytes.
SHAPES = [
    (2, 4, 2, 200, 333, 32, 32),
    (2, 4, 1, 257, 257, 64, 64),
    (1, 2, 2, 70, 130, 72, 96),
    (1, 4, 2, 513, 513, 128, 128),
    (1, 2, 1, 130, 200, 192, 128),
    (1, 2, 1, 300, 300, 256, 256),
    (1, 3, 1, 67, 131, 37, 61),
]
MASKS = {
    "none": None,
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(70, 3),
    "bits": masks.Strided(24),
}


def served(shape):
    """The shape's head sizes, or a skip where the card's blocks have too little shared memory for their gradients."""
    if (
        max(shape[5:]) > 128
        and _cuda_library.shared_kib(torch.device("cuda", torch.cuda.current_device())) < 160
    ):
        pytest.skip("gradients of head sizes above 128 need 160 KiB of shared memory a block")
    return shape


def check(shape, mask, dtype, function=attend, **terms):
    q, k, v, dout = inputs(*shape, dtype)
    leaves = {"q": q, "k": k, "v": v} | terms
    given = function
    if mask is not None:
        B, Hq, _, Sq, Sk = shape[:5]
        leaves["mask"] = mask.to_dense(Sq, Sk, B, Hq).cuda()

        def given(q, k, v, **rest):
            return function(q, k, v, **rest | {"mask": mask})

    exact = reference.attention(q.double(), k.double(), v.double(), mask=leaves.get("mask"), **terms)
    with torch.no_grad():
        out = given(q, k, v, **terms)
    assert_right(out, exact, what=f"{shape} {mask}", magnitude=v.abs().max().item())
    return check_gradients(leaves, dout, attend=given, sums=("bias", "alibi_slopes", "sinks"))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, mask, dtype):
    check(served(shape), MASKS[mask], dtype)


@pytest.mark.parametrize("mask", MASKS)
def test_attention_terms(mask):
    terms = dict(
        bias=torch.randn(1, 4, 200, 333),
        alibi_slopes=torch.rand(2, 4) * 0.1,
        softcap=5.0,
        sinks=torch.randn(4),
        scale=0.1,
        dropout_p=0.3,
        dropout_seed=torch.tensor(2**40 + 5),
    )
    check(SHAPES[0], MASKS[mask], FP16, **terms)


def test_attention_does_not_read_what_nobody_sees():
    q, k, v, dout = inputs(1, 2, 1, 300, 300, 128, 128, BF16)
    mask = masks.Causal() & masks.KeyPadding([200])

    def gradients():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attend(*leaves, mask=mask)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    clean = gradients()
    k[:, :, 200:], v[:, :, 200:] = math.nan, math.inf
    for ours, before in zip(gradients(), clean, strict=True):
        assert torch.equal(ours, before)


def test_attention_gives_the_same_bits_again():
    q, k, v, dout = inputs(2, 4, 2, 513, 513, 128, 128, BF16)
    first = None
    for _ in range(5):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attend(*leaves, is_causal=True)
        now = [out, *torch.autograd.grad(out, leaves, dout)]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))


WIDTHS = [1, 33, 128, 1000, 1024, 4096, 8192, 16384, 20001]


def check_rows(width, dtype):
    x, dy = torch.randn(37, width).to(dtype), torch.randn(37, width).to(dtype)
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    what = f"{width} {dtype}"
    softmax = functools.partial(rows.softmax, backend="cuda")
    check_row_gradients(softmax, lambda t: t.softmax(-1), [x], [dy], lambda t: t.softmax(-1), what)
    norm = functools.partial(rows.layer_norm, backend="cuda")
    check_row_gradients(
        lambda x, *given: norm(x, width, *given),
        lambda x, *given: reference.layer_norm(x, width, *given),
        [x, weight, bias],
        [dy],
        lambda x, *given: torch.nn.functional.layer_norm(x, [width], *given),
        what,
    )
    norm = functools.partial(rows.add_rms_norm, backend="cuda")
    check_row_gradients(
        lambda x, r, w: norm(x, r, width, w)[0],
        lambda x, r, w: reference.rms_norm(x + r, width, w),
        [x, torch.randn_like(x), weight],
        [dy],
        lambda x, r, w: torch.nn.functional.rms_norm(x + r, [width], w),
        what,
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows(width, dtype):
    check_rows(width, dtype)


# Under memcheck and racecheck everything is some hundred times slower: few blocks, odd ends, both matrix paths.
@pytest.mark.parametrize("mask", ["none", "bits"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 70, 130, 64, 64), (1, 1, 1, 67, 65, 37, 61)], ids=str)
def test_sanitized_attention(shape, mask):
    check(shape, MASKS[mask], FP16, bias=torch.randn(1, 1, 1, shape[4]))
    check(shape, MASKS[mask], FP16)


def test_sanitized_rows():
    check_rows(130, BF16)
    check_rows(2049, BF16)
