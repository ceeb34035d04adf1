"""The sm_80 attention forward, executed on the host twin: against the reference under the error rule, masks to the
key, and the same bits under every schedule.
"""

import ctypes
import json
import math

import pytest
import torch
from fixtures.make import MASKS, PATH
from twin import attention, build
from twin.attention_args import AttentionArgs, AttentionBwdArgs

from fastattn import masks, reference
from fastattn.tools.equivalence import error_rule

pytestmark = pytest.mark.skipif(build.missing is not None, reason=str(build.missing))

SCHEDULES = range(8)
BF16, FP16 = torch.bfloat16, torch.float16

# name -> (dtype, B, Hq, Hkv, Sq, Sk, D, Dv), mask: every head size, at least three tiles of keys, ragged both ways.
CASES = {
    "32 full": ((FP16, 1, 2, 1, 70, 257, 32, 32), None),
    "32 bits": ((FP16, 1, 2, 2, 200, 230, 24, 32), masks.BigBird(16, random=2)),
    "64 full": ((BF16, 2, 2, 1, 129, 193, 64, 64), None),
    "64 causal": ((BF16, 1, 2, 1, 260, 260, 64, 64), masks.Causal()),
    "64 fp16 lower right": ((FP16, 1, 1, 1, 100, 250, 64, 40), masks.CausalLowerRight()),
    "64 padding and window": (
        (BF16, 2, 1, 1, 200, 200, 56, 64),
        masks.SlidingWindow(70, 3) & masks.KeyPadding([3, 190]),
    ),
    "64 bits": ((BF16, 1, 1, 1, 260, 300, 64, 64), masks.Longformer(40, 2)),
    "96 documents": ((BF16, 1, 2, 2, 230, 230, 96, 72), masks.Documents([0, 10, 75, 130, 230])),
    "96 bits": ((BF16, 1, 1, 1, 200, 230, 96, 72), masks.Longformer(40, 2)),
    "128 causal": ((FP16, 1, 2, 1, 200, 200, 128, 128), masks.Causal()),
    "128 bits in a band": ((FP16, 1, 1, 1, 200, 200, 128, 128), masks.Strided(24) & masks.Causal()),
    "192 full": ((BF16, 1, 1, 1, 65, 200, 192, 128), None),
    "192 bits": ((BF16, 1, 1, 1, 130, 200, 192, 128), masks.Strided(24)),
    "256 causal": ((FP16, 1, 1, 1, 200, 200, 256, 256), masks.Causal()),
    "odd strides": ((BF16, 1, 3, 1, 67, 131, 37, 61), masks.Causal()),
}


def tensors(dtype, B, Hq, Hkv, Sq, Sk, D, Dv):
    q, k, v = torch.randn(B, Hq, Sq, D), torch.randn(B, Hkv, Sk, D), torch.randn(B, Hkv, Sk, Dv)
    return tuple(t.to(dtype) for t in (q, k, v))


