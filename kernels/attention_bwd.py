"""Attention backward: gradients of q, k, v, bias, ALiBi slopes and sinks.

A pass over rows first (attention_bwd_rows.py), then those of attention_bwd_passes.py that a call's gradients need.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton
from ..ops import output_like
from . import launch
from .attention_bwd_passes import BIAS, KEYS, QUERIES, SHIFTS, backward_kernel
from .attention_bwd_rows import ROW_WARPS, row_kernel
from .attention_call import (
    clamp_band,
    columns_adjacent,
    dropout_scalars,
    in_units,
    precision,
    refuse_caches,
    strides_of,
)
from .online_softmax import LOG2E


def _gradient_like(x: Tensor, needed: bool, fp32: bool) -> Tensor:
    """Uninitialised, x's shape and order of heads and rows; of no elements where it is not needed."""
    dtype = torch.float32 if fp32 else x.dtype
    return output_like(x, x.shape[3], dtype) if needed else x.new_empty(0, dtype=dtype)


def _reduced(sums: Tensor, like: Tensor) -> Tensor:
    """float32 sums added up over the dimensions of 1 of `like`, in its shape."""
    dims = [d for d, size in enumerate(like.shape) if size == 1 and sums.shape[d] != 1]
    return sums.sum(dims, keepdim=True) if dims else sums


