"""csrc/cuda/attention_args.cuh's AttentionArgs for ctypes, filled from tensors and a lowered mask."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int32, c_int64, c_uint32, c_void_p

from torch import Tensor

UNBOUNDED = 1 << 30


class Matrix(ctypes.Structure):
    """Operand and Result."""

    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]


class AttentionArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("B", "Hq", "Hkv", "Sq", "Sk", "D", "Dv")),
        *((name, Matrix) for name in ("q", "k", "v", "out")),
        ("out_fp32", c_bool),
        ("lse", c_void_p),
        ("scale", c_float),
        ("band_lo", c_int32),
        ("band_hi", c_int32),
        ("lo", c_void_p),
        ("hi", c_void_p),
        *((name, c_int64) for name in ("lo_batch", "lo_head", "lo_row", "hi_batch", "hi_head", "hi_row")),
        *((name, c_void_p) for name in ("block_offsets", "block_list", "block_offsets_t", "block_list_t")),
        ("bit_tiles", c_void_p),
        *((name, c_int64) for name in ("map_batch", "map_head", "map_t_batch", "map_t_head")),
        ("softcap", c_float),
        ("bias", c_void_p),
        ("bias_fp32", c_bool),
        *((name, c_int64) for name in ("bias_batch", "bias_head", "bias_row", "bias_key")),
        ("alibi_slopes", c_void_p),
        ("sinks", c_void_p),
        ("alibi_batch", c_int64),
        ("alibi_head", c_int64),
        ("q_pos", c_void_p),
        ("k_pos", c_void_p),
        *((name, c_int64) for name in ("q_pos_batch", "q_pos_row", "k_pos_batch", "k_pos_key")),
        ("dropout_seed", c_void_p),
        ("dropout_threshold", c_uint32),
        ("dropout_scale", c_float),
    ]


def matrix(x: Tensor) -> Matrix:
    return Matrix(x.data_ptr(), *x.stride()[:3])


def attention_args(q, k, v, out, lse, lowered=None, scale=None, softcap=0.0) -> AttentionArgs:
    """The arguments of one call. The tensors have to outlive it."""
    B, Hq, Sq, D = q.shape
    args = AttentionArgs(B, Hq, k.shape[1], Sq, k.shape[2], D, v.shape[3])
    args.q, args.k, args.v, args.out = (matrix(x) for x in (q, k, v, out))
    args.out_fp32 = out.dtype != q.dtype
    args.lse = lse.data_ptr()
    args.scale = D**-0.5 if scale is None else scale
    args.softcap = softcap
    args.band_lo, args.band_hi = -UNBOUNDED, UNBOUNDED
    if lowered is None:
        return args
    if lowered.band_lo is not None:
        args.band_lo = max(lowered.band_lo, -UNBOUNDED)
    if lowered.band_hi is not None:
        args.band_hi = min(lowered.band_hi, UNBOUNDED)
    for name in ("lo", "hi"):
        bound = getattr(lowered, name)
        if bound is not None:
            setattr(args, name, bound.data_ptr())
            for dim, stride in zip(("batch", "head", "row"), bound.stride()):
                setattr(args, f"{name}_{dim}", stride)
    if lowered.has_bits:
        for name in ("block_offsets", "block_list", "bit_tiles"):
            setattr(args, name, getattr(lowered, name).data_ptr())
        maps_b, maps_h, _ = lowered.block_offsets.shape
        stride = lowered.block_offsets.stride()
        args.map_batch = stride[0] if maps_b > 1 else 0
        args.map_head = stride[1] if maps_h > 1 else 0
    return args
