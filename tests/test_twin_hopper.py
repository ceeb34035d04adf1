"""The Hopper forward (csrc/cuda/attention_sm90.cuh), executed by the host twin: numbers under the error rule, masks
to the key, what is hidden stays hidden, the same bits on any card, and races under the sanitizers.
"""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from fixtures.make import MASKS
from twin import build
from twin.attention_args import AttentionArgs, attention_args

from fastattn import masks, reference
from fastattn.masks import lower
from fastattn.tools.equivalence import error_rule

pytestmark = pytest.mark.skipif(build.missing is not None, reason=str(build.missing))

SEEDS = range(8)
ROWS = {64: 192, 128: 128, 256: 128}  # of a tile
KEYS = {64: 128, 128: 128, 256: 64}  # of a block


@pytest.fixture(scope="module")
def twin():
    library = build.library("attention_sm90.cpp")
    build.call(library.attention_args_size, ctypes.sizeof(AttentionArgs))
    return library


def forward(twin, seed, q, k, v, lowered=None, *, multiprocessors=1, out=None, **scores):
    """out and lse of the kernel; both were NaN before."""
    out = torch.empty_like(q) if out is None else out
    out.fill_(math.nan)
    lse = torch.full(q.shape[:3], math.nan)
    args = attention_args(q, k, v, out, lse, lowered, **scores)
    build.call(twin.attention_forward, seed, args, int(q.dtype == torch.bfloat16), multiprocessors)
    return out, lse


def inputs(B, Hq, Hkv, Sq, Sk, D, dtype=torch.bfloat16):
    return (
        torch.randn(B, Hq, Sq, D).to(dtype),
        torch.randn(B, Hkv, Sk, D).to(dtype),
        torch.randn(B, Hkv, Sk, D).to(dtype),
    )


def check(out, lse, q, k, v, visible=None, **scores):
    wide = [x.double() for x in (q, k, v)]
    exact, exact_lse = reference.attention(*wide, mask=visible, return_lse=True, **scores)
    theirs = None
    if not scores.get("softcap"):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scores.get("scale"))
    verdict = error_rule(out, exact, theirs, magnitude=v.abs().max().item())
    assert verdict, verdict.reason
    torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=1e-5, atol=2e-5)


