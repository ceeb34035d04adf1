"""The row ops as torch sees them: fakes with true strides, autograd, second derivatives; for every namespace of ops.

Outputs are contiguous, whatever x's strides. The forwards below are the differentiable ones; rows.py calls the ops
that write into a given tensor where no gradient is wanted.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import _cuda_library, _library, _triton, reference  # noqa: F401  the op library has to be loaded first
from .eager import eager, full


def _fake_softmax_fwd(x, dim, mask, bias, scale, causal, out_fp32):
    return x.new_empty(x.shape, dtype=torch.float32 if out_fp32 else x.dtype)


def _fake_softmax_out(x, dim, mask, bias, scale, causal, out):
    return None


def _fake_softmax_bwd(dy, y, dim, bias, scale, x_dtype, needs):
    dx = y.new_empty(y.shape if needs[0] else (0,), dtype=x_dtype)
    if bias is None or not needs[1]:
        return dx, y.new_empty(0, dtype=torch.float32)
    width = y.shape[dim]
    rows = math.prod(size for d, size in enumerate(bias.shape) if d != dim - (y.dim() - bias.dim()))
    return dx, bias.new_empty((rows, width))


def _stats(x: Tensor, row_dims: int, rms: bool) -> Tensor:
    return x.new_empty((1 if rms else 3, math.prod(x.shape[: x.dim() - row_dims])), dtype=torch.float32)


def _fake_norm_fwd(x, row_dims, weight, bias, eps, weight_offset, rms):
    return x.new_empty(x.shape), _stats(x, row_dims, rms)


def _fake_norm_out(x, row_dims, weight, bias, eps, weight_offset, rms, out):
    return None


def _fake_add_norm_fwd(x, residual, row_dims, weight, bias, eps, weight_offset, rms, sum_dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=sum_dtype), _stats(x, row_dims, rms)


def _fake_add_norm_out(x, residual, row_dims, weight, bias, eps, weight_offset, rms, out, sum_out):
    return None


def _fake_norm_bwd(dy, dsum, h, stats, row_dims, weight, bias_dtype, weight_offset, rms, needs):
    shape = h.shape[h.dim() - row_dims :]
    none = h.new_empty(0, dtype=torch.float32)
    return (
        h.new_empty(h.shape if needs[0] else (0,)),
        weight.new_empty(shape) if needs[1] and weight is not None else none,
        h.new_empty(shape, dtype=bias_dtype)
        if needs[2] and bias_dtype is not None and not rms
        else none.clone(),
    )


def rows_contiguous(t: Tensor, row_dims: int) -> bool:
    """Whether the last dimensions are, together, one run of elements."""
    if t.is_contiguous():
        return True
    expected = 1
    for size, stride in zip(reversed(t.shape[-row_dims:]), reversed(t.stride()[-row_dims:])):
        if stride != expected and size != 1:
            return False
        expected *= size
    return True


def as_rows(t: Tensor, row_dims: int) -> Tensor:
    return t if rows_contiguous(t, row_dims) else t.contiguous()


def _softmax_setup(ctx, inputs, output):
    x, ctx.dim, _, bias, ctx.scale, _, _ = inputs
    ctx.x_dtype, ctx.has_bias = x.dtype, bias is not None
    # Of bias only shape, dtype and device matter.
    ctx.save_for_backward(output, *([bias] if ctx.has_bias else []))
    ctx.set_materialize_grads(False)


def _bias_rows_to_shape(rows: Tensor, bias: Tensor, at: int) -> Tensor:
    """[rows of bias, width], as the kernel leaves a gradient, in bias's shape, whose dimension `at` is the width."""
    moved = [*bias.shape[:at], *bias.shape[at + 1 :], bias.shape[at]]
    return rows.reshape(moved).movedim(-1, at)


def _sum_to(t: Tensor, shape: torch.Size) -> Tensor:
    return t.sum_to_size(shape) if t.shape != shape else t


def _softmax_gradients(ops, ctx, needs, dy):
    y, *rest = ctx.saved_tensors
    bias = rest[0] if rest else None
    dx = dbias = None
    if dy is not None:
        if torch.is_grad_enabled():  # a second derivative is asked for: torch differentiates the formula
            ds = y.float() * (dy.float() - (dy.float() * y.float()).sum(ctx.dim, keepdim=True))
            dx = (ctx.scale * ds).to(ctx.x_dtype) if needs[0] else None
            dbias = _sum_to(ds, bias.shape).to(bias.dtype) if needs[1] else None
        else:
            if ctx.dim == y.dim() - 1:
                dy = as_rows(dy, 1)
            dx, dbias = ops.softmax_bwd(dy, y, ctx.dim, bias, ctx.scale, ctx.x_dtype, list(needs))
            dx = dx if needs[0] else None
            dbias = _bias_rows_to_shape(dbias, bias, ctx.dim - y.dim() + bias.dim()) if needs[1] else None
    return dx, dbias


def _norm_by_formula(ctx, needs, h, weight, bias, dy, dsum):
    """The gradients of h, weight and bias by torch, of the reference: for second derivatives."""
    row_dims, eps, offset, rms = ctx.options
    shape = h.shape[h.dim() - row_dims :]
    # Nodes of their own: one of the three may be computed from another, or be the same tensor.
    h, weight, bias = inputs = [None if t is None else t.view_as(t) for t in (h, weight, bias)]
    if rms:
        y = reference.rms_norm(h.float(), shape, weight, eps, weight_offset=offset)
    else:
        y = reference.layer_norm(h.float(), shape, weight, bias, eps, weight_offset=offset)
    wanted = [t for t, need in zip(inputs, needs) if need]
    grads = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=True, materialize_grads=True))
    dh, dweight, dbias = (next(grads) if need else None for need in needs)
    if dsum is not None and dh is not None:
        dh = dh + dsum
    return dh, dweight, dbias