def attention_bwd(
    dout, dlse, q, k, v, out, lse, scale, band_lo, band_hi, lo, hi, block_offsets, block_list, block_offsets_t,
    block_list_t, bit_tiles, bias, alibi_slopes, softcap, dropout_p, dropout_seed, q_pos, k_pos, block_table,
    kv_lengths, k_scale, v_scale, sinks, needs, grads_fp32,
):  # fmt: skip
    """The op; arguments and results as in csrc/ops.cpp."""
    refuse_caches(block_table, kv_lengths, k_scale, v_scale)
    if block_offsets is not None and (block_offsets_t is None or block_list_t is None):
        raise ValueError("fastattn: the backward needs block_offsets_t and block_list_t")
    if _triton.interpreted() and q.dtype == torch.bfloat16:
        # Triton's interpreter computes wrongly in bfloat16.
        wide = [t.float() for t in (q, k, v, out)]
        results = attention_bwd(
            dout.float(), dlse, *wide, lse, scale, band_lo, band_hi, lo, hi, block_offsets, block_list, block_offsets_t,
            block_list_t, bit_tiles, None if bias is None else bias.float(), alibi_slopes, softcap, dropout_p,
            dropout_seed, q_pos, k_pos, None, None, None, None, sinks, needs, grads_fp32,
        )  # fmt: skip
        return tuple(
            g if grads_fp32 or t is None else g.to(t.dtype)
            for g, t in zip(results, (q, k, v, bias, alibi_slopes, sinks), strict=True)
        )

    B, Hq, Sq, D = q.shape
    Hkv, Sk, DV = k.shape[1], k.shape[2], v.shape[3]
    needs_q, needs_k, needs_v = needs[:3]
    needs_bias, needs_slopes, needs_sinks = (
        need and t is not None for need, t in zip(needs[3:], (bias, alibi_slopes, sinks), strict=True)
    )
    dq, dk, dv = (_gradient_like(t, n, grads_fp32) for t, n in zip((q, k, v), needs, strict=False))
    dbias = (q if bias is None else bias).new_empty(
        bias.shape if needs_bias else 0, dtype=torch.float32 if grads_fp32 else None
    )
    dslopes = lse.new_empty(alibi_slopes.shape if needs_slopes else 0)
    dsinks = lse.new_empty(sinks.shape if needs_sinks else 0)
    results = (dq, dk, dv, dbias, dslopes, dsinks)
    if B * Hq * Sq * Sk == 0:
        for t in results:
            t.zero_()
        return results

    q, k, v, out, dout_as_out = (columns_adjacent(t) for t in (q, k, v, out, dout))
    dout = dout_as_out.to(q.dtype)
    lse = lse.contiguous()
    bits, cells = block_offsets is not None, (B, Hq, Sq)
    ranges = not (band_lo is band_hi is lo is hi is None)
    group = Hq // Hkv
    BLOCK_D, BLOCK_DV = (max(16, 1 << (size - 1).bit_length()) if size else 16 for size in (D, DV))
    arch = launch.architecture(q.device)
    plain = not softcap and bias is None and alibi_slopes is None
    keys, queries, tiles = (
        launch.attention_bwd(
            arch, q.element_size(), max(BLOCK_D, BLOCK_DV), bits, not plain or dropout_p > 0, which
        )
        for which in ("keys", "queries", "bias")
    )
    band = (clamp_band(band_lo, -(2**30), Sq + Sk), clamp_band(band_hi, 2**30, Sq + Sk))
    bounds = (lo, *strides_of(lo, cells), hi, *strides_of(hi, cells))

    def blocks_of(size: int, block: int) -> int:
        return -(-size // block)

    n_rows = blocks_of(Sq, keys.M)
    exponent, delta = lse.new_empty(cells), lse.new_empty(cells)
    extents = None
    if lo is not None or hi is not None:
        extents = torch.empty(B, Hq, n_rows, 4, dtype=torch.int32, device=q.device)
    sink_parts = lse.new_empty(B, Hq, n_rows) if needs_sinks else None
    unit, strides = in_units(out, dout_as_out)
    row_kernel[(B * Hq * n_rows,)](
        out, *strides[:3], dout_as_out, *strides[3:], lse, None if dlse is None else
        dlse.float().contiguous(), sinks, exponent, delta, sink_parts, extents, Hq, Sq, Sk, n_rows, *band, *bounds,
        LOG2E if plain else 1.0, UNIT=unit, DV=DV, BLOCK_DV=BLOCK_DV, M=keys.M, num_warps=ROW_WARPS,
    )  # fmt: skip

    by_key = needs_bias and bias.shape[2] == 1 and bias.shape[3] > 1
    by_row = needs_bias and bias.shape[3] == 1
    column_sums = lse.new_empty(B, Hq, 1, Sk) if by_key else None
    row_sums = lse.new_empty(B, Hq, Sq, 1) if by_row else None
    distance_sums = lse.new_empty(B, Hq, Sq) if needs_slopes else None
    threshold, keep_scale = dropout_scalars(dropout_p)
    outputs = (t if n else q for t, n in ((dq, needs_q), (dk, needs_k), (dv, needs_v)))
    unit, strides = in_units(q, k, v, dout, *outputs)

    def run(programs: int, which: int, tile: launch.AttentionLaunch, n_blocks: int, *, shift=None, gradients=(),
            sums=(None, None, None), transposed=False, n_rows=0):  # fmt: skip
        grads = [
            g if name in gradients else None
            for name, g in zip(("q", "k", "v", "bias"), results, strict=False)
        ]
        offsets, entries = (block_offsets_t, block_list_t) if transposed else (block_offsets, block_list)
        backward_kernel[(programs,)](
            q, k, v, dout, exponent, delta, shift, extents, *grads, *sums, *strides, B, Hq, group, Sq, Sk, n_blocks,
            n_rows, float(scale) * (LOG2E if plain else 1.0), float(scale), float(softcap), *band, *bounds,
            offsets, *strides_of(offsets, (B, Hq)), entries, bit_tiles,
            bias, *strides_of(bias, (B, Hq, Sq, Sk)), *(bias.shape[:2] if bias is not None else (1, 1)),
            alibi_slopes, *strides_of(alibi_slopes, (B, Hq)),
            dropout_seed if dropout_p else None, threshold, keep_scale,
            q_pos, *strides_of(q_pos, (B, Sq)), k_pos, *strides_of(k_pos, (B, Sk)),
            PASS=which.value, D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, M=tile.M, N=tile.N,
            CHUNK=tile.chunk, UNIT=unit, PLAIN=plain, HAS_SOFTCAP=bool(softcap),
            RANGES=ranges, PRECISION=precision() if q.dtype == torch.float32 else None,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    m_blocks, n_blocks = blocks_of(Sq, queries.M), blocks_of(Sk, keys.N)
    shift = None
    if bias is not None:
        shift = torch.zeros_like(exponent)
        # Reads the extreme rows alone, of which there seldom are any.
        run(B * Hq * m_blocks, SHIFTS, queries, m_blocks, sums=(shift, None, None))
    if needs_q or by_row or needs_slopes:
        run(B * Hq * m_blocks, QUERIES, queries, m_blocks, shift=shift, gradients=("q",) * needs_q,
            sums=(row_sums, distance_sums, None))  # fmt: skip
    if needs_k or needs_v or by_key:
        wanted = ("k",) * needs_k + ("v",) * needs_v
        run(B * Hkv * n_blocks, KEYS, keys, n_blocks, shift=shift, gradients=wanted, sums=(None, None, column_sums),
            transposed=True, n_rows=n_rows)  # fmt: skip
    if needs_bias and not (by_key or by_row):
        bias_rows, blocks_k = blocks_of(Sq, tiles.M), blocks_of(Sk, tiles.N)
        programs = bias.shape[0] * bias.shape[1] * bias_rows * blocks_k
        run(programs, BIAS, tiles, blocks_k, shift=shift, gradients=("bias",), n_rows=bias_rows)
    elif needs_bias:
        dbias.copy_(_reduced(column_sums if by_key else row_sums, bias))
    if needs_slopes:
        dslopes.copy_(-_reduced(distance_sums.sum(-1), alibi_slopes))
    if needs_sinks:
        dsinks.copy_(sink_parts.sum((0, 2)))
    return results
