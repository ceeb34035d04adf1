"""The row ops as torch sees them: fakes with true strides. Outputs are contiguous, whatever x's strides."""

from __future__ import annotations

import math

import torch

from . import _library  # noqa: F401  the op library has to be loaded first


@torch.library.register_fake("fastattn::softmax_fwd")
def _(x, dim, mask, bias, scale, causal, out_fp32):
    return x.new_empty(x.shape, dtype=torch.float32 if out_fp32 else x.dtype)


@torch.library.register_fake("fastattn::softmax_out")
def _(x, dim, mask, bias, scale, causal, out):
    return None


def _stats(x, row_dims: int, rms: bool, needed: bool):
    rows = math.prod(x.shape[: x.dim() - row_dims]) if needed else 0
    return x.new_empty((1 if rms else 3, rows), dtype=torch.float32)


@torch.library.register_fake("fastattn::norm_fwd")
def _(x, row_dims, weight, bias, eps, weight_offset, rms, need_stats):
    return x.new_empty(x.shape), _stats(x, row_dims, rms, need_stats)


@torch.library.register_fake("fastattn::norm_out")
def _(x, row_dims, weight, bias, eps, weight_offset, rms, out):
    return None


@torch.library.register_fake("fastattn::add_norm_fwd")
def _(x, residual, row_dims, weight, bias, eps, weight_offset, rms, sum_dtype, need_stats):
    stats = _stats(x, row_dims, rms, need_stats)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=sum_dtype), stats


@torch.library.register_fake("fastattn::add_norm_out")
def _(x, residual, row_dims, weight, bias, eps, weight_offset, rms, out, sum_out):
    return None