def _gradients(ops, ctx, needs, h, stats, weight, bias, dy, dsum):
    if dy is None:
        return dsum, None, None
    if torch.is_grad_enabled():
        return _norm_by_formula(ctx, needs, h, weight, bias, dy, dsum)
    row_dims, _, offset, rms = ctx.options
    dy = as_rows(dy, row_dims)
    dsum = None if dsum is None else as_rows(dsum, row_dims)
    bias_dtype = None if bias is None else bias.dtype
    grads = ops.norm_bwd(dy, dsum, h, stats, row_dims, weight, bias_dtype, offset, rms, needs)
    return tuple(g if need else None for g, need in zip(grads, needs))


def _save(ctx, h, stats, weight, bias, options):
    ctx.options = options
    ctx.given = (weight is not None, bias is not None)
    ctx.save_for_backward(h, stats, *(t for t in (weight, bias) if t is not None))
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _saved(ctx):
    h, stats, *rest = ctx.saved_tensors
    weight = rest.pop(0) if ctx.given[0] else None
    return h, stats, weight, rest.pop(0) if ctx.given[1] else None


def _norm_setup(ctx, inputs, output):
    x, row_dims, weight, bias, eps, offset, rms = inputs
    _save(ctx, x, output[1], weight, bias, (row_dims, eps, offset, rms))


def _norm_gradients(ops, ctx, needs, dy, _):
    return _gradients(ops, ctx, list(needs), *_saved(ctx), dy, None)


def _add_norm_setup(ctx, inputs, output):
    x, residual, row_dims, weight, bias, eps, offset, rms, _ = inputs
    ctx.dtypes = (x.dtype, residual.dtype)
    _save(ctx, output[1], output[2], weight, bias, (row_dims, eps, offset, rms))


def _add_norm_gradients(ops, ctx, needs, dy, dsum, _):
    wanted = [needs[0] or needs[1], needs[2], needs[3]]
    dh, dweight, dbias = _gradients(ops, ctx, wanted, *_saved(ctx), dy, dsum)
    dx, dresidual = (
        dh.to(dtype) if need and dh is not None else None for dtype, need in zip(ctx.dtypes, needs)
    )
    return dx, dresidual, dweight, dbias


class RowOps:
    """The row ops of one namespace, each an attribute of its name."""

    def __init__(self, namespace: str):
        self.namespace = namespace
        ops = getattr(torch.ops, namespace)
        self.softmax_fwd, self.softmax_out = ops.softmax_fwd.default, ops.softmax_out.default
        self.norm_fwd, self.norm_out = ops.norm_fwd.default, ops.norm_out.default
        self.add_norm_fwd, self.add_norm_out = ops.add_norm_fwd.default, ops.add_norm_out.default
        self.softmax_bwd, self.norm_bwd = ops.softmax_bwd.default, ops.norm_bwd.default
        for name, fake in _FAKES.items():
            torch.library.register_fake(f"{namespace}::{name}")(fake)
        self._eager = {}
        for name, setup, gradients, inputs in (
            ("softmax_fwd", _softmax_setup, _softmax_gradients, ("x", "bias")),
            ("norm_fwd", _norm_setup, _norm_gradients, ("x", "weight", "bias")),
            ("add_norm_fwd", _add_norm_setup, _add_norm_gradients, ("x", "residual", "weight", "bias")),
        ):
            op, gradients = getattr(self, name), functools.partial(gradients, self)
            names = [argument.name for argument in op._schema.arguments]
            positions = [names.index(input) for input in inputs]
            backward = full(gradients, positions, len(names))
            torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup)
            self._eager[name] = eager(op, setup, gradients, positions)

    def differentiable(self, name: str):
        """The forward of that name for a call that wants gradients, by the shortest way that the context allows."""
        return getattr(self, name) if torch.compiler.is_compiling() else self._eager[name]


_FAKES = {
    "softmax_fwd": _fake_softmax_fwd,
    "softmax_out": _fake_softmax_out,
    "softmax_bwd": _fake_softmax_bwd,
    "norm_fwd": _fake_norm_fwd,
    "norm_out": _fake_norm_out,
    "norm_bwd": _fake_norm_bwd,
    "add_norm_fwd": _fake_add_norm_fwd,
    "add_norm_out": _fake_add_norm_out,
}

# By the name of the kernel in dispatch.py. A further backend registers its namespace here.
OPS: dict[str, RowOps] = {}


def register(kernel: str, namespace: str) -> RowOps:
    """Fakes and autograd for the row ops of a namespace; `kernel` is its name in dispatch.py."""
    OPS[kernel] = RowOps(namespace)
    return OPS[kernel]


_triton.define(*_FAKES)
for _module, _names in (
    ("softmax", ("softmax_fwd", "softmax_out")),
    ("softmax_backward", ("softmax_bwd",)),
    ("norm", ("norm_fwd", "norm_out", "add_norm_fwd", "add_norm_out")),
    ("norm_backward", ("norm_bwd",)),
):
    for _name in _names:
        _triton.implement(_name, _module)
register("cpu", "fastattn")
register("triton", _triton.NAMESPACE)
if _cuda_library.loaded():
    register("cuda", _cuda_library.NAMESPACE)
