"""What the tests of softmax and the norms share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastattn import reference, rows
from fastattn.tools.equivalence import error_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# One either side of a vector of every instruction set, of a cached chunk of 128 vectors, primes, model sizes.
LENGTHS = [
    *range(1, 36),
    47,
    48,
    49,
    63,
    64,
    65,
    97,
    127,
    128,
    129,
    255,
    256,
    257,
    383,
    509,
    511,
    512,
    513,
    767,
]
LENGTHS += [768, 1000, 1023, 1024, 1025, 1536, 2039, 2047, 2048, 2049, 3001, 4095, 4096]
LONG = [32767, 32768, 65536, 65537, 131072, 131101, 262143, 262144]


def misaligned(rows: int, width: int, dtype: torch.dtype, offset: int, seed: int = 0) -> torch.Tensor:
    """[rows, width] of normal numbers that start `offset` elements into their storage."""
    generator = torch.Generator().manual_seed(seed + width)
    flat = torch.zeros(offset + rows * width, dtype=dtype)
    x = flat[offset:].view(rows, width)
    return x.copy_(torch.randn(rows, width, generator=generator))


def poisoned(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A fresh result full of NaN, so that an element nobody writes shows."""
    return torch.full(like.shape, float("nan"), dtype=dtype or like.dtype)


def assert_right(actual, exact, theirs=None, what="", **rule):
    verdict = error_rule(actual, exact, theirs, **rule)
    assert verdict, f"{what}: {verdict.reason}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN equal to NaN, and 0 not to -0."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def doubled(arguments: dict) -> dict:
    return {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}


def check_norm(name: str, x: torch.Tensor, shape, eps: float = 1e-5, **arguments) -> torch.Tensor:
    """layer_norm or rms_norm against float64 and, where torch takes the arguments, against torch. In x's dtype."""
    function, specification, theirs = getattr(rows, name), getattr(reference, name), None
    out = poisoned(x)
    result = function(x, shape, eps=eps, out=out, **arguments)
    assert result is out
    exact = specification(x.double(), shape, eps=eps, **doubled(arguments))
    if all(not isinstance(t, torch.Tensor) or t.dtype == x.dtype for t in arguments.values()):
        if not arguments.get("weight_offset"):
            given = {n: t for n, t in arguments.items() if n != "weight_offset"}
            theirs = getattr(F, name)(x, [shape] if isinstance(shape, int) else shape, eps=eps, **given)
    what = f"{name} {list(x.shape)} {x.dtype} {list(arguments)}"
    assert_right(out, exact, theirs, what)
    assert same_bits(out, function(x, shape, eps=eps, **arguments)), what
    return out


def check_add_norm(name: str, x, residual, shape, eps: float = 1e-5, sum_dtype=None, **arguments):
    """add_layer_norm or add_rms_norm: the sum to the bit, the norm to the bit of the norm alone where dtypes allow."""
    function, alone = getattr(rows, f"add_{name}"), getattr(rows, name)
    kind = residual.dtype if sum_dtype is None else sum_dtype
    out, sum_out = poisoned(x), poisoned(x, kind)
    y, total = function(
        x, residual, shape, eps=eps, sum_dtype=sum_dtype, out=out, sum_out=sum_out, **arguments
    )
    assert y is out and total is sum_out
    assert same_bits(total, (x.float() + residual.float()).to(kind))
    exact = getattr(reference, name)(total.double(), shape, eps=eps, **doubled(arguments))
    assert_right(y, exact, what=f"add_{name} {x.dtype} {residual.dtype} {kind}")
    if kind == x.dtype:
        assert same_bits(y, alone(total, shape, eps=eps, **arguments))
    fresh = function(x, residual, shape, eps=eps, sum_dtype=sum_dtype, **arguments)
    assert same_bits(fresh[0], y) and same_bits(fresh[1], total)
    return y, total


def gradients(function, inputs, douts):
    """Of each floating-point input, from the outputs' gradients `douts`; an input given twice counts once."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return torch.autograd.grad(outs, leaves, [d.to(o.dtype) for d, o in zip(douts, outs)])


def check_gradients(function, specification, inputs, douts, theirs=None, what="", precision=None):
    """Each gradient against float64 and, where torch has the call, against torch's; returns them.

    precision: a dtype to judge all by, where a result that was rounded to it is what they are computed from.
    """
    ours = gradients(function, inputs, douts)
    exact = gradients(specification, [t.double() for t in inputs], [d.double() for d in douts])
    rivals = gradients(theirs, inputs, douts) if theirs else [None] * len(inputs)
    for i, (a, b, c, t) in enumerate(zip(ours, exact, rivals, inputs)):
        assert a.dtype == t.dtype and a.shape == t.shape
        if precision and a.dtype == torch.float32:
            a = a.to(precision)
        assert_right(a, b, c, f"{what} input {i} {list(t.shape)} {t.dtype}")
    return ours


def over(function, n, **arguments):
    """A norm over `n` as a function of its tensors: x, weights."""
    return lambda x, *weights: function(x, n, *weights, **arguments)
