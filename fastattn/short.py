"""The short way of plain calls: one op, with nothing between it and the call but what decides that it serves.

At short sequences a call is largely Python, and more so inside a model: after another layer has had the caches, a line
of Python takes two to three times as long as in a loop of its own. So each question is asked once, by the cheapest
attribute that answers it, and calls that are not plain are left to functional.py before any work is done.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .dispatch import KERNEL_DTYPES, MOST_ROWS
from .eager import applied
from .masks import native

# Looked up once, and below the Python method that would call them.
_plain = torch.ops.fastattn.attention_plain.default._op
_masked = torch.ops.fastattn.attention_masked.default._op
_training = torch.ops.fastattn.attention_training.default._op
_training_bwd = torch.ops.fastattn.attention_training_bwd.default._op
_autocast_enabled = torch.is_autocast_enabled
_grad_enabled = torch.is_grad_enabled
_interpreter = torch._C._functorch.peek_interpreter_stack


class _Training(torch.autograd.Function):
    """A call with ranges of keys [B or 1, 1, 1] or none; further derivatives take the general way."""

    @staticmethod
    def forward(ctx, q, k, v, scale, is_causal, lo, hi):
        out, lse = _training(q, k, v, scale, is_causal, lo, hi)
        ctx.save_for_backward(q, k, v, out, lse, lo, hi)
        ctx.options = scale, is_causal
        return out

    @staticmethod
    def backward(ctx, dout):
        needs = ctx.needs_input_grad[:3]
        if _grad_enabled() or _interpreter() is not None or torch.compiler.is_compiling():
            gradients = _general_gradients(ctx, dout, needs)
        else:
            gradients = _training_bwd(dout, *ctx.saved_tensors, *ctx.options, *needs)
        return *(g if needed else None for g, needed in zip(gradients, needs)), None, None, None, None


_train = applied(_Training)


def _general_gradients(ctx, dout, needs):
    q, k, v, out, lse, lo, hi = ctx.saved_tensors
    scale, is_causal = ctx.options
    lo, hi = (None if t is None else t.expand(q.shape[:3]) for t in (lo, hi))
    given = (dout, None, q, k, v, out, lse, scale, None, 0 if is_causal else None, lo, hi)
    nothing, needs = [None] * 8, [*needs, False, False, False]
    return ops.OPS["cpu"].backward(*given, *nothing[:7], 0.0, 0.0, *nothing, needs, False)


def is_plain(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> bool:
    """Whether these are CPU tensors of one dtype whose shapes fit, with nothing listening and nothing to cast."""
    if torch.compiler.is_compiling() or not (type(q) is type(k) is type(v) is Tensor) or q.is_nested:
        return False
    shape, dtype = q.shape, q.dtype
    keys = k.shape
    if (
        len(shape) != 4
        or v.shape != keys
        or dtype not in KERNEL_DTYPES
        or k.dtype != dtype
        or v.dtype != dtype
    ):
        return False
    if shape[3] == 0 or shape[2] >= MOST_ROWS or not (q.is_cpu and k.is_cpu and v.is_cpu):
        return False
    if keys != shape:
        if len(keys) != 4 or keys[0] != shape[0] or keys[3] != shape[3] or not 0 < keys[2] < MOST_ROWS:
            return False
        if keys[1] != shape[1] and not (gqa is True and keys[1] and shape[1] % keys[1] == 0):
            return False
    return not _autocast_enabled("cpu") and forward_ad._current_level < 0 and _interpreter() is None


def _interval(mask: Tensor, shape: torch.Size, keys: int, dtype: torch.dtype) -> tuple | None:
    """lo and hi of a padding mask [B or 1, 1, 1, keys], each None where it hides nothing on its side; None where the
    keys of a batch item are not one interval."""
    if mask.dtype is not torch.bool and mask.dtype not in (dtype, torch.float32):
        return None
    if mask.shape[1:] != (1, 1, keys) or mask.shape[0] not in (1, shape[0]) or keys < 2 or not shape.numel():
        return None
    if mask.requires_grad:
        if _grad_enabled():
            return None
        mask = mask.detach()
    lo, hi, flags = native.keys(mask)
    if flags & (native.GAPS | native.NONZERO):
        return None
    return None if flags & native.FROM_START else lo, None if flags & native.TO_END else hi


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, gqa: bool
) -> Tensor | None:
    """scaled_dot_product_attention of a call with no mask, a causal one or padding; None where this call is not one."""
    lo = hi = None
    if mask is not None and (is_causal or type(mask) is not Tensor or not mask.is_cpu):
        return None
    if type(is_causal) is not bool or not is_plain(q, k, v, gqa):
        return None
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif type(scale) is not float:
        return None
    if mask is not None:
        # Padding alone, for which short sequences cannot wait until the general way has understood it.
        interval = _interval(mask, q.shape, k.shape[2], q.dtype)
        if interval is None:
            return None
        lo, hi = interval
    if _grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _train(q, k, v, scale, is_causal, lo, hi)
    if mask is None:
        return _plain(q, k, v, scale, is_causal)
    return _masked(q, k, v, scale, None, None, lo, hi, None, None, None)
