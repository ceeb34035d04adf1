"""The passes of attention's backward: one kernel, what a program does being a constant of it.

    keys      dK, dV of a block of keys: the query heads of its group one after another, for each the blocks of rows
              that see it; also dS summed over rows, for a bias without rows
    queries   dQ of a block of rows, over the blocks of keys that it sees; also dS summed over keys, plain for a bias
              without keys and times |q_pos - k_pos| for the slopes
    bias      dS of one block, summed over what the bias broadcasts over
    shifts    what the exponents of rows with an extreme LSE are off by

Every pass computes P and dS once more (attention_bwd_tile.py), so that each result has one program that writes it: no
atomics, one order of every sum, the same bits at each repeat. Limits: head sizes up to 256, padded to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._triton import OLDEST, OLDEST_FOR_ATTENTION
from . import launch
from .aot_case import TARGETS, AotCase
from .attention_bwd_rows import rows_that_see
from .attention_bwd_tile import gradients, head_of, key_places, row_values
from .mask import FAR, GRANULE, blocks, edge, extent, find
from .tiles import load_part, store_part

# Beyond this float32 holds an LSE to a thirty-second and worse.
EXTREME = tl.constexpr(1e6)


@triton.jit
def load_rows(p, o, stride, m, WIDTH: tl.constexpr, D: tl.constexpr):
    return load_part(p, o.to(tl.int64), stride, m, 0, WIDTH, D, True)


@triton.jit
def operand(p, o, stride, m, WIDTH: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Rows as `gradients` takes them: loaded, or with CHUNK where they are."""
    if CHUNK > 0:
        return p, o.to(tl.int64), stride, m
    else:
        return load_rows(p, o, stride, m, WIDTH, D)


@triton.jit
def entries_of(lists, i_b, i_h, granule):
    """[first, end) of a granule's entries."""
    block_offsets, map_batch, map_head, _, _ = lists
    p = block_offsets + i_b.to(tl.int64) * map_batch + i_h.to(tl.int64) * map_head + granule
    return tl.load(p), tl.load(p + 1)