# B, Hq, Hkv, Sq, Sk: one, primes, either side of a tile and a granule, three rounds of both stages and more.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 2, 1, 127, 131),
    (2, 3, 3, 65, 63),
    (1, 2, 2, 193, 769),
    (1, 4, 2, 17, 257),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("D", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(twin, shape, D, dtype):
    q, k, v = inputs(*shape, D, dtype)
    seed = SHAPES.index(shape) + 3 * (dtype == torch.float16)
    out, lse = forward(twin, seed, q, k, v, multiprocessors=2)
    check(out, lse, q, k, v)


@pytest.mark.parametrize("D", ROWS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_schedule(twin, seed, D):
    # Two tiles a head, four rounds of both stages, a ragged tail; consumers see different blocks.
    Sq, Sk = ROWS[D] + 70, 7 * KEYS[D] + 33
    q, k, v = inputs(1, 2, 1, Sq, Sk, D)
    lowered = lower(masks.CausalLowerRight(), 1, 2, 1, Sq, Sk, "cpu")
    out, lse = forward(twin, seed, q, k, v, lowered, multiprocessors=1 + seed % 3)
    check(out, lse, q, k, v, lowered.to_dense())


def dense(B, H, Sq, Sk):
    """A plane of bits with empty rows, empty granules and full ones."""
    seen = torch.rand(B, H, Sq, Sk) < 0.4
    seen[..., 64:128, :] = False
    seen[..., 3, :] = False
    seen[..., :64, 64:192] = True
    return seen


MORE_MASKS = {
    "everything": (None, (1, 2, 130, 200)),
    "nothing": (masks.KeyPadding([0, 9]), (2, 2, 70, 130)),
    "dense": (dense(1, 2, 300, 333), (1, 2, 300, 333)),
    "dense by batch": (dense(2, 1, 200, 333), (2, 2, 200, 333)),
    "dense and causal": (masks.Dense(dense(1, 1, 300, 300)) & masks.Causal(), (1, 1, 300, 300)),
    "dense and padding": (
        masks.Dense(dense(1, 1, 200, 300)) & masks.KeyPadding([150, 290]),
        (2, 1, 200, 300),
    ),
    "window": (masks.SlidingWindow(100, 30), (1, 1, 400, 500)),
    "documents": (masks.Documents([0, 10, 275, 400, 520]), (1, 1, 520, 520)),
    "left padding": (masks.KeyPadding(torch.arange(300)[None] >= 170), (1, 2, 300, 300)),
    "few granules": (masks.BlockSparse(torch.eye(6, dtype=torch.bool).roll(2, 0), 64), (1, 1, 384, 384)),
    "longformer": (masks.Longformer(64, 3), (1, 1, 400, 400)),
}
ALL_MASKS = {**MASKS, **{f"long {name}": case for name, case in MORE_MASKS.items()}}


@pytest.mark.parametrize("D", ROWS)
@pytest.mark.parametrize("name", ALL_MASKS)
def test_masks_to_the_key(twin, name, D):
    """With q = 0 a row's weights are equal: exp(lse) counts its keys, and values of powers of two name them."""
    mask, (B, H, Sq, Sk) = ALL_MASKS[name]
    lowered = lower(mask, B, H, 1, Sq, Sk, "cpu")
    visible = lowered.to_dense()
    q = torch.zeros(B, H, Sq, D, dtype=torch.float16)
    k = torch.randn(B, 1, Sk, D).half()
    v = torch.zeros(B, 1, Sk, D, dtype=torch.float16)
    # Column c of v is 1 for the keys that are c modulo the columns: the mean counts each residue exactly.
    v.view(B * Sk, D)[torch.arange(B * Sk), torch.arange(B * Sk) % Sk % D] = 1.0
    out = torch.empty(q.shape, dtype=torch.float32)
    seed = list(ALL_MASKS).index(name) % len(SEEDS)
    out, lse = forward(twin, seed, q, k, v, lowered, out=out, multiprocessors=2)
    count = visible.sum(3)
    assert torch.equal(lse.exp().round().long(), count)
    assert torch.equal(lse == -math.inf, count == 0)
    residues = F.pad(visible, (0, -Sk % D)).unflatten(3, (-1, D)).sum(3)
    assert torch.equal((out * count.unsqueeze(3)).round().long(), residues)


@pytest.mark.parametrize("D", ROWS)
@pytest.mark.parametrize("name", ["long dense", "long dense and padding", "long documents", "big bird"])
def test_masks_under_the_error_rule(twin, name, D):
    mask, (B, H, Sq, Sk) = ALL_MASKS[name]
    lowered = lower(mask, B, H, 1, Sq, Sk, "cpu")
    q, k, v = inputs(B, H, 1, Sq, Sk, D)
    out, lse = forward(twin, D % 7, q, k, v, lowered)
    visible = lowered.to_dense()
    check(out, lse, q, k, v, visible)
    assert not out[~visible.any(3)].any()


@pytest.mark.parametrize("D", ROWS)
@pytest.mark.parametrize(
    "scores",
    [{"softcap": 3.0}, {"softcap": 2.0, "scale": -0.4}, {"scale": -0.3}, {"scale": 0.0}, {"scale": 0.7131}],
    ids=str,
)
def test_score_terms(twin, scores, D):
    q, k, v = inputs(1, 2, 1, 70, 200, D)
    lowered = lower(masks.CausalLowerRight(), 1, 2, 1, 70, 200, "cpu")
    out, lse = forward(twin, 2, q, k, v, lowered, **scores)
    check(out, lse, q, k, v, lowered.to_dense(), **scores)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_visible_nan_shows(twin, softcap):
    q, k, v = inputs(1, 1, 1, 70, 100, 64)
    q[0, 0, 5, 3] = math.nan
    v[0, 0, 20, 7] = math.nan
    lowered = lower(masks.Causal(), 1, 1, 1, 70, 100, "cpu")
    out, lse = forward(twin, 3, q, k, v, lowered, softcap=softcap)
    bad = torch.zeros_like(out, dtype=torch.bool)
    bad[0, 0, 5], bad[0, 0, 20:, 7] = True, True
    assert torch.equal(out.isnan(), bad)
    assert torch.equal(lse[0, 0].isnan(), torch.arange(70) == 5)


@pytest.mark.parametrize("D", ROWS)
def test_layouts(twin, D):
    """[B, S, H, D] in memory with rows that lie apart, whose gaps and ends hold NaN; out in fp32."""

    def apart(x):
        B, H, S, _ = x.shape
        memory = torch.full((B, S + 9, H + 1, D + 8), math.nan, dtype=x.dtype)
        view = memory[:, :S, :H, :D].transpose(1, 2)
        view.copy_(x)
        return view

    q, k, v = (apart(x) for x in inputs(2, 4, 2, 70, 150, D))
    out, lse = forward(twin, 5, q, k, v)
    assert out.stride() != q.contiguous().stride()
    check(out, lse, q, k, v)
    wide, _ = forward(twin, 6, q, k, v, out=torch.empty(q.shape, dtype=torch.float32))
    torch.testing.assert_close(wide.to(q.dtype), out, rtol=0, atol=0)


@pytest.mark.parametrize("D", ROWS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["skipped", "padding", "bits", "causal"])
def test_hidden_numbers_stay_hidden(twin, name, poison, D):
    B, H, Sq, Sk = 2, 2, 130, 390
    if name == "skipped":  # blocks that no row sees
        mask, bad = masks.SlidingWindow(40, 0), slice(192, Sk)
    elif name == "padding":  # and keys within a block
        mask, bad = masks.KeyPadding([150, 77]), slice(150, Sk)
    elif name == "bits":
        mask, bad = torch.arange(Sk).expand(1, 1, Sq, Sk) % 5 != 2, slice(2, Sk, 5)
    else:  # seen by some rows and hidden from the others
        mask, bad = masks.Causal(), slice(100, 110)
    lowered = lower(mask, B, H, 1, Sq, Sk, "cpu")
    q, k, v = inputs(B, H, 1, Sq, Sk, D)
    clean, clean_lse = forward(twin, 4, q, k, v, lowered)
    k[:, :, bad], v[:, :, bad] = poison, poison
    out, lse = forward(twin, 4, q, k, v, lowered)
    unseen = ~lowered.to_dense()[..., bad].any(3)
    assert unseen.any()
    assert torch.equal(lse[unseen], clean_lse[unseen])
    torch.testing.assert_close(out[unseen], clean[unseen], rtol=1e-2, atol=1e-2)
    assert not out[~unseen].isfinite().any() if (~unseen).any() else True


@pytest.mark.parametrize("D", ROWS)
def test_bits_do_not_depend_on_batch_or_card(twin, D):
    q, k, v = inputs(3, 2, 1, ROWS[D] + 30, 300, D)
    lowered = lower(masks.Causal(), 3, 2, 1, q.shape[2], 300, "cpu")
    together, lse = forward(twin, 0, q, k, v, lowered, multiprocessors=1)
    for multiprocessors in (2, 5, 132):
        again, lse_again = forward(twin, 7, q, k, v, lowered, multiprocessors=multiprocessors)
        assert torch.equal(again, together)
        assert torch.equal(lse_again, lse)
    alone, _ = forward(twin, 3, q[1:2], k[1:2], v[1:2], lowered)
    assert torch.equal(alone, together[1:2])


@pytest.mark.parametrize("B, Hq, Hkv, Sq", [(1, 1, 1, 1), (3, 5, 5, 700), (2, 12, 4, 1000), (7, 3, 1, 64)])
def test_every_tile_comes_once(twin, B, Hq, Hkv, Sq):
    q, k, v = inputs(B, Hq, Hkv, Sq, 50, 64)
    for mask in (masks.Causal(), masks.SlidingWindow(3, 1 << 20), None):
        lowered = None if mask is None else lower(mask, B, Hq, Hkv, Sq, 50, "cpu")
        args = attention_args(q, k, v, q, torch.empty(B, Hq, Sq), lowered)
        for heads in (0.5, 1, 2, 5, 1000):  # of keys and values in a section
            room = ctypes.c_int64(int(heads * 2 * 50 * 64 * 2))
            build.call(twin.attention_tiles, 0, args, 128, room)


def test_empty_calls(twin):
    for Sq, Sk in ((0, 5), (5, 0)):
        q, k, v = inputs(1, 1, 1, Sq, Sk, 64)
        out, lse = forward(twin, 1, q, k, v)
        assert not out.any()
        assert bool((lse == -math.inf).all())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"D": 96, "Dv": 96}, "D is not"),
        ({"Dv": 32}, "D and Dv differ"),
        ({"bias": 64}, "no bias"),
        ({"alibi_slopes": 64}, "no ALiBi"),
        ({"sinks": 64}, "no sinks"),
        ({"dropout_seed": 64}, "no dropout"),
    ],
    ids=str,
)
def test_refusals(twin, change, said):
    q, k, v = inputs(1, 1, 1, 3, 3, 64)
    out, lse = torch.empty_like(q), torch.empty(1, 1, 3)
    args = attention_args(q, k, v, out, lse)
    for name, value in change.items():
        setattr(args, name, value)
    with pytest.raises(build.TwinError, match=said):
        build.call(twin.attention_forward, 0, args, 1, 1)


