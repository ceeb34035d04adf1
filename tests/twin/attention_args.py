"""AttentionArgs of csrc/cuda/attention_args.cuh for ctypes, filled from tensors and a lowered mask."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_bool, c_float, c_int32, c_int64, c_uint32, c_void_p

import torch
from torch import Tensor

UNBOUNDED = 1 << 30


class Operand(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]


def _fields(kind, names):
    return [(name, kind) for name in names.split()]


class AttentionArgs(ctypes.Structure):
    _fields_ = [
        *_fields(c_int32, "B Hq Hkv Sq Sk D Dv"),
        *_fields(Operand, "q k v out"),
        ("out_fp32", c_bool),
        ("lse", c_void_p),
        ("scale", c_float),
        *_fields(c_int32, "band_lo band_hi"),
        *_fields(c_void_p, "lo hi"),
        *_fields(c_int64, "lo_batch lo_head lo_row hi_batch hi_head hi_row"),
        *_fields(c_void_p, "block_offsets block_list block_offsets_t block_list_t bit_tiles"),
        *_fields(c_int64, "map_batch map_head map_t_batch map_t_head"),
        ("softcap", c_float),
        ("bias", c_void_p),
        ("bias_fp32", c_bool),
        *_fields(c_int64, "bias_batch bias_head bias_row bias_key"),
        *_fields(c_void_p, "alibi_slopes sinks"),
        *_fields(c_int64, "alibi_batch alibi_head"),
        *_fields(c_void_p, "q_pos k_pos"),
        *_fields(c_int64, "q_pos_batch q_pos_row k_pos_batch k_pos_key"),
        ("dropout_seed", c_void_p),
        ("dropout_threshold", c_uint32),
        ("dropout_scale", c_float),
    ]


class AttentionBwdArgs(AttentionArgs):
    _fields_ = [
        ("dout", Operand),
        *_fields(c_void_p, "dlse exponent delta sink_terms extents"),
        *_fields(Operand, "dq dk dv"),
        ("grads_fp32", c_bool),
        ("dbias", c_void_p),
        ("dbias_fp32", c_bool),
        *_fields(c_int32, "bias_B bias_H bias_Sq bias_Sk"),
        *_fields(c_void_p, "dslopes dsinks"),
    ]


def operand(t: Tensor | None) -> Operand:
    return Operand() if t is None else Operand(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _map_strides(offsets: Tensor) -> tuple[int, int]:
    return tuple(0 if offsets.shape[dim] == 1 else offsets.stride(dim) for dim in (0, 1))


def fill(
    a: AttentionArgs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    lowered=None,
    transposed=None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
) -> AttentionArgs:
    """Fills `a`; the tensors must outlive the call. Shapes as fastattn.reference.attention's, `lowered` a
    fastattn.masks.Lowered, `transposed` its transposed lists, `dropout_seed` int64 of one element.
    """
    a.B, a.Hq, a.Sq, a.D = q.shape
    a.Hkv, a.Sk, a.Dv = k.shape[1], k.shape[2], v.shape[3]
    a.q, a.k, a.v, a.out = (operand(t) for t in (q, k, v, out))
    a.out_fp32 = out.dtype == torch.float32
    a.lse = lse.data_ptr()
    a.scale = 1 / math.sqrt(a.D) if scale is None else scale
    a.band_lo, a.band_hi = -UNBOUNDED, UNBOUNDED
    if lowered is not None:
        if lowered.band_lo is not None:
            a.band_lo = max(lowered.band_lo, -UNBOUNDED)
        if lowered.band_hi is not None:
            a.band_hi = min(lowered.band_hi, UNBOUNDED)
        if lowered.lo is not None:
            a.lo, (a.lo_batch, a.lo_head, a.lo_row) = lowered.lo.data_ptr(), lowered.lo.stride()
        if lowered.hi is not None:
            a.hi, (a.hi_batch, a.hi_head, a.hi_row) = lowered.hi.data_ptr(), lowered.hi.stride()
        if lowered.has_bits:
            a.block_offsets, a.block_list = lowered.block_offsets.data_ptr(), lowered.block_list.data_ptr()
            a.bit_tiles = lowered.bit_tiles.data_ptr()
            a.map_batch, a.map_head = _map_strides(lowered.block_offsets)
            # An empty tensor has no address; the lists are read for no entry then.
            a.block_list = a.block_list or lowered.block_offsets.data_ptr()
        if transposed is not None:
            offsets, blocks = transposed
            a.block_offsets_t, a.block_list_t = offsets.data_ptr(), blocks.data_ptr() or offsets.data_ptr()
            a.map_t_batch, a.map_t_head = _map_strides(offsets)
    a.softcap = softcap
    if bias is not None:
        bias = bias.expand(a.B, a.Hq, a.Sq, a.Sk)
        a.bias, a.bias_fp32 = bias.data_ptr(), bias.dtype == torch.float32
        a.bias_batch, a.bias_head, a.bias_row, a.bias_key = bias.stride()
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(a.B, a.Hq)
        a.alibi_slopes, (a.alibi_batch, a.alibi_head) = slopes.data_ptr(), slopes.stride()
    if sinks is not None:
        a.sinks = sinks.data_ptr()
    for name, positions in (("q_pos", q_pos), ("k_pos", k_pos)):
        if positions is not None:
            positions = positions if positions.dim() == 2 else positions.expand(a.B, -1)
            setattr(a, name, positions.data_ptr())
            setattr(a, f"{name}_batch", positions.stride(0))
            setattr(a, f"{name}_{'row' if name == 'q_pos' else 'key'}", positions.stride(1))
    if dropout_p:
        a.dropout_seed = dropout_seed.data_ptr()
        a.dropout_threshold = min(int(dropout_p * 2**32), 2**32 - 1)
        a.dropout_scale = 1 / (1 - dropout_p)
    return a


def attention_args(q, k, v, out, lse, lowered=None, scale=None, softcap=0.0) -> AttentionArgs:
    """The arguments of one call. The tensors have to outlive it."""
    return fill(AttentionArgs(), q, k, v, out, lse, lowered=lowered, scale=scale, softcap=softcap)