@triton.jit
def steps(lists, i_b, i_h, granule, span, PHASE: tl.constexpr, SIZE: tl.constexpr, RANGES: tl.constexpr):
    """[first, end) of the steps of a phase. Without lists the blocks seen whole, then those at their edges; with lists
    SIZE long parts of a granule's entries, as far as ranges leave them."""
    start, full, full_end, stop = span
    if lists[3] is not None:
        entry, entry_end = entries_of(lists, i_b, i_h, granule)
        if RANGES:
            entry = find(lists[3], entry, entry_end, start * SIZE // GRANULE)
            entry_end = find(lists[3], entry, entry_end, tl.cdiv(stop * SIZE, GRANULE))
        return entry * (GRANULE // SIZE), entry_end * (GRANULE // SIZE)
    elif PHASE == 0:
        return full, full_end
    else:
        return full * 0, full - start + stop - full_end


@triton.jit
def block_of(t, lists, span, PHASE: tl.constexpr, SIZE: tl.constexpr):
    """The block of step t, and the tile of its bits."""
    start, full, full_end, _ = span
    if lists[3] is not None:
        e = tl.zeros([], tl.int64) + t
        p_entry = lists[3] + e // (GRANULE // SIZE) * 2
        block = tl.load(p_entry) * (GRANULE // SIZE) + (e % (GRANULE // SIZE)).to(tl.int32)
        return block, tl.load(p_entry + 1)
    elif PHASE == 0:
        return t, 0
    else:
        return edge(t, start, full, full_end), 0


@triton.jit
def keys_pass(
    call, b_seed, sums, outputs, lists, k, v, k_row, v_row, i_b, i_kv, n_block, group, band_lo, band_hi, n_rows,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, CHUNK: tl.constexpr, PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr, RANGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    extents, column_sums = sums
    dk, dk_batch, dk_head, dk_row, dk_scale, dv, dv_batch, dv_head, dv_row = outputs
    LISTS: tl.constexpr = lists[3] is not None
    q, _, _, q_row, dout, _, _, dout_row = call[0]
    Hq, Sq, Sk = call[6]
    first = n_block * N
    end = tl.minimum(first + N, Sk)
    o_j = first + tl.arange(0, N)
    m_j = o_j < Sk
    b_k = operand(k, o_j, k_row, m_j, BLOCK_D, D, CHUNK)
    b_v = operand(v, o_j, v_row, m_j, BLOCK_DV, DV, CHUNK)
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
        elif not LISTS:
            full_end = n_rows
        span = (start, full, full_end, stop)
        for PHASE in tl.static_range(1 if LISTS else 2):
            t_start, t_end = steps(lists, i_b, i_h, first // GRANULE, span, PHASE, M, RANGES)
            for t in tl.range(t_start, t_end, disable_licm=True):
                m_block, tile = block_of(t, lists, span, PHASE, M)
                MASKED: tl.constexpr = PHASE == 1 or LISTS or not PLAIN
                o_i = m_block * M + tl.arange(0, M)
                rows = row_values(call, head, band_lo, band_hi, o_i, 512 // M)
                m_i = o_i < Sq
                if MASKED and (RANGES or LISTS or call[3][0] is not None):
                    # A row that sees nothing may hold NaN, and 0 * NaN is no 0.
                    m_i = tl.load(call[1][0] + head[2] + o_i, mask=m_i, other=float("inf")) != float("inf")
                b_q = operand(p_q, o_i, q_row, m_i, BLOCK_D, D, CHUNK)
                b_do = operand(p_dout, o_i, dout_row, m_i, BLOCK_DV, DV, CHUNK)
                b_p, b_ds, b_dscore, m_seen, distance = gradients(
                    call, head, rows, b_seed, b_q, b_do, b_k, b_v, o_i, o_j, b_k_pos, lists[4], tile, i_b, i_h, D, DV,
                    BLOCK_D, BLOCK_DV, CHUNK, PLAIN, HAS_SOFTCAP, MASKED, True, M, N, False, PRECISION,
                )  # fmt: skip
                if CHUNK > 0:
                    b_q = load_rows(p_q, o_i, q_row, m_i, BLOCK_D, D)
                    b_do = load_rows(p_dout, o_i, dout_row, m_i, BLOCK_DV, DV)
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
    N: tl.constexpr, CHUNK: tl.constexpr, PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEEDS_Q: tl.constexpr,
    RANGES: tl.constexpr, EXTREMES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With EXTREMES the one result is the shift of rows whose LSE has lost the logarithm of their number of keys."""
    dq, dq_batch, dq_head, dq_row, dq_scale, row_sums, distance_sums = outputs
    LISTS: tl.constexpr = lists[3] is not None
    q, _, _, q_row, dout, _, _, dout_row = call[0]
    _, Sq, Sk = call[6]
    o_i = m_block * M + tl.arange(0, M)
    m_i = o_i < Sq
    head = head_of(call, i_b, i_h)
    p_q, p_dout = q + head[0], dout + head[1]
    rows = row_values(call, head, band_lo, band_hi, o_i, 1)
    b_q = operand(p_q, o_i, q_row, m_i, BLOCK_D, D, CHUNK)
    b_do = operand(p_dout, o_i, dout_row, m_i, BLOCK_DV, DV, CHUNK)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    distance_sum = tl.zeros([M], tl.float32)
    seen_lo, seen_hi, all_lo, all_hi = extent(rows[3], rows[4], m_i)
    if EXTREMES:
        extreme = m_i & (tl.abs(rows[0]) > EXTREME) & (rows[0] != float("inf"))
        if tl.max(extreme.to(tl.int32), 0) == 0:
            seen_lo, seen_hi = 0, 0
    span = blocks(seen_lo, seen_hi, all_lo, all_hi, N)
    for PHASE in tl.static_range(1 if LISTS else 2):
        t_start, t_end = steps(lists, i_b, i_h, m_block * M // GRANULE, span, PHASE, N, RANGES or EXTREMES)
        for t in tl.range(t_start, t_end, disable_licm=True):
            n_block, tile = block_of(t, lists, span, PHASE, N)
            MASKED: tl.constexpr = PHASE == 1 or LISTS or not PLAIN
            o_j = n_block * N + tl.arange(0, N)
            m_j = o_j < Sk
            b_k = operand(k, o_j, k_row, m_j, BLOCK_D, D, CHUNK)
            b_v = operand(v, o_j, v_row, m_j, BLOCK_DV, DV, CHUNK)
            b_k_pos = key_places(call, head, o_j)
            b_p, b_ds, b_dscore, m_seen, distance = gradients(
                call, head, rows, b_seed, b_q, b_do, b_k, b_v, o_i, o_j, b_k_pos, lists[4], tile, i_b, i_h, D, DV,
                BLOCK_D, BLOCK_DV, CHUNK, PLAIN, HAS_SOFTCAP, MASKED, False, M, N, EXTREMES, PRECISION,
            )  # fmt: skip
            if EXTREMES:
                row_sum += tl.sum(b_p, 1)
            else:
                if NEEDS_Q:
                    if CHUNK > 0:
                        b_k = load_rows(k, o_j, k_row, m_j, BLOCK_D, D)
                    if MASKED:
                        m_key = keys_seen(o_j, seen_lo, seen_hi, lists[4], tile, o_i, m_seen, call[3][0])
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
    N: tl.constexpr, CHUNK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block_list = lists[3]
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
            entry, last = entries_of(lists, i_b, i_h, m_block * M // GRANULE)
            entry = find(block_list, entry, last, n_block * N // GRANULE)
            found = entry < last
            granule = tl.load(block_list + 2 * entry.to(tl.int64), mask=found, other=-1)
            tile = tl.load(block_list + 2 * entry.to(tl.int64) + 1, mask=found, other=0)
            sees = sees & (granule == n_block * N // GRANULE)
        if sees:
            p_q, p_dout = q + head[0], dout + head[1]
            i_kv = (i_h // group).to(tl.int64)
            p_k, p_v = (
                k + i_b.to(tl.int64) * k_batch + i_kv * k_head,
                v + i_b.to(tl.int64) * v_batch + i_kv * v_head,
            )
            b_q = operand(p_q, o_i, q_row, m_i, BLOCK_D, D, CHUNK)
            b_do = operand(p_dout, o_i, dout_row, m_i, BLOCK_DV, DV, CHUNK)
            b_k = operand(p_k, o_j, k_row, m_j, BLOCK_D, D, CHUNK)
            b_v = operand(p_v, o_j, v_row, m_j, BLOCK_DV, DV, CHUNK)
            b_k_pos = key_places(call, head, o_j)
            b_p, b_ds, b_dscore, m_seen, distance = gradients(
                call, head, rows, b_seed, b_q, b_do, b_k, b_v, o_i, o_j, b_k_pos, lists[4], tile, i_b, i_h, D, DV,
                BLOCK_D, BLOCK_DV, CHUNK, False, HAS_SOFTCAP, True, False, M, N, False, PRECISION,
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
    M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr, PLAIN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, RANGES: tl.constexpr, PRECISION: tl.constexpr,
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
            N, CHUNK, HAS_SOFTCAP, PRECISION,
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
                pid % n_blocks, group, band_lo, band_hi, n_rows, D, DV, BLOCK_D, BLOCK_DV, M, N, CHUNK, PLAIN,
                HAS_SOFTCAP, dk is not None, dv is not None, RANGES, PRECISION,
            )  # fmt: skip
        else:
            outputs = (dq, dq_batch, dq_head, dq_row, gradient_scale, row_sums, distance_sums)
            # Late blocks first: under a causal mask they are the long ones.
            queries_pass(
                call, b_seed, outputs, lists, p_k, p_v, k_row, v_row, i_b, plane % Hq, n_blocks - 1 - pid % n_blocks,
                band_lo, band_hi, D, DV, BLOCK_D, BLOCK_DV, M, N, CHUNK, PLAIN, HAS_SOFTCAP, dq is not None, RANGES,
                PASS == SHIFTS, PRECISION,
            )  # fmt: skip


_LAUNCHES = ("keys", "queries", "bias", "queries")
_RESULTS = (("dk", "dv"), ("dq",), ("dbias",), ())
_SUMS = (("column_sums",), ("row_sums", "distance_sums"), (), ("row_sums",))


def _case(
    target: str, name: str, which: int, dtype: str, D: int, bounds=False, bits=False, terms=False
) -> AotCase:
    """One compilation. bounds: lo and hi are tensors beside the band; terms: all score terms, dropout, positions."""
    pointer, wide = f"*{dtype}", max(16, 1 << (D - 1).bit_length())
    tile = launch.attention_bwd(target, 4 if dtype == "fp32" else 2, wide, bits, terms, _LAUNCHES[which])
    pointers = dict.fromkeys(("q", "k", "v", "dout"), pointer) | dict.fromkeys(("exponent", "delta"), "*fp32")
    pointers |= dict.fromkeys(_RESULTS[which], pointer)
    if bounds:
        pointers |= dict.fromkeys(("lo", "hi") + ("extents",) * (which == KEYS.value), "*i32")
    if bits:
        pointers |= {"block_offsets": "*i32", "block_list": "*i32", "bit_tiles": "*i64"}
    if terms:
        sums = _SUMS[which]
        pointers |= {"bias": pointer, "alibi": "*fp32", "seed": "*i64", "q_pos": "*i32", "k_pos": "*i32"}
        pointers |= dict.fromkeys(sums, "*fp32") | ({"shift": "*fp32"} if which != SHIFTS.value else {})
    signature = pointers | dict.fromkeys(_STRIDES, "i64") | dict.fromkeys(_COUNTS, "i32")
    signature |= dict.fromkeys(("band_lo", "band_hi", "threshold"), "i32")
    signature |= dict.fromkeys(("scale", "gradient_scale", "softcap", "keep_scale"), "fp32")
    constexprs = {
        "PASS": which, "D": D, "DV": D, "BLOCK_D": wide, "BLOCK_DV": wide, "M": tile.M, "N": tile.N,
        "CHUNK": tile.chunk, "UNIT": 4 if dtype == "fp32" else 8, "PLAIN": not terms, "HAS_SOFTCAP": terms,
        "RANGES": True, "PRECISION": "ieee" if dtype == "fp32" else None,
    }  # fmt: skip
    constexprs |= {n: None for n in backward_kernel.arg_names if n not in signature and n not in constexprs}
    return AotCase(
        f"{name}_{dtype}_d{D}", backward_kernel, signature, constexprs, tile.num_warps, tile.num_stages,
        tuple(pointers), dtype != "fp32", (target,), OLDEST_FOR_ATTENTION.get(target, OLDEST),
    )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """What bounds the rest: bfloat16 stands for float16; causal and, to head size 128, bits under it for all masks; all
    score terms at once, over lo, hi, bits and the band, for any of them; 64, 128 and 256 for narrower heads, which take
    the same tiles; float32 plain to 128 by 128."""
    every = {"bounds": True, "bits": True, "terms": True}
    for target in TARGETS:
        for which, label in enumerate(("keys", "queries")):
            for width in (64, 128, 256):
                yield _case(target, label, which, "bf16", width)
                if width <= 128:
                    yield _case(target, f"{label}_bits", which, "bf16", width, bits=True)
                yield _case(target, f"{label}_terms", which, "bf16", width, **every)
            yield _case(target, label, which, "fp32", 256)
            for width in (128, 256):
                yield _case(target, f"{label}_terms", which, "fp32", width, **every)
        yield _case(target, "keys", KEYS.value, "fp32", 128)
        yield _case(target, "keys_bounds", KEYS.value, "bf16", 128, bounds=True)
        for dtype in ("bf16", "fp32"):
            yield _case(target, "bias", BIAS.value, dtype, 256, **every)
        yield _case(target, "shifts", SHIFTS.value, "bf16", 128, **every)