@pytest.mark.parametrize("change", ["aligned", "multiple of 8", "expanded"])
def test_refused_layouts(twin, change):
    q, k, v = inputs(2, 1, 1, 3, 3, 64)
    if change == "aligned":
        k = torch.randn(k.numel() + 1).bfloat16()[1:].view(k.shape)
    elif change == "expanded":
        k = k[:1].expand(2, 1, 3, 64)
    else:
        k = torch.randn(2, 1, 3, 67).bfloat16()[..., :64]
    with pytest.raises(build.TwinError, match=change):
        forward(twin, 0, q, k, v)


@pytest.mark.parametrize(
    ("kind", "D"),
    [
        ("asan", 64),
        ("tsan", 64),
        ("tsan", 256),  # without a baton
        pytest.param("asan", 256, marks=pytest.mark.slow),
        pytest.param("asan", 128, marks=pytest.mark.slow),
        pytest.param("tsan", 128, marks=pytest.mark.slow),
    ],
)
def test_sanitizers(kind, D):
    program = build.program("attention_sm90.cpp", kind, f"-DFASTATTN_ONLY_D={D}")
    for seed in (0, 5):
        result = build.run(program, seed, 3 if D == 64 else 2)
        assert result.returncode == 0, result.stdout + result.stderr[-4000:]
