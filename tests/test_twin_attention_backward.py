"""The sm_80 attention backward, executed on the host twin: every gradient against the reference, dropout and masks
to the key, and the same bits under every schedule.
"""

import json
import math

import pytest
import torch
from fixtures.make import MASKS, PATH
from twin import attention, build

from fastattn import masks, reference
from fastattn.tools.equivalence import error_rule

pytestmark = pytest.mark.skipif(build.missing is not None, reason=str(build.missing))

SCHEDULES = range(8)
BF16, FP16 = torch.bfloat16, torch.float16

CASES = {
    "32 full": ((FP16, 1, 2, 1, 257, 70, 32, 32), None),
    "64 causal": ((BF16, 1, 4, 2, 200, 200, 64, 64), masks.Causal()),
    "64 padding and window": (
        (BF16, 2, 1, 1, 200, 200, 56, 64),
        masks.SlidingWindow(70, 3) & masks.KeyPadding([3, 190]),
    ),
    "64 bits": ((BF16, 1, 2, 1, 260, 200, 64, 64), masks.Longformer(40, 2)),
    "96 documents": ((BF16, 1, 2, 2, 200, 200, 96, 72), masks.Documents([0, 10, 75, 130, 200])),
    "96 bits": ((BF16, 1, 1, 1, 200, 200, 96, 72), masks.Longformer(40, 2)),
    "128 lower right": ((FP16, 1, 2, 1, 70, 200, 128, 128), masks.CausalLowerRight()),
    "128 bits in a band": ((FP16, 1, 1, 1, 200, 200, 128, 128), masks.Strided(24) & masks.Causal()),
    "192 bits": ((BF16, 1, 1, 1, 200, 130, 192, 128), masks.Strided(24)),
    "256 causal": ((FP16, 1, 1, 1, 140, 140, 256, 256), masks.Causal()),
    "odd strides": ((BF16, 1, 3, 1, 67, 131, 37, 61), masks.Causal()),
}


def tensors(dtype, B, Hq, Hkv, Sq, Sk, D, Dv):
    """q, k, v and the gradient of out."""
    shapes = (B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv), (B, Hq, Sq, Dv)
    return tuple(torch.randn(*shape).to(dtype) for shape in shapes)


def exact_gradients(leaves, dout, dlse, dense, dtype=torch.float64):
    """The reference's, of all floating leaves; computed in `dtype`."""
    given = {
        n: t.detach().to(dtype).requires_grad_()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
        for n, t in leaves.items()
    }
    q, k, v = (given.pop(n) for n in "qkv")
    out, lse = reference.attention(q, k, v, mask=dense, return_lse=True, **given)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (torch.where(lse == -math.inf, 0.0, lse) * dlse.to(lse.dtype)).sum()
    wanted = {"q": q, "k": k, "v": v} | {
        n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.requires_grad
    }
    return dict(zip(wanted, torch.autograd.grad(loss, wanted.values()), strict=True))


