"""Attention backward: gradients of q, k, v, bias, ALiBi slopes and sinks; the tile's arithmetic is in
attention_bwd_tile.py, the pass over rows before all others in attention_bwd_rows.py.

    keys      dK, dV of a block of keys: the query heads of its group one after another, for each the blocks of rows
              that see it; also dS summed over rows, for a bias without rows
    queries   dQ of a block of rows, over the blocks of keys that it sees; also dS summed over keys, plain for a bias
              without keys and times |q_pos - k_pos| for the slopes
    bias      dS of one block, summed over what the bias broadcasts over

Every pass computes P and dS once more, so that each result has one program that writes it: no atomics, one order of
every sum, the same bits at each repeat. Limits: head sizes up to 256, padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from ..ops import output_like
from . import launch
from .attention_bwd_rows import row_kernel, rows_that_see
from .attention_bwd_tile import gradients, head_of, key_places, row_values
from .attention_call import (
    clamp_band,
    columns_adjacent,
    dropout_scalars,
    in_units,
    precision,
    refuse_caches,
    strides_of,
)
from .mask import FAR, GRANULE, blocks, edge, extent, find
from .online_softmax import LOG2E
from .tiles import load_part, store_part

# Beyond this float32 holds an LSE to a thirty-second and worse.
EXTREME = tl.constexpr(1e6)


@triton.jit
def load_rows(p, o, stride, m, WIDTH: tl.constexpr, D: tl.constexpr):
    return load_part(p, o.to(tl.int64), stride, m, 0, WIDTH, D, True)


@triton.jit
def keys_pass(
    call, b_seed, sums, outputs, lists, k, v, k_row, v_row, i_b, i_kv, n_block, group, band_lo, band_hi, n_rows,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEEDS_K: tl.constexpr, NEEDS_V: tl.constexpr,
    RANGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    extents, column_sums = sums
    dk, dk_batch, dk_head, dk_row, dk_scale, dv, dv_batch, dv_head, dv_row = outputs
    block_offsets, map_batch, map_head, block_list, bit_tiles = lists
    q, _, _, q_row, dout, _, _, dout_row = call[0]
    Hq, Sq, Sk = call[6]
    first = n_block * N
    end = tl.minimum(first + N, Sk)
    o_j = first + tl.arange(0, N)
    m_j = o_j < Sk
    b_k = load_rows(k, o_j, k_row, m_j, BLOCK_D, D)
    b_v = load_rows(v, o_j, v_row, m_j, BLOCK_DV, DV)
    acc_k = tl.zeros([N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([N, BLOCK_DV], tl.float32)
    for g in tl.range(0, group):
        i_h = i_kv * group + g
        plane = i_b.to(tl.int64) * Hq + i_h
        head = head_of(call, i_b, i_h)
        p_q, p_dout = q + head[0], dout + head[1]
        b_k_pos = key_places(call, head, o_j)
        column = tl.zeros([N], tl.float32)
        p_extents = None
        if extents is not None:
            p_extents = extents + plane * n_rows * 4
        start, full, full_end, stop = 0, 0, 0, n_rows
        if RANGES:
            start, full, full_end, stop = rows_that_see(
                first, end, p_extents, n_rows, band_lo, band_hi, Sq, M
            )
        elif block_list is None:
            full_end = n_rows
        n_edge = full - start + stop - full_end
        if block_list is not None:
            p_map = (
                block_offsets + i_b.to(tl.int64) * map_batch + i_h.to(tl.int64) * map_head + first // GRANULE
            )
            entry, entry_end = tl.load(p_map), tl.load(p_map + 1)
            if RANGES:
                entry = find(block_list, entry, entry_end, start * M // GRANULE)
                entry_end = find(block_list, entry, entry_end, tl.cdiv(stop * M, GRANULE))
        for PHASE in tl.static_range(2 if block_list is None else 1):
            if block_list is not None:
                t_start, t_end = entry * (GRANULE // M), entry_end * (GRANULE // M)
            elif PHASE == 0:
                t_start, t_end = full, full_end
            else:
                t_start, t_end = full * 0, n_edge
            for t in tl.range(t_start, t_end):
                tile = 0
                if block_list is not None:
                    e = tl.zeros([], tl.int64) + t
                    p_entry = block_list + e // (GRANULE // M) * 2
                    m_block = tl.load(p_entry) * (GRANULE // M) + (e % (GRANULE // M)).to(tl.int32)
                    tile = tl.load(p_entry + 1)
                elif PHASE == 0:
                    m_block = t
                else:
                    m_block = edge(t, start, full, full_end)
                MASKED: tl.constexpr = PHASE == 1 or block_list is not None or not PLAIN
                o_i = m_block * M + tl.arange(0, M)
                rows = row_values(call, head, band_lo, band_hi, o_i, 512 // M)
                m_i = o_i < Sq
                b_q = load_rows(p_q, o_i, q_row, m_i, BLOCK_D, D)
                b_do = load_rows(p_dout, o_i, dout_row, m_i, BLOCK_DV, DV)
                b_p, b_ds, b_dscore, m_seen, distance = gradients(
                    call, head, rows, b_seed, b_q, b_do, b_k, b_v, o_i, o_j, b_k_pos, bit_tiles, tile, i_b, i_h,
                    PLAIN, HAS_SOFTCAP, MASKED, True, M, N, False, PRECISION,
                )  # fmt: skip
                if NEEDS_V:
                    acc_v = tl.dot(b_p.to(b_do.dtype), b_do, acc_v, input_precision=PRECISION)
                if NEEDS_K:
                    acc_k = tl.dot(b_dscore.to(b_q.dtype), b_q, acc_k, input_precision=PRECISION)
                if column_sums is not None:
                    column += tl.sum(b_ds, 1)
        if column_sums is not None:
            tl.store(column_sums + plane * Sk + o_j, column, mask=m_j)
    o, b64, h64 = o_j.to(tl.int64), i_b.to(tl.int64), i_kv.to(tl.int64)
    if NEEDS_K:
        store_part(dk + b64 * dk_batch + h64 * dk_head, o * dk_row, m_j, acc_k * dk_scale, 0, BLOCK_D, D)
    if NEEDS_V:
        store_part(dv + b64 * dv_batch + h64 * dv_head, o * dv_row, m_j, acc_v, 0, BLOCK_DV, DV)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def keys_seen(o_j, seen_lo, seen_hi, bit_tiles, tile, o_i, m_seen, bias):
    """bool [N]: all keys that some row of a block sees; what the others hold must not reach a product.

    From the mask itself only where there is a bias: to reduce a tile takes many registers."""
    m_key = (o_j >= seen_lo) & (o_j < seen_hi)
    if bias is not None:
        m_key = tl.max(m_seen.to(tl.int32), 0) > 0
    elif bit_tiles is not None:
        p = bit_tiles + tile.to(tl.int64) * GRANULE + o_i % GRANULE
        words = tl.reduce(tl.load(p, mask=o_i >= tl.where(tile < 0, FAR, 0), other=-1), 0, either)
        m_key = m_key & (((words >> (o_j % GRANULE)) & 1) != 0)
    return m_key


@triton.jit
def queries_pass(
    call, b_seed, outputs, lists, k, v, k_row, v_row, i_b, i_h, m_block, band_lo, band_hi,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEEDS_Q: tl.constexpr, RANGES: tl.constexpr,
    EXTREMES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With EXTREMES the one result is the shift of rows whose LSE has lost the logarithm of their number of keys."""
    dq, dq_batch, dq_head, dq_row, dq_scale, row_sums, distance_sums = outputs
    block_offsets, map_batch, map_head, block_list, bit_tiles = lists
    q, _, _, q_row, dout, _, _, dout_row = call[0]
    _, Sq, Sk = call[6]
    o_i = m_block * M + tl.arange(0, M)
    m_i = o_i < Sq
    head = head_of(call, i_b, i_h)
    p_q, p_dout = q + head[0], dout + head[1]
    rows = row_values(call, head, band_lo, band_hi, o_i, 1)
    b_q = load_rows(p_q, o_i, q_row, m_i, BLOCK_D, D)
    b_do = load_rows(p_dout, o_i, dout_row, m_i, BLOCK_DV, DV)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    distance_sum = tl.zeros([M], tl.float32)
    seen_lo, seen_hi, all_lo, all_hi = extent(rows[3], rows[4], m_i)
    if EXTREMES:
        extreme = m_i & (tl.abs(rows[0]) > EXTREME) & (rows[0] != float("inf"))
        if tl.max(extreme.to(tl.int32), 0) == 0:
            seen_lo, seen_hi = 0, 0
    start, full, full_end, stop = blocks(seen_lo, seen_hi, all_lo, all_hi, N)
    n_edge = full - start + stop - full_end
    if block_list is not None:
        p_map = (
            block_offsets
            + i_b.to(tl.int64) * map_batch
            + i_h.to(tl.int64) * map_head
            + m_block * M // GRANULE
        )
        entry, entry_end = tl.load(p_map), tl.load(p_map + 1)
        if RANGES or EXTREMES:
            entry = find(block_list, entry, entry_end, start * N // GRANULE)
            entry_end = find(block_list, entry, entry_end, tl.cdiv(stop * N, GRANULE))
    for PHASE in tl.static_range(2 if block_list is None else 1):
        if block_list is not None:
            t_start, t_end = entry * (GRANULE // N), entry_end * (GRANULE // N)
        elif PHASE == 0:
            t_start, t_end = full, full_end
        else:
            t_start, t_end = full * 0, n_edge
        for t in tl.range(t_start, t_end):
            tile = 0
            if block_list is not None:
                e = tl.zeros([], tl.int64) + t
                p_entry = block_list + e // (GRANULE // N) * 2
                n_block = tl.load(p_entry) * (GRANULE // N) + (e % (GRANULE // N)).to(tl.int32)
                tile = tl.load(p_entry + 1)
            elif PHASE == 0:
                n_block = t
            else:
                n_block = edge(t, start, full, full_end)
            MASKED: tl.constexpr = PHASE == 1 or block_list is not None or not PLAIN
            o_j = n_block * N + tl.arange(0, N)
            m_j = o_j < Sk
            b_k = load_rows(k, o_j, k_row, m_j, BLOCK_D, D)
            b_v = load_rows(v, o_j, v_row, m_j, BLOCK_DV, DV)
            b_k_pos = key_places(call, head, o_j)
            b_p, b_ds, b_dscore, m_seen, distance = gradients(
                call, head, rows, b_seed, b_q, b_do, b_k, b_v, o_i, o_j, b_k_pos, bit_tiles, tile, i_b, i_h,
                PLAIN, HAS_SOFTCAP, MASKED, False, M, N, EXTREMES, PRECISION,
            )  # fmt: skip
            if EXTREMES:
                row_sum += tl.sum(b_p, 1)
            else:
                if NEEDS_Q:
                    if MASKED:
                        m_key = keys_seen(o_j, seen_lo, seen_hi, bit_tiles, tile, o_i, m_seen, call[3][0])
                        b_k = tl.where(m_key[:, None], b_k, 0.0).to(b_k.dtype)
                    acc = tl.dot(b_dscore.to(b_k.dtype), b_k, acc, input_precision=PRECISION)
                if row_sums is not None:
                    row_sum += tl.sum(b_ds, 1)
                if distance_sums is not None:
                    distance_sum += tl.sum(b_ds * distance, 1)
    o = head[2] + o_i
    if EXTREMES:
        # The probabilities of a row add up to 1, or to less where the call is one chunk of many.
        tl.store(row_sums + o, tl.where(row_sum > 1.5, tl.log2(row_sum), 0.0), mask=m_i)
    else:
        if NEEDS_Q:
            p_dq = dq + i_b.to(tl.int64) * dq_batch + i_h.to(tl.int64) * dq_head
            store_part(p_dq, o_i.to(tl.int64) * dq_row, m_i, acc * dq_scale, 0, BLOCK_D, D)
        if row_sums is not None:
            tl.store(row_sums + o, row_sum, mask=m_i)
        if distance_sums is not None:
            tl.store(distance_sums + o, distance_sum, mask=m_i)


@triton.jit
def bias_pass(
    call, b_seed, dbias, lists, k, k_batch, k_head, k_row, v, v_batch, v_head, v_row, first_b, n_b, first_h, n_h,
    m_block, n_block, group, band_lo, band_hi,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block_offsets, map_batch, map_head, block_list, bit_tiles = lists
    q, _, _, q_row, dout, _, _, dout_row = call[0]
    _, Sq, Sk = call[6]
    o_i = m_block * M + tl.arange(0, M)
    o_j = n_block * N + tl.arange(0, N)
    m_i, m_j = o_i < Sq, o_j < Sk
    acc = tl.zeros([M, N], tl.float32)
    for t in tl.range(0, n_b * n_h):
        i_b, i_h = first_b + t // n_h, first_h + t % n_h
        head = head_of(call, i_b, i_h)
        rows = row_values(call, head, band_lo, band_hi, o_i, 1)
        seen_lo, seen_hi, all_lo, all_hi = extent(rows[3], rows[4], m_i)
        sees = (seen_lo < n_block * N + N) & (seen_hi > n_block * N)
        tile = 0
        if block_list is not None:
            p_map = (
                block_offsets
                + i_b.to(tl.int64) * map_batch
                + i_h.to(tl.int64) * map_head
                + m_block * M // GRANULE
            )
            last = tl.load(p_map + 1)
            entry = find(block_list, tl.load(p_map), last, n_block * N // GRANULE)
            found = entry < last
            granule = tl.load(block_list + 2 * entry.to(tl.int64), mask=found, other=-1)
            tile = tl.load(block_list + 2 * entry.to(tl.int64) + 1, mask=found, other=0)
            sees = sees & (granule == n_block * N // GRANULE)
        if sees:
            p_q, p_dout = q + head[0], dout + head[1]
            i_kv = (i_h // group).to(tl.int64)
            b_q = load_rows(p_q, o_i, q_row, m_i, BLOCK_D, D)
            b_do = load_rows(p_dout, o_i, dout_row, m_i, BLOCK_DV, DV)
            b_k = load_rows(k + i_b.to(tl.int64) * k_batch + i_kv * k_head, o_j, k_row, m_j, BLOCK_D, D)
            b_v = load_rows(v + i_b.to(tl.int64) * v_batch + i_kv * v_head, o_j, v_row, m_j, BLOCK_DV, DV)
            b_k_pos = key_places(call, head, o_j)
            b_p, b_ds, b_dscore, m_seen, distance = gradients(
                call, head, rows, b_seed, b_q, b_do, b_k, b_v, o_i, o_j, b_k_pos, bit_tiles, tile, i_b, i_h,
                False, HAS_SOFTCAP, True, False, M, N, False, PRECISION,
            )  # fmt: skip
            acc += b_ds
    o = o_i.to(tl.int64)[:, None] * Sk + o_j[None, :]
    tl.store(dbias + o, acc.to(dbias.dtype.element_ty), mask=m_i[:, None] & m_j[None, :])


KEYS, QUERIES, BIAS, SHIFTS = (tl.constexpr(n) for n in range(4))

_STRIDES = [
    *(f"{t}_{s}" for t in ("q", "k", "v", "dout", "dq", "dk", "dv") for s in ("batch", "head", "row")),
    *(f"{t}_{s}" for t in ("lo", "hi") for s in ("batch", "head", "row")),
    *("map_batch", "map_head", "bias_batch", "bias_head", "bias_row", "bias_key", "alibi_batch", "alibi_head"),
    *("q_pos_batch", "q_pos_row", "k_pos_batch", "k_pos_key"),
]  # fmt: skip
_COUNTS = ["Hq", "group", "Sq", "Sk", "n_blocks", "n_rows", "bias_B", "bias_H", "B"]
_INTS = [*_STRIDES, *_COUNTS, "band_lo", "band_hi", "threshold"]


@triton.jit(do_not_specialize=_INTS)
def backward_kernel(
    q, k, v, dout, exponent, delta, shift, extents, dq, dk, dv, dbias, row_sums, distance_sums, column_sums,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    dout_batch: tl.int64, dout_head: tl.int64, dout_row: tl.int64,
    dq_batch: tl.int64, dq_head: tl.int64, dq_row: tl.int64, dk_batch: tl.int64, dk_head: tl.int64, dk_row: tl.int64,
    dv_batch: tl.int64, dv_head: tl.int64, dv_row: tl.int64,
    B: tl.int32, Hq: tl.int32, group: tl.int32, Sq: tl.int32, Sk: tl.int32, n_blocks: tl.int32, n_rows: tl.int32,
    scale: tl.float32, gradient_scale: tl.float32, softcap: tl.float32, band_lo: tl.int32, band_hi: tl.int32,
    lo, lo_batch: tl.int64, lo_head: tl.int64, lo_row: tl.int64,
    hi, hi_batch: tl.int64, hi_head: tl.int64, hi_row: tl.int64,
    block_offsets, map_batch: tl.int64, map_head: tl.int64, block_list, bit_tiles,
    bias, bias_batch: tl.int64, bias_head: tl.int64, bias_row: tl.int64, bias_key: tl.int64,
    bias_B: tl.int32, bias_H: tl.int32,
    alibi, alibi_batch: tl.int64, alibi_head: tl.int64,
    seed, threshold: tl.int32, keep_scale: tl.float32,
    q_pos, q_pos_batch: tl.int64, q_pos_row: tl.int64, k_pos, k_pos_batch: tl.int64, k_pos_key: tl.int64,
    PASS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr, PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    RANGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program of a pass. Lists of blocks are the transposed ones for KEYS. n_rows: blocks of rows."""
    pid = tl.program_id(0)
    # Strides of operands and gradients come in units of UNIT elements, 16 bytes: so the compiler sees what they are.
    q_batch, q_head, q_row = q_batch * UNIT, q_head * UNIT, q_row * UNIT
    k_batch, k_head, k_row = k_batch * UNIT, k_head * UNIT, k_row * UNIT
    v_batch, v_head, v_row = v_batch * UNIT, v_head * UNIT, v_row * UNIT
    dout_batch, dout_head, dout_row = dout_batch * UNIT, dout_head * UNIT, dout_row * UNIT
    dq_batch, dq_head, dq_row = dq_batch * UNIT, dq_head * UNIT, dq_row * UNIT
    dk_batch, dk_head, dk_row = dk_batch * UNIT, dk_head * UNIT, dk_row * UNIT
    dv_batch, dv_head, dv_row = dv_batch * UNIT, dv_head * UNIT, dv_row * UNIT
    call = (
        (q, q_batch, q_head, q_row, dout, dout_batch, dout_head, dout_row),
        (exponent, delta, shift),
        (lo, lo_batch, lo_head, lo_row, hi, hi_batch, hi_head, hi_row),
        (bias, bias_batch, bias_head, alibi, alibi_batch, alibi_head),
        (q_pos, q_pos_batch, q_pos_row, k_pos, k_pos_batch, k_pos_key),
        (scale, softcap, bias_row, bias_key, seed, threshold, keep_scale),
        (Hq, Sq, Sk),
    )
    lists = (block_offsets, map_batch, map_head, block_list, bit_tiles)
    b_seed = tl.zeros([], tl.int64)
    if seed is not None:
        b_seed = tl.load(seed)
    if PASS == BIAS:
        n_block = pid % n_blocks
        m_block = pid // n_blocks % n_rows
        plane = pid // n_blocks // n_rows
        map_b, map_h = plane // bias_H, plane % bias_H
        first_b, n_b = map_b, 1
        if bias_B < B:
            first_b, n_b = map_b * 0, B
        first_h, n_h = map_h, 1
        if bias_H < Hq:
            first_h, n_h = map_h * 0, Hq
        bias_pass(
            call, b_seed, dbias + plane.to(tl.int64) * Sq * Sk, lists, k, k_batch, k_head, k_row, v, v_batch, v_head,
            v_row, first_b, n_b, first_h, n_h, m_block, n_block, group, band_lo, band_hi, D, DV, BLOCK_D, BLOCK_DV, M,
            N, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    else:
        plane = pid // n_blocks
        if PASS == KEYS:
            heads = Hq // group
            i_b, i_kv = plane // heads, plane % heads
        else:
            i_b, i_kv = plane // Hq, plane % Hq // group
        b64, h64 = i_b.to(tl.int64), i_kv.to(tl.int64)
        p_k, p_v = k + b64 * k_batch + h64 * k_head, v + b64 * v_batch + h64 * v_head
        if PASS == KEYS:
            outputs = (dk, dk_batch, dk_head, dk_row, gradient_scale, dv, dv_batch, dv_head, dv_row)
            keys_pass(
                call, b_seed, (extents, column_sums), outputs, lists, p_k, p_v, k_row, v_row, i_b, i_kv,
                pid % n_blocks, group, band_lo, band_hi, n_rows, D, DV, BLOCK_D, BLOCK_DV, M, N, PLAIN, HAS_SOFTCAP,
                dk is not None, dv is not None, RANGES, PRECISION,
            )  # fmt: skip
        else:
            outputs = (dq, dq_batch, dq_head, dq_row, gradient_scale, row_sums, distance_sums)
            # Late blocks first: under a causal mask they are the long ones.
            queries_pass(
                call, b_seed, outputs, lists, p_k, p_v, k_row, v_row, i_b, plane % Hq, n_blocks - 1 - pid % n_blocks,
                band_lo, band_hi, D, DV, BLOCK_D, BLOCK_DV, M, N, PLAIN, HAS_SOFTCAP, dq is not None, RANGES,
                PASS == SHIFTS, PRECISION,
            )  # fmt: skip


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
    keys, queries = (
        launch.attention_bwd(arch, q.element_size(), max(BLOCK_D, BLOCK_DV), bits, of_keys)
        for of_keys in (True, False)
    )
    plain = not softcap and bias is None and alibi_slopes is None
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
    row_kernel[(B * Hq * n_rows,)](
        out, *out.stride()[:3], dout_as_out, *dout_as_out.stride()[:3], lse, None if dlse is None else
        dlse.float().contiguous(), sinks, exponent, delta, sink_parts, extents, Hq, Sq, Sk, n_rows, *band, *bounds,
        LOG2E if plain else 1.0, DV=DV, BLOCK_DV=BLOCK_DV, M=keys.M, num_warps=4,
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
            UNIT=unit, PLAIN=plain, HAS_SOFTCAP=bool(softcap),
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
        blocks_k = blocks_of(Sk, queries.N)
        programs = bias.shape[0] * bias.shape[1] * m_blocks * blocks_k
        run(programs, BIAS, queries, blocks_k, shift=shift, gradients=("bias",), n_rows=m_blocks)
    elif needs_bias:
        dbias.copy_(_reduced(column_sums if by_key else row_sums, bias))
    if needs_slopes:
        dslopes.copy_(-_reduced(distance_sums.sum(-1), alibi_slopes))
    if needs_sinks:
        dsinks.copy_(sink_parts.sum((0, 2)))
    return results
