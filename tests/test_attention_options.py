"""The options of the forward together: every pair of them meets, on every instruction set, and torch's own checks."""

import math

import pytest
import torch
from pairwise import name_of, pairwise

import fastattn
from fastattn import masks, ops, reference
from fastattn.tools.equivalence import error_rule

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, KEYS = 4, 133
I, J = torch.arange(70)[:, None], torch.arange(KEYS)


def heads_last(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def offset(t):
    return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)


def sliced(t):
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def every_other_row(t):
    return torch.stack([t, t], 3).flatten(2, 3)[:, :, ::2]


def same_heads(t):
    return t[:, :1].expand_as(t)


def bias_full(dtype, rows):
    return torch.randn(2, HEADS, rows, KEYS)


def bias_transposed(dtype, rows):
    return torch.randn(1, 1, KEYS, rows).to(dtype).mT


def bias_keys(dtype, rows):
    return torch.randn(2, 1, 1, 2 * KEYS).to(dtype)[..., ::2]


def bias_hiding(dtype, rows):
    hidden = (J[None] > I[:rows] + 40) | (torch.rand(rows, KEYS) < 0.2)
    return torch.randn(HEADS, rows, KEYS).to(dtype).masked_fill(hidden, -math.inf)


GRID = pairwise(
    dtype=(torch.float32, torch.bfloat16, torch.float16),
    rows=(3, 70),
    Hkv=(4, 2, 1),
    width=((16, 16), (40, 24), (64, 64)),
    view=(None, heads_last, offset, sliced, every_other_row, same_heads),
    mask=(
        None,
        masks.CausalLowerRight(),
        masks.SlidingWindow(20, 5) & masks.KeyPadding([100, KEYS]),
        masks.Longformer(17, [0]),
        "random",
    ),
    bias=(None, bias_full, bias_transposed, bias_keys, bias_hiding),
    alibi=(None, (HEADS,), (2, HEADS)),
    softcap=(None, 3.0),
    sinks=(False, True),
    dropout=(0.0, 0.3),
    scale=(None, -0.4),
)  # fmt: skip


def call_of(case):
    """q, k, v and the other arguments of a case; the mask as a bool tensor too."""
    torch.manual_seed(len(name_of(case)))
    rows, (D, Dv), dtype = case["rows"], case["width"], case["dtype"]
    view = case["view"] or (lambda t: t)
    shapes = (HEADS, rows, D), (case["Hkv"], KEYS, D), (case["Hkv"], KEYS, Dv)
    q, k, v = (view(torch.randn(2, *shape).to(dtype)) for shape in shapes)
    mask = torch.rand(2, 1, rows, KEYS) < 0.6 if case["mask"] == "random" else case["mask"]
    dense = mask if isinstance(mask, torch.Tensor) or mask is None else mask.to_dense(rows, KEYS, 2, HEADS)
    options = {
        "bias": case["bias"](dtype, rows) if case["bias"] else None,
        "alibi_slopes": torch.rand(case["alibi"]) if case["alibi"] else None,
        "softcap": case["softcap"],
        "sinks": torch.randn(HEADS) if case["sinks"] else None,
        "scale": case["scale"],
    }
    if case["dropout"]:
        options |= {"dropout_p": case["dropout"], "dropout_seed": torch.tensor(11)}
    return (q, k, v), mask, dense, options


@pytest.mark.parametrize("case", GRID, ids=name_of)
def test_options_together(isa, case):
    operands, mask, dense, options = call_of(case)
    out, lse = fastattn.attention(*operands, mask=mask, return_lse=True, **options)
    exact, exact_lse = reference.attention(
        *(t.double() for t in operands), mask=dense, return_lse=True, **options
    )
    largest = operands[2].abs().max().item() * (2 if case["dropout"] else 1)
    verdict = error_rule(out, exact, magnitude=largest)
    assert verdict, f"out: {verdict.reason}"
    seen = exact_lse[exact_lse.isfinite()].abs().max().item()
    verdict = error_rule(lse, exact_lse, magnitude=max(seen, 1.0))
    assert verdict, f"lse: {verdict.reason}"


class Recorder:
    """In the place of the ops: keeps the arguments that attention calls them with."""

    def __init__(self, fwd):
        self.seen = []

        def record(*arguments):
            self.seen.append(arguments)
            return fwd(*arguments)

        self.fwd = self.eager = self.functorch = record


@pytest.mark.parametrize("case", GRID, ids=name_of)
def test_opcheck(case, monkeypatch):
    """torch's checks of schema, autograd and fakes, on what attention really passes; half have gradients."""
    recorder = Recorder(ops.OPS["cpu"].fwd)
    monkeypatch.setitem(ops.OPS, "cpu", recorder)
    operands, mask, _, options = call_of(case)
    fastattn.attention(*operands, mask=mask, **options)
    (arguments,) = recorder.seen
    trained = GRID.index(case) % 2
    leaves = (0, 1, 2, ops._FWD.index("bias"), ops._FWD.index("sinks"))
    arguments = [
        a.detach().requires_grad_() if trained and n in leaves and a is not None else a
        for n, a in enumerate(arguments)
    ]
    arguments[-1] = GRID.index(case) % 4 > 1  # out in float32
    torch.library.opcheck(torch.ops.fastattn.attention_fwd.default, tuple(arguments))
