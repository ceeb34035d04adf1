"""Softmax, LayerNorm, RMSNorm and their fusions with a residual: what users call, and `explain` for them.

`fastattn.reference` has a function of each name: its specification.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _info, _triton, reference
from .dispatch import KERNEL_DTYPES, ROW_KERNELS, Choice, choose
from .problem import name_of
from .row_ops import OPS, RowOps, as_rows, rows_contiguous
from .row_problem import RowProblem, norm_problem, softmax_problem

__all__ = ["add_layer_norm", "add_rms_norm", "explain", "layer_norm", "rms_norm", "softmax"]

# The plain calls below are the CPU's.
_softmax_out, _norm_out = OPS["cpu"].softmax_out, OPS["cpu"].norm_out
_softmax_with_gradient = OPS["cpu"].differentiable("softmax_fwd")
_norm_with_gradient = OPS["cpu"].differentiable("norm_fwd")
# Results from this size on are blocks that are used again; see csrc/results.h.
_new_result = torch.ops.fastattn._new_result.default
_SMALLEST_BLOCK = torch.ops.fastattn._result_memory()[3]


def softmax(
    x: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax of ``scale * x + bias`` along `dim` over the visible entries, 0 at the hidden ones.

    `torch.softmax` with four arguments more. A row emptied by mask or bias is 0, and so is its gradient; a row whose
    visible entries are all -inf is NaN, as in torch. Sums and exponentials are float32.

    Args:
        x: any shape and strides; float32, bfloat16, float16 (kernels) or float64 (reference).
        dim: the dimension that sums to 1.
        dtype: x is cast to it first, and it is the result's; x's own by default.
        mask: bool, broadcastable to x's shape; True is visible.
        bias: x's dtype or float32, broadcastable to x's shape; -inf hides. Differentiable.
        scale: factor on x.
        causal: row i of the last two dimensions sees entries 0..i; `dim` is the last.
        out: a tensor for the result, of its shape and dtype; may be x itself. Not while an argument requires a
            gradient.
        backend: "cpu", "triton", "cuda" or "reference" forces one; None takes the first that serves the call.

    Returns:
        A tensor of x's shape, contiguous unless `out` is given.

    Raises:
        TypeError, ValueError, IndexError: an argument of a wrong type, dtype, shape or value, named.
        RuntimeError: a forced backend that cannot run the call, with its reason; `out` with a gradient.

    Method: a maximum for each chunk of a row, put together at the end (the online softmax of arXiv:1805.02867).
    """
    if dtype is None and mask is None and bias is None and out is None and not causal:
        if backend is None and _is_plain(x) and type(dim) is int and -x.dim() <= dim < x.dim():
            factor = 1.0 if scale is None else scale
            if _is_finite(factor):
                if _wants_gradient(x):
                    return _softmax_with_gradient(
                        x, dim % x.dim(), None, None, factor, False, x.dtype == torch.float32
                    )
                out = _empty_like(x)
                _softmax_out(x, dim % x.dim(), None, None, factor, False, out)
                return out
    p = softmax_problem(
        x, dim, dtype, mask=mask, bias=bias, scale=scale, causal=causal, out=out, backend=backend
    )
    kernel = choose(p, ROW_KERNELS).kernel.name
    if kernel == "reference":
        y = reference.softmax(p.x, p.dim, p.dtype, mask=p.mask, bias=p.bias, scale=p.scale, causal=p.causal)
        return y if out is None else out.copy_(y)
    return _run_softmax(p, OPS[kernel])


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * (weight + weight_offset) + bias`` over the last dimensions.

    `torch.nn.functional.layer_norm` that takes every mix of dtypes. Statistics are float32, of centred values: they
    survive a mean of a million times the deviation, and values whose squares overflow.

    Args:
        x: [..., *normalized_shape]; float32, bfloat16, float16 (kernels) or float64 (reference). Any strides before
            the normalized dimensions; those are copied once unless they are contiguous.
        normalized_shape: the last dimensions of x, as an int or a sequence.
        weight, bias: of shape normalized_shape, each in any of those dtypes, or None.
        eps: 0 or more.
        weight_offset: added to weight; 1 for zero-centred weights.
        out: a tensor for the result, of x's shape and dtype; may be x itself. Not while an argument requires a
            gradient.
        backend: "cpu", "triton", "cuda" or "reference" forces one; None takes the first that serves the call.

    Returns:
        A tensor of x's shape and dtype, contiguous unless `out` is given.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or value, named.
        RuntimeError: a forced backend that cannot run the call, with its reason; `out` with a gradient.

    Method: two passes over cached chunks of a row, merged pairwise (Chan, Golub and LeVeque, 1983).
    """
    if out is None and backend is None and _is_plain_norm(x, normalized_shape, weight, bias):
        if _is_finite(eps) and eps >= 0.0 and _is_finite(weight_offset):
            return _plain_norm(x, _dims_of(normalized_shape), weight, bias, eps, weight_offset, False)
    return _norm(
        norm_problem(
            "layer_norm",
            x,
            normalized_shape,
            weight,
            bias,
            eps,
            weight_offset=weight_offset,
            out=out,
            backend=backend,
        )
    )


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)`` over the last dimensions (arXiv:1910.07467).

    `torch.nn.functional.rms_norm`; arguments, result and errors are those of `layer_norm`, without bias. `eps` of None
    is the epsilon of the dtype that computes, as in torch: float32's, or float64's for float64. `weight_offset` is 1
    for Gemma's weights.
    """
    if out is None and backend is None and _is_plain_norm(x, normalized_shape, weight):
        epsilon = _EPS if eps is None else eps
        if _is_finite(epsilon) and epsilon >= 0.0 and _is_finite(weight_offset):
            return _plain_norm(x, _dims_of(normalized_shape), weight, None, epsilon, weight_offset, True)
    return _norm(
        norm_problem(
            "rms_norm",
            x,
            normalized_shape,
            weight,
            None,
            eps,
            weight_offset=weight_offset,
            out=out,
            backend=backend,
        )
    )


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    sum_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = x + residual`` and its `layer_norm`, in one pass: (norm in x's dtype, s in `sum_dtype`).

    The norm is that of s as returned, rounded to its dtype: the same as adding first.

    Args:
        residual: of x's shape; any of the dtypes of `layer_norm`.
        sum_dtype: residual's by default. A float32 stream of residuals beside half-precision x loses nothing.
        out, sum_out: tensors for the norm and for s; each may be x or residual itself.
        All others are those of `layer_norm`, and so are the errors.
    """
    return _add_norm(
        norm_problem(
            "add_layer_norm",
            x,
            normalized_shape,
            weight,
            bias,
            eps,
            residual=residual,
            weight_offset=weight_offset,
            sum_dtype=sum_dtype,
            out=out,
            sum_out=sum_out,
            backend=backend,
        )
    )


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    sum_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = x + residual`` and its `rms_norm`, in one pass; everything else as in `add_layer_norm`."""
    return _add_norm(
        norm_problem(
            "add_rms_norm",
            x,
            normalized_shape,
            weight,
            None,
            eps,
            residual=residual,
            weight_offset=weight_offset,
            sum_dtype=sum_dtype,
            out=out,
            sum_out=sum_out,
            backend=backend,
        )
    )


class Explanation:
    """What a row call runs and why; `str()` is for people, the fields for programs.

    kernel: the name of the kernel. refusals: (kernel, reason) of those before it. notes: copies and casts.
    """

    def __init__(self, p: RowProblem, choice: Choice):
        self.kernel = choice.kernel.name
        self.refusals = choice.refusals
        self.notes = list(p.notes)
        self.detail = ""
        if p.device.type == "meta":
            self.notes.append("meta tensors have no values: nothing is computed")
        elif self.kernel == "cpu":
            self.detail = f"{_info.isa()} ({_info.isa_reason()})"
        parts = [p.op, f"x {name_of(p.x.dtype)} {list(p.x.shape)} on {p.device.type}"]
        parts += [f"dim {p.dim}"] if p.op == "softmax" else [f"normalized_shape {list(p.normalized_shape)}"]
        for name, t in (("mask", p.mask), *p.tensors().items()):
            if t is not None and name != "x":
                parts.append(f"{name} {name_of(t.dtype)}")
        parts += ["causal"] * p.causal + ["gradients"] * p.needs_grad()
        self.call = ", ".join(parts)
        if self.kernel == "triton":
            self.detail = _triton_detail(p, self.notes)
        if self.kernel != "reference" and p.op != "softmax":
            for name in ("x", "residual"):
                t = getattr(p, name)
                if t is not None and not rows_contiguous(t, len(p.normalized_shape)):
                    self.notes.append(f"{name} is copied once: its normalized dimensions are not contiguous")

    def __str__(self) -> str:
        lines = [
            f"call     {self.call}",
            f"kernel   {self.kernel}" + (f": {self.detail}" if self.detail else ""),
        ]
        lines += [f"refused  {name}: {reason}" for name, reason in self.refusals]
        lines += [f"note     {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def explain(function, *args, **kwargs) -> Explanation:
    """Which kernel ``function(*args, **kwargs)`` runs, and why each other one refused; runs nothing.

    `function` is one of this module's. Raises what it raises, and TypeError for any other function.
    """
    if function not in (softmax, layer_norm, rms_norm, add_layer_norm, add_rms_norm):
        raise TypeError(
            f"explain knows {', '.join(sorted(set(__all__) - {'explain'}))}, got {function!r:.60}"
        )
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    op = function.__name__
    p = softmax_problem(**call.arguments) if function is softmax else norm_problem(op, **call.arguments)
    return Explanation(p, choose(p, ROW_KERNELS))


def _triton_detail(p: RowProblem, notes: list[str]) -> str:
    """The launch of a Triton kernel; adds to `notes` what it copies."""
    launch = _triton.module("row_launch")
    if p.op != "softmax":
        return str(launch.norm(math.prod(p.normalized_shape)))
    x = _causal_columns(p)
    out = torch.empty(p.x.shape, device="meta") if p.out is None else p.out
    mask, bias = _along(p.mask, p), _along(p.bias, p)
    grid, chosen, _ = _triton.module("softmax").plan(x, p.dim, mask, bias, p.causal, out)
    if grid is None:
        notes.append(f"x is copied with dimension {p.dim} last, and the result back")
    return str(chosen)


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_EPS = torch.finfo(torch.float32).eps


def _is_plain(x: Tensor, *optional: Tensor | None) -> bool:
    """Whether the validation and choice of a call on the CPU would come out as its shortest way."""
    if torch.compiler.is_compiling():
        return False
    for t in (x, *optional):
        if t is None and t is not x:
            continue
        if type(t) not in _PLAIN_TYPES or t.dtype not in KERNEL_DTYPES:
            return False
        if not t.is_cpu or t.is_nested or t.layout is not torch.strided or t.dim() > 9:
            return False
    return forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _plain_norm(x: Tensor, row_dims: int, weight: Tensor | None, bias: Tensor | None, *options) -> Tensor:
    """What `_is_plain_norm` allows."""
    if _wants_gradient(x, weight, bias):
        return _norm_with_gradient(x, row_dims, weight, bias, *options)[0]
    out = _empty_like(x)
    _norm_out(x, row_dims, weight, bias, *options, out)
    return out


def _is_finite(number: float) -> bool:
    return type(number) is float and -math.inf < number < math.inf


def _dims_of(normalized_shape: int | Sequence[int]) -> int:
    return 1 if type(normalized_shape) is int else len(normalized_shape)


def _is_plain_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None = None
) -> bool:
    if not _is_plain(x, weight, bias) or not x.is_contiguous():
        return False
    shape = normalized_shape
    if type(shape) is int:
        shape = (shape,)
    elif not isinstance(shape, (tuple, list)):
        return False
    shape = tuple(shape)
    if not shape or x.shape[-len(shape) :] != shape:
        return False
    return all(t is None or (t.shape == shape and t.is_contiguous()) for t in (weight, bias))


def _empty_like(x: Tensor) -> Tensor:
    """Contiguous, whatever x's strides; x is a plain tensor of the CPU."""
    if x.nbytes >= _SMALLEST_BLOCK:
        return _new_result(x.shape, x.dtype)
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)