def eager_gradients(q, k, v, dout, dense):
    """What the same costs in q's dtype, step by step."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    if dense is not None:
        s = s.masked_fill(~dense, -math.inf)
    seen = (s != -math.inf).any(-1, keepdim=True)
    p = torch.where(seen, s, 0.0).softmax(-1) * seen
    loss = (p @ v.repeat_interleave(group, 1) * dout).sum()
    return dict(zip("qkv", torch.autograd.grad(loss, (q, k, v)), strict=True))


def check(leaves, dout, mask=None, dlse=None, schedules=SCHEDULES):
    q, k, v = (leaves[n] for n in "qkv")
    terms = {n: t for n, t in leaves.items() if n not in "qkv"}
    dense = None if mask is None else mask.to_dense(q.shape[2], k.shape[2], q.shape[0], q.shape[1])
    out, lse = attention.forward(q, k, v, mask=mask, **terms)
    exact = exact_gradients(leaves, dout, dlse, dense)
    theirs = eager_gradients(q, k, v, dout, dense) if not terms and dlse is None else {}
    first = None
    for schedule in schedules:
        ours = attention.backward(q, k, v, out, lse, dout, dlse, mask=mask, schedule=schedule, **terms)
        if first is None:
            first = ours
            for name, grad in ours.items():
                if name in ("alibi_slopes", "sinks"):
                    grad = grad.sum(0)
                want = exact[name].view(grad.shape)
                if name in theirs:
                    verdict = error_rule(grad, want, theirs[name])
                    assert verdict.ok, (name, verdict)
                else:  # rounding to 16 bits of P, dS and out, in every product
                    error = (grad.double() - want).abs().max() / want.abs().max().clamp(min=1e-3)
                    assert error < (2e-2 if q.dtype == BF16 else 3e-3), (name, float(error))
        for name, grad in ours.items():
            assert torch.equal(grad, first[name]), f"{name}, schedule {schedule}"
    return first


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_reference(name):
    shape, mask = CASES[name]
    q, k, v, dout = tensors(*shape)
    check({"q": q, "k": k, "v": v}, dout, mask)


TERMS = {
    "bias": {"bias": lambda: torch.randn(2, 2, 70, 140)},
    "bias of a head": {"bias": lambda: torch.randn(1, 2, 70, 140).to(FP16)},
    "bias of keys": {"bias": lambda: torch.randn(2, 1, 1, 140)},
    "bias of rows": {"bias": lambda: torch.randn(2, 70, 1)},
    "bias of nothing": {"bias": lambda: torch.randn(1, 1)},
    "softcap": {"softcap": lambda: 2.0},
    "alibi": {"alibi_slopes": lambda: torch.rand(2) * 0.1},
    "sinks": {"sinks": lambda: torch.randn(2)},
    "scale": {"scale": lambda: -0.3},
    "dropout": {"dropout_p": lambda: 0.4, "dropout_seed": lambda: 77},
}


@pytest.mark.parametrize("name", TERMS)
def test_terms(name):
    q, k, v, dout = tensors(FP16, 2, 2, 1, 70, 140, 64, 64)
    leaves = {"q": q, "k": k, "v": v} | {n: make() for n, make in TERMS[name].items()}
    kernels_of_their_own = name in ("bias", "bias of keys", "alibi", "sinks")
    schedules = SCHEDULES if kernels_of_their_own else (0, 5)
    check(leaves, dout, masks.Causal(), dlse=torch.randn(2, 2, 70), schedules=schedules)


@pytest.mark.parametrize("mask", [None, masks.Longformer(30, 1)], ids=["full", "bits"])
def test_all_terms_at_once(mask):
    q, k, v, dout = tensors(FP16, 2, 4, 2, 70, 140, 96, 128)
    leaves = dict(
        q=q,
        k=k,
        v=v,
        bias=torch.randn(2, 1, 70, 140).to(FP16),
        alibi_slopes=torch.rand(4) * 0.1,
        softcap=5.0,
        sinks=torch.randn(4),
        scale=0.1,
        dropout_p=0.3,
        dropout_seed=2**40 + 5,
        q_pos=torch.randint(0, 50, (70,), dtype=torch.int32),
        k_pos=torch.randint(0, 50, (2, 140), dtype=torch.int32),
    )
    check(leaves, dout, mask, dlse=torch.randn(2, 4, 70))


@pytest.mark.parametrize("name", MASKS)
def test_masks_to_the_key(name):
    """With q = 0 and a dout that names rows, dV says which rows see each key: each weighs 1 / its count."""
    mask, (B, H, Sq, Sk) = MASKS[name]
    dense = mask.to_dense(Sq, Sk, B, H)
    q, k, v = (torch.zeros(B, H, S, 64, dtype=FP16) for S in (Sq, Sk, Sk))
    out, lse = attention.forward(q, k, v, mask=mask)
    for first in range(0, Sq, 64):
        dout = torch.zeros(B, H, Sq, 64, dtype=FP16)
        rows = range(first, min(first + 64, Sq))
        for r in rows:
            dout[:, :, r, r - first] = 1
        dv = attention.backward(q, k, v, out, lse, dout, mask=mask, schedule=2, grads_fp32=True)["v"]
        assert torch.equal(dv[..., : len(rows)].mT != 0, dense[:, :, first : first + 64])


@pytest.mark.parametrize(
    "case",
    [c for c in json.loads(PATH.read_text())["dropout"] if c["call"][6:] == [0, 0]],
    ids=lambda c: f"seed{c['call'][0]}",
)
def test_dropout_draws_the_committed_bits(case):
    seed, p, B, H, Sq, Sk, _, _ = case["call"]
    expected = torch.tensor([[int(row, 16) >> n & 1 for n in range(Sk)] for row in case["keep"]]).view(
        B, H, Sq, Sk
    )
    q, k, v = (torch.zeros(B, H, S, 64, dtype=BF16) for S in (Sq, Sk, Sk))
    out, lse = attention.forward(q, k, v)
    dout = torch.eye(Sq, 64, dtype=BF16).expand(B, H, Sq, 64).contiguous()
    dv = attention.backward(q, k, v, out, lse, dout, dropout_p=p, dropout_seed=seed)["v"]
    assert torch.equal((dv[..., :Sq].mT != 0).int(), expected)


def test_what_nobody_sees_may_hold_nan():
    """Keys that no row sees, and rows that see nothing: gradients of the others are unchanged, theirs are 0."""
    padding = torch.arange(200) % 7 != 3
    for mask, seen in (
        (masks.KeyPadding([70]), torch.arange(200) < 70),
        (masks.KeyPadding(padding[None]), padding),
    ):
        mask = mask & masks.SlidingWindow(40, 0)
        q, k, v, dout = tensors(BF16, 1, 1, 1, 200, 200, 64, 64)
        rows = mask.to_dense(200, 200, 1, 1).any(-1)[0, 0]
        out, lse = attention.forward(q, k, v, mask=mask)
        clean = attention.backward(q, k, v, out, lse, dout, mask=mask)
        k[:, :, ~seen], v[:, :, ~seen] = math.nan, math.inf
        q[:, :, ~rows], dout[:, :, ~rows] = math.nan, math.inf
        for name, grad in attention.backward(q, k, v, out, lse, dout, mask=mask).items():
            assert torch.equal(grad, clean[name]), name
        assert (clean["q"][:, :, ~rows] == 0).all()
        assert (clean["k"][:, :, ~seen] == 0).all() and (clean["v"][:, :, ~seen] == 0).all()


def test_a_gradient_does_not_depend_on_its_batch():
    q, k, v, dout = tensors(FP16, 3, 2, 1, 100, 100, 64, 64)
    out, lse = attention.forward(q, k, v, mask=masks.Causal())
    whole = attention.backward(q, k, v, out, lse, dout, mask=masks.Causal())
    one = (t[1:2] for t in (q, k, v, out, lse.contiguous(), dout))
    q, k, v, out, lse, dout = (t.contiguous() for t in one)
    alone = attention.backward(q, k, v, out, lse, dout, mask=masks.Causal())
    for name, grad in alone.items():
        assert torch.equal(grad, whole[name][1:2]), name
