"""The row ops as torch sees them: fakes with true strides, autograd, second derivatives, vmap.

Outputs are contiguous, whatever x's strides. The forwards below are the differentiable ones; rows.py calls the ops
that write into a given tensor where no gradient is wanted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _library, reference  # noqa: F401  the op library has to be loaded first

_ops = torch.ops.fastattn


@torch.library.register_fake("fastattn::softmax_fwd")
def _(x, dim, mask, bias, scale, causal, out_fp32):
    return x.new_empty(x.shape, dtype=torch.float32 if out_fp32 else x.dtype)


@torch.library.register_fake("fastattn::softmax_out")
def _(x, dim, mask, bias, scale, causal, out):
    return None


@torch.library.register_fake("fastattn::softmax_bwd")
def _(dy, y, dim, bias, scale, x_dtype, needs):
    dx = y.new_empty(y.shape if needs[0] else (0,), dtype=x_dtype)
    if bias is None or not needs[1]:
        return dx, y.new_empty(0, dtype=torch.float32)
    width = y.shape[dim]
    rows = math.prod(size for d, size in enumerate(bias.shape) if d != dim - (y.dim() - bias.dim()))
    return dx, bias.new_empty((rows, width))


def _stats(x: Tensor, row_dims: int, rms: bool) -> Tensor:
    return x.new_empty((1 if rms else 3, math.prod(x.shape[: x.dim() - row_dims])), dtype=torch.float32)


@torch.library.register_fake("fastattn::norm_fwd")
def _(x, row_dims, weight, bias, eps, weight_offset, rms):
    return x.new_empty(x.shape), _stats(x, row_dims, rms)


@torch.library.register_fake("fastattn::norm_out")
def _(x, row_dims, weight, bias, eps, weight_offset, rms, out):
    return None


@torch.library.register_fake("fastattn::add_norm_fwd")
def _(x, residual, row_dims, weight, bias, eps, weight_offset, rms, sum_dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=sum_dtype), _stats(x, row_dims, rms)


@torch.library.register_fake("fastattn::add_norm_out")
def _(x, residual, row_dims, weight, bias, eps, weight_offset, rms, out, sum_out):
    return None


@torch.library.register_fake("fastattn::norm_bwd")
def _(dy, dsum, h, stats, row_dims, weight, bias_dtype, weight_offset, rms, needs):
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


def _softmax_backward(ctx, dy):
    y, *rest = ctx.saved_tensors
    bias = rest[0] if rest else None
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
    dx = dbias = None
    if dy is not None:
        if torch.is_grad_enabled():  # a second derivative is asked for: torch differentiates the formula
            ds = y.float() * (dy.float() - (dy.float() * y.float()).sum(ctx.dim, keepdim=True))
            dx = (ctx.scale * ds).to(ctx.x_dtype) if needs[0] else None
            dbias = _sum_to(ds, bias.shape).to(bias.dtype) if needs[1] else None
        else:
            if ctx.dim == y.dim() - 1:
                dy = as_rows(dy, 1)
            dx, dbias = _ops.softmax_bwd(dy, y, ctx.dim, bias, ctx.scale, ctx.x_dtype, needs)
            dx = dx if needs[0] else None
            dbias = _bias_rows_to_shape(dbias, bias, ctx.dim - y.dim() + bias.dim()) if needs[1] else None
    return dx, None, None, dbias, None, None, None


torch.library.register_autograd("fastattn::softmax_fwd", _softmax_backward, setup_context=_softmax_setup)


def _norm_by_formula(ctx, h, weight, bias, dy, dsum):
    """The gradients of h, weight and bias by torch, of the reference: for second derivatives."""
    row_dims, eps, offset, rms = ctx.options
    shape = h.shape[h.dim() - row_dims :]
    # Nodes of their own: one of the three may be computed from another, or be the same tensor.
    h, weight, bias = inputs = [None if t is None else t.view_as(t) for t in (h, weight, bias)]
    if rms:
        y = reference.rms_norm(h.float(), shape, weight, eps, weight_offset=offset)
    else:
        y = reference.layer_norm(h.float(), shape, weight, bias, eps, weight_offset=offset)
    wanted = [t for t, need in zip(inputs, ctx.needs) if need]
    grads = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=True, materialize_grads=True))
    dh, dweight, dbias = (next(grads) if need else None for need in ctx.needs)
    if dsum is not None and dh is not None:
        dh = dh + dsum
    return dh, dweight, dbias


def _norm_gradients(ctx, h, stats, weight, bias, dy, dsum):
    if dy is None:
        return dsum, None, None
    if torch.is_grad_enabled():
        return _norm_by_formula(ctx, h, weight, bias, dy, dsum)
    row_dims, _, offset, rms = ctx.options
    dy = as_rows(dy, row_dims)
    dsum = None if dsum is None else as_rows(dsum, row_dims)
    bias_dtype = None if bias is None else bias.dtype
    grads = _ops.norm_bwd(dy, dsum, h, stats, row_dims, weight, bias_dtype, offset, rms, ctx.needs)
    return tuple(g if need else None for g, need in zip(grads, ctx.needs))


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


def _norm_backward(ctx, dy, _):
    needs = ctx.needs_input_grad
    ctx.needs = [needs[0], needs[2], needs[3]]
    dx, dweight, dbias = _norm_gradients(ctx, *_saved(ctx), dy, None)
    return dx, None, dweight, dbias, None, None, None


torch.library.register_autograd("fastattn::norm_fwd", _norm_backward, setup_context=_norm_setup)


def _add_norm_setup(ctx, inputs, output):
    x, residual, row_dims, weight, bias, eps, offset, rms, _ = inputs
    ctx.dtypes = (x.dtype, residual.dtype)
    _save(ctx, output[1], output[2], weight, bias, (row_dims, eps, offset, rms))


def _add_norm_backward(ctx, dy, dsum, _):
    needs = ctx.needs_input_grad
    ctx.needs = [needs[0] or needs[1], needs[3], needs[4]]
    dh, dweight, dbias = _norm_gradients(ctx, *_saved(ctx), dy, dsum)
    dx, dresidual = (
        dh.to(dtype) if need and dh is not None else None for dtype, need in zip(ctx.dtypes, needs)
    )
    return dx, dresidual, None, dweight, dbias, None, None, None, None


torch.library.register_autograd("fastattn::add_norm_fwd", _add_norm_backward, setup_context=_add_norm_setup)