def eager(q, k, v, dense, **terms):
    """The same in q's dtype, step by step: what its rounding costs is the yardstick."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if terms.get("scale") is None else terms["scale"])
    if terms.get("softcap"):
        s = terms["softcap"] * torch.tanh(s / terms["softcap"])
    if terms.get("bias") is not None:
        s = s + terms["bias"].to(s.dtype)
    if dense is not None:
        s = s.masked_fill(~dense, -math.inf)
    lse = s.logsumexp(-1)
    p = torch.where((lse != -math.inf).unsqueeze(-1), s, 0.0).softmax(-1)
    return p @ v


def check(q, k, v, mask=None, schedules=SCHEDULES, plain_terms=True, **terms):
    """One call under every schedule: equal bits, and those under the error rule."""
    dense = None if mask is None else mask.to_dense(q.shape[2], k.shape[2], q.shape[0], q.shape[1])
    exact, exact_lse = reference.attention(
        q.double(), k.double(), v.double(), mask=dense, return_lse=True, **double(terms)
    )
    theirs = eager(q, k, v, dense, **terms) if plain_terms else None
    first = None
    for schedule in schedules:
        out, lse = attention.forward(q, k, v, mask=mask, schedule=schedule, **terms)
        if first is None:
            first = out, lse
            verdict = error_rule(out, exact, theirs, magnitude=float(v.abs().max()))
            assert verdict.ok, verdict
            assert torch.allclose(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
        assert torch.equal(out, first[0]), f"schedule {schedule}"
        assert torch.equal(lse, first[1]), f"schedule {schedule}"
    return first


def double(terms):
    return {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for n, t in terms.items()
    }


def test_python_and_cpp_agree_on_the_arguments():
    sizes = (ctypes.c_int64 * 2)()
    build.call(attention.library(64, BF16).layout, 0, sizes)
    assert list(sizes) == [ctypes.sizeof(AttentionArgs), ctypes.sizeof(AttentionBwdArgs)]


@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_reference(name):
    shape, mask = CASES[name]
    check(*tensors(*shape), mask)


TERMS = {
    "bias": lambda B, H, Sq, Sk: {"bias": torch.randn(1, H, Sq, Sk)},
    "half bias of keys": lambda B, H, Sq, Sk: {"bias": torch.randn(B, 1, 1, Sk).to(BF16)},
    "softcap": lambda B, H, Sq, Sk: {"softcap": 3.0},
    "negative scale": lambda B, H, Sq, Sk: {"scale": -0.2},
    "zero scale": lambda B, H, Sq, Sk: {"scale": 0.0},
}


@pytest.mark.parametrize("name", TERMS)
def test_score_terms(name):
    q, k, v = tensors(BF16, 2, 2, 1, 70, 140, 64, 64)
    check(q, k, v, masks.Causal(), schedules=(0, 5), **TERMS[name](2, 2, 70, 140))


def test_all_terms_at_once():
    q, k, v = tensors(FP16, 2, 4, 2, 70, 140, 128, 96)
    terms = dict(
        bias=torch.randn(2, 1, 70, 140).to(FP16),
        alibi_slopes=torch.rand(4),
        softcap=5.0,
        sinks=torch.randn(4),
        scale=0.1,
        dropout_p=0.3,
        dropout_seed=2**40 + 5,
        q_pos=torch.randint(0, 200, (70,), dtype=torch.int32),
        k_pos=torch.randint(0, 200, (2, 140), dtype=torch.int32),
    )
    check(q, k, v, masks.Longformer(30, 1), plain_terms=False, **terms)
    out, _ = attention.forward(q, k, v, out_fp32=True, **terms)
    exact = reference.attention(q.double(), k.double(), v.double(), **double(terms))
    assert (out - exact).abs().max() < 5e-3


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("head", [64, 192])  # two granules a block, and one
def test_masks_to_the_key(name, head):
    """With q = 0, exp(lse) is the number of visible keys, and out the mean of what names them."""
    mask, (B, H, Sq, Sk) = MASKS[name]
    dense = mask.to_dense(Sq, Sk, B, H)
    q, k = torch.zeros(B, H, Sq, head, dtype=BF16), torch.randn(B, H, Sk, head).to(BF16)
    keys = torch.arange(Sk)
    v = torch.stack([keys % 64, keys // 64 + 1], -1).to(BF16).expand(B, H, Sk, 2).contiguous()
    out, lse = attention.forward(q, k, v, mask=mask, schedule=3, out_fp32=True)
    count = dense.sum(-1)
    assert torch.equal(lse.exp().round().long(), count)
    assert torch.equal(lse == -math.inf, count == 0)
    mean = (dense.double() @ v.double()) / count.clamp(min=1).unsqueeze(-1)
    assert torch.allclose(out.double(), mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", json.loads(PATH.read_text())["dropout"], ids=lambda c: f"seed{c['call'][0]}")
def test_dropout_draws_the_committed_bits(case):
    seed, p, B, H, Sq, Sk, q0, k0 = case["call"]
    expected = torch.tensor([[int(row, 16) >> n & 1 for n in range(Sk)] for row in case["keep"]]).view(
        B, H, Sq, Sk
    )
    q, k = torch.zeros(B, H, Sq, 64, dtype=BF16), torch.zeros(B, H, Sk, 64, dtype=BF16)
    v = torch.eye(Sk, dtype=BF16).expand(B, H, Sk, Sk).contiguous()
    positions = dict(
        q_pos=torch.arange(q0, q0 + Sq).to(torch.int32), k_pos=torch.arange(k0, k0 + Sk).to(torch.int32)
    )
    out, _ = attention.forward(q, k, v, dropout_p=p, dropout_seed=seed, **positions)
    assert torch.equal((out != 0).int(), expected)


def test_what_nobody_sees_may_hold_nan():
    """Skipped granules, the ragged tail, keys hidden inside a visible granule; by ranges and by bits."""
    padding = torch.arange(200) % 7 != 3
    for mask, seen in (
        (masks.KeyPadding([70]), torch.arange(200) < 70),
        (masks.KeyPadding(padding[None]), padding),
        (masks.KeyPadding(padding[None]) & masks.KeyPadding([150]), padding & (torch.arange(200) < 150)),
    ):
        q, k, v = tensors(BF16, 1, 1, 1, 130, 200, 64, 64)
        clean = attention.forward(q, k, v, mask=mask)
        k[:, :, ~seen], v[:, :, ~seen] = math.nan, math.inf
        for ours, expected in zip(attention.forward(q, k, v, mask=mask), clean, strict=True):
            assert torch.equal(ours, expected)


def test_hidden_granules_are_not_visited():
    """A value that is NaN reaches only the blocks of rows that some row sees it from: 0 * NaN would tell."""
    q, k, v = tensors(BF16, 1, 1, 1, 384, 384, 64, 64)
    v[:, :, 320:] = math.nan
    for mask in (masks.Causal(), masks.Causal() & masks.Strided(3)):
        out, _ = attention.forward(q, k, v, mask=mask)
        assert out[:, :, :256].isfinite().all()


def test_rows_that_see_nothing():
    q, k, v = tensors(FP16, 1, 2, 1, 140, 100, 64, 64)
    for mask in (masks.SlidingWindow(0, 0), masks.KeyPadding([0])):
        out, lse = attention.forward(q, k, v, mask=mask)
        hidden = ~mask.to_dense(140, 100, 1, 2).any(-1)
        assert hidden.any()
        assert (out[hidden] == 0).all()
        assert (lse[hidden] == -math.inf).all()
    bias = torch.zeros(140, 100)
    bias[3], bias[5, 7:], bias[7] = -math.inf, -math.inf, torch.finfo(torch.float32).min
    out, lse = attention.forward(q, k, v, bias=bias)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -math.inf).all()
    mean = v.double().mean(2, keepdim=True).expand(1, 2, 1, 64)[:, :, 0]
    assert torch.allclose(out[:, :, 7].double(), mean, atol=2e-3)
    exact = reference.attention(q.double(), k.double(), v.double(), bias=bias.double())
    assert (out - exact)[:, :, 5].abs().max() < 1e-2


def test_layouts_and_single_elements():
    """[B, S, H, D] in memory, rows that are not aligned, sizes of 1, and nothing at all."""
    q, k, v = tensors(BF16, 2, 2, 2, 40, 130, 64, 64)
    plain = attention.forward(q, k, v, mask=masks.Causal())
    turned = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    shifted = (torch.randn(*t.shape[:3], 67).to(BF16)[..., 1:65].copy_(t) for t in (q, k, v))
    for other in (turned, shifted):
        for ours, expected in zip(attention.forward(*other, mask=masks.Causal()), plain, strict=True):
            assert torch.equal(ours, expected)
    check(*tensors(BF16, 1, 1, 1, 1, 1, 1, 1), schedules=(0,))
    out, lse = attention.forward(*tensors(BF16, 1, 1, 1, 3, 0, 64, 64))
    assert (out == 0).all() and (lse == -math.inf).all()
    attention.forward(*tensors(BF16, 0, 1, 1, 3, 5, 64, 64))


def test_a_row_does_not_depend_on_its_batch():
    q, k, v = tensors(FP16, 3, 2, 1, 150, 150, 128, 128)
    out, lse = attention.forward(q, k, v, mask=masks.Causal())
    alone = attention.forward(*(t[1:2] for t in (q, k, v)), mask=masks.Causal())
    assert torch.equal(out[1:2], alone[0]) and torch.equal(lse[1:2], alone[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head", attention.HEADS)
def test_every_kernel_and_mask(head, dtype):
    for mask, (B, H, Sq, Sk) in MASKS.values():
        check(*tensors(dtype, B, H, 1, Sq, Sk, head, head - 3), mask, schedules=range(2))


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_under_the_sanitizers(kind):
    """Forward and backward on tiny shapes: no race, nothing out of bounds."""
    program = build.program("attention_check.cpp", kind)
    for schedule in {"asan": (0, 7), "tsan": (5,)}[kind]:
        result = build.run(program, schedule)
        assert result.returncode == 0, result.stdout + result.stderr[-3000:]
        assert result.stdout.count(" ok") == 8, result.stdout