def _functional(p: RowProblem) -> bool:
    """Whether the op has to be a function, for autograd or the compiler. Else it writes into a tensor made here, at
    less than half of the cost."""
    return torch.compiler.is_compiling() or p.needs_grad()


def _new(p: RowProblem, dtype: torch.dtype) -> Tensor:
    if type(p.x) is Tensor and p.x.is_cpu and p.x.numel() * dtype.itemsize >= _SMALLEST_BLOCK:
        return _new_result(p.x.shape, dtype)
    return torch.empty(p.x.shape, dtype=dtype, device=p.x.device)


def _along(t: Tensor | None, p: RowProblem) -> Tensor | None:
    """A mask or bias with x's size along dim and its elements side by side there, as the kernel reads it."""
    if t is None:
        return None
    width, behind = p.x.shape[p.dim], p.x.dim() - p.dim  # how far dim is from the end
    if t.dim() < behind:
        t = t[(None,) * (behind - t.dim())]
    at = t.dim() - behind
    if t.shape[at] != width:
        t = t.expand(*t.shape[:at], width, *t.shape[at + 1 :])
    if t.stride(at) != 1 and width > 1:
        t = t.movedim(at, -1).contiguous().movedim(-1, at)
    return t


def _causal_columns(p: RowProblem) -> Tensor:
    """x, or a copy with its last stride 1 where the kernel wants that."""
    x = p.x
    return x.contiguous() if p.causal and x.stride(-1) != 1 and x.shape[-1] > 1 else x


def _run_softmax(p: RowProblem, ops: RowOps) -> Tensor:
    x = _causal_columns(p)
    scale = 1.0 if p.scale is None else p.scale
    arguments = (x, p.dim, _along(p.mask, p), _along(p.bias, p), scale, p.causal)
    if p.out is None and _functional(p):
        return ops.differentiable("softmax_fwd")(*arguments, p.dtype == torch.float32)
    out = _new(p, p.dtype) if p.out is None else p.out
    if p.causal and out.stride(-1) != 1 and out.shape[-1] > 1:
        return out.copy_(ops.softmax_fwd(*arguments, p.dtype == torch.float32))
    ops.softmax_out(*arguments, out)
    return out


def _norm_arguments(p: RowProblem) -> tuple:
    row_dims = len(p.normalized_shape)
    weight = None if p.weight is None else p.weight.contiguous()
    bias = None if p.bias is None else p.bias.contiguous()
    return row_dims, weight, bias, p.eps, p.weight_offset, p.rms


def _norm(p: RowProblem) -> Tensor:
    kernel = choose(p, ROW_KERNELS).kernel.name
    if kernel == "reference":
        extra = () if p.rms else (p.bias,)
        y = getattr(reference, p.op)(
            p.x, p.normalized_shape, p.weight, *extra, p.eps, weight_offset=p.weight_offset
        )
        return y if p.out is None else p.out.copy_(y)
    ops, arguments, row_dims = OPS[kernel], _norm_arguments(p), len(p.normalized_shape)
    x = as_rows(p.x, row_dims)
    if p.out is None and _functional(p):
        return ops.differentiable("norm_fwd")(x, *arguments)[0]
    out = _new(p, p.x.dtype) if p.out is None else p.out
    if rows_contiguous(out, row_dims):
        ops.norm_out(x, *arguments, out)
        return out
    return out.copy_(ops.norm_fwd(x, *arguments)[0])


def _add_norm(p: RowProblem) -> tuple[Tensor, Tensor]:
    kernel = choose(p, ROW_KERNELS).kernel.name
    if kernel == "reference":
        extra = () if p.rms else (p.bias,)
        y, total = getattr(reference, p.op)(
            p.x,
            p.residual,
            p.normalized_shape,
            p.weight,
            *extra,
            p.eps,
            weight_offset=p.weight_offset,
            sum_dtype=p.sum_dtype,
        )
        return _store(y, p.out), _store(total, p.sum_out)
    ops, arguments, row_dims = OPS[kernel], _norm_arguments(p), len(p.normalized_shape)
    x, residual = as_rows(p.x, row_dims), as_rows(p.residual, row_dims)
    outs = [t for t in (p.out, p.sum_out) if t is not None]
    if (not outs and _functional(p)) or not all(rows_contiguous(t, row_dims) for t in outs):
        y, total, _ = ops.differentiable("add_norm_fwd")(x, residual, *arguments, p.sum_dtype)
        return _store(y, p.out), _store(total, p.sum_out)
    out = _new(p, p.x.dtype) if p.out is None else p.out
    sum_out = _new(p, p.sum_dtype) if p.sum_out is None else p.sum_out
    ops.add_norm_out(x, residual, *arguments, out, sum_out)
    return out, sum_out


def _store(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)
