"""Attention forward: out [B, Hq, Sq, Dv] and LSE [B, Hq, Sq] by an online softmax over blocks of keys.

One program computes BLOCK_M rows of one batch item and head, or, where query rows are few, of all the heads of one
K/V head together (packed: row r is query r // group of head r % group). It visits the blocks of keys that its rows
see: by ranges the whole ones without a mask and then the edges, by bits the entries of its granule's list. Products
take q's dtype and add up in float32; the softmax is float32.

Limits: head sizes up to 256, in one or two parts that are powers of two; a head of 96 is 64 + 32. Keys that no row of
the block sees may hold anything: where a NaN came out, the program runs once more and drops their values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from .. import _triton
from ..ops import output_like
from . import decode, launch, tune
from .aot_case import TARGETS, AotCase
from .attention_call import (
    clamp_band,
    columns_adjacent,
    dropout_scalars,
    in_units,
    precision,
    refuse_caches,
    strides_of,
)
from .attention_plan import plan
from .mask import GRANULE, bits_of, blocks, edge, extent, find, row_bounds, within
from .online_softmax import LN2, LOG2E, update
from .philox import dropout_keep
from .score import finish_scores
from .tiles import load_part, store_part, store_rows


@triton.jit
def scores(b_q0, b_q1, p_k, k_row, first, o_k, m_k, D0: tl.constexpr, D1: tl.constexpr, D: tl.constexpr,
           BOUNDED: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """q.k [M, N] of the keys from `first` on. With CHUNK b_q0 is (q, offsets of rows, which exist) and q is read again,
    CHUNK columns at a time: products on the FMA units hold all the columns of a step in registers."""
    p_k = p_k + first * k_row
    if CHUNK > 0:
        p_q, o_q, m_i = b_q0
        b_s = tl.zeros([o_q.shape[0], o_k.shape[0]], tl.float32)
        WHOLE: tl.constexpr = D // CHUNK * CHUNK
        for c in tl.range(0, WHOLE, CHUNK, num_stages=1):
            b_q = load_part(p_q + c, o_q, 1, m_i, 0, CHUNK, CHUNK, True)
            b_k = load_part(p_k + c, o_k, k_row, m_k, 0, CHUNK, CHUNK, BOUNDED)
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=PRECISION)
        if WHOLE < D:
            b_q = load_part(p_q, o_q, 1, m_i, WHOLE, CHUNK, D, True)
            b_k = load_part(p_k, o_k, k_row, m_k, WHOLE, CHUNK, D, BOUNDED)
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=PRECISION)
    else:
        b_k = load_part(p_k, o_k, k_row, m_k, 0, D0, D, BOUNDED)
        b_s = tl.dot(b_q0, tl.trans(b_k), input_precision=PRECISION)
        if D1 > 0:
            b_k = load_part(p_k, o_k, k_row, m_k, D0, D1, D, BOUNDED)
            b_s = tl.dot(b_q1, tl.trans(b_k), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def add_values(acc0, acc1, b_p, p_v, v_row, first, o_k, m_k, m_keys, DV0: tl.constexpr, DV1: tl.constexpr,
               DV: tl.constexpr, BOUNDED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc += p @ v, both parts; if EXACT without the values of keys that m_keys leaves out."""
    p_v = p_v + first * v_row
    b_v = load_part(p_v, o_k, v_row, m_k, 0, DV0, DV, BOUNDED)
    if EXACT:
        b_v = tl.where(m_keys[:, None], b_v, 0.0).to(b_v.dtype)
    acc0 = tl.dot(b_p.to(b_v.dtype), b_v, acc0, input_precision=PRECISION)
    if DV1 > 0:
        b_v = load_part(p_v, o_k, v_row, m_k, DV0, DV1, DV, BOUNDED)
        if EXACT:
            b_v = tl.where(m_keys[:, None], b_v, 0.0).to(b_v.dtype)
        acc1 = tl.dot(b_p.to(b_v.dtype), b_v, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def key_positions(k_pos, k_pos_key, o_n, m_n):
    """Logical positions int32 [N] of keys o_n: 0, 1, 2, ... unless a pointer is given."""
    if k_pos is None:
        return o_n
    else:
        return tl.load(k_pos + o_n.to(tl.int64) * k_pos_key, mask=m_n, other=0)


@triton.jit
def score_block(b_q0, b_q1, p_k, k_row, first, Sk, rows, terms, PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                D0: tl.constexpr, D1: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BOUNDED: tl.constexpr,
                CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores [M, N] of one block before the mask; PLAIN leaves the scale to the softmax.

    rows: (q_pos [M], bias [M] pointers or None, slope [M] or None, which exist). terms: (scale, softcap, bias's
    stride of keys, k_pos or None, its stride).
    """
    o_k = tl.arange(0, N)
    o_n = first + o_k
    m_n = o_n < Sk
    q_pos, p_bias, slope, m_i = rows
    scale, softcap, bias_key, k_pos, k_pos_key = terms
    b_bias = None
    if p_bias is not None:
        # Ahead of the product: of two layouts Triton gives the softmax that of the last, which has to be the product's.
        p = p_bias[:, None] + o_n.to(tl.int64)[None, :] * bias_key
        b_bias = tl.load(p, mask=m_i[:, None] & m_n[None, :], other=0.0)
    b_s = scores(b_q0, b_q1, p_k, k_row, first, o_k, m_n, D0, D1, D, BOUNDED, CHUNK, PRECISION)
    if not PLAIN:
        j = o_n
        if slope is not None:
            j = key_positions(k_pos, k_pos_key, o_n, m_n)
        b_s = finish_scores(b_s, scale, softcap, b_bias, slope, q_pos, j, HAS_SOFTCAP)
    return b_s


@triton.jit
def weigh(m, l, acc0, acc1, b_s, factor, p_v, v_row, first, Sk, b, h, q_pos, k_pos, k_pos_key, seed, threshold,
          PLAIN: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
          BOUNDED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The masked scores of one block into the state of the softmax and the sums of values."""
    o_k = tl.arange(0, N)
    o_n = first + o_k
    m_n = o_n < Sk
    m, l, b_p, alpha = update(m, l, b_s, factor, PLAIN)
    acc0 = acc0 * alpha[:, None]
    if DV1 > 0:
        acc1 = acc1 * alpha[:, None]
    m_keys = m_n
    if EXACT:
        m_keys = tl.max((b_s != float("-inf")).to(tl.int32), 0) > 0
    if seed is not None:
        j = None
        if k_pos is not None:
            j = key_positions(k_pos, k_pos_key, o_n, m_n)
        # Read here and not ahead of the loop, where the keys of all rounds would be made and kept in 20 registers.
        b_seed = tl.load(seed, volatile=True)
        b_p = tl.where(dropout_keep(b_seed, threshold, b, h, q_pos, first, j, N), b_p, 0.0)
    acc0, acc1 = add_values(
        acc0, acc1, b_p, p_v, v_row, first, o_k, m_n, m_keys, DV0, DV1, DV, BOUNDED, EXACT, PRECISION
    )
    return m, l, acc0, acc1


@triton.jit
def attend(b_q0, b_q1, p_k, k_row, p_v, v_row, Sk, o_i, b_lo, b_hi, entries, rows, terms, factor, dropout,
           M: tl.constexpr, N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D: tl.constexpr, DV0: tl.constexpr,
           DV1: tl.constexpr, DV: tl.constexpr, PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
           HAS_RANGES: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The state (m, l, acc0, acc1) of M rows after all that they see, keys [b_lo, b_hi) of [0, Sk).

    entries: (list pointer, first entry, end, tile pointer) or the list pointer None. dropout: (b, h [M], pointer
    of the seed or None, threshold). rows, terms: as in `score_block`. factor: of the scores, where PLAIN.
    """
    q_pos, _, _, m_i = rows
    _, _, _, k_pos, k_pos_key = terms
    b, h, seed, threshold = dropout
    p_list, entry, entry_end, p_tiles = entries
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    acc0 = tl.zeros([M, DV0], tl.float32)
    acc1 = tl.zeros([M, DV1 if DV1 > 0 else 1], tl.float32)
    seen_lo, seen_hi, all_lo, all_hi = extent(b_lo, b_hi, m_i)
    if p_list is not None:
        if HAS_RANGES:
            entry = find(p_list, entry, entry_end, seen_lo // GRANULE)
            entry_end = find(p_list, entry, entry_end, tl.cdiv(seen_hi, GRANULE))
        for t in tl.range(0, (entry_end - entry) * (64 // N), num_stages=1 if EXACT else None):
            e = entry + t // (64 // N)
            from_key = t % (64 // N) * N
            p_entry = p_list + e + e
            first = tl.load(p_entry) * 64 + from_key
            tile = tl.load(p_entry + 1)
            b_s = score_block(b_q0, b_q1, p_k, k_row, first, Sk, rows, terms, PLAIN, HAS_SOFTCAP, D0, D1, D, N,
                              True, CHUNK, PRECISION)  # fmt: skip
            if (tile >= 0) | (first < all_lo) | (first + N > all_hi):
                m_seen = bits_of(p_tiles, tile, o_i % 64, from_key, N) & within(
                    b_lo, b_hi, first + tl.arange(0, N)
                )
                b_s = tl.where(m_seen, b_s, float("-inf"))
            m, l, acc0, acc1 = weigh(m, l, acc0, acc1, b_s, factor, p_v, v_row, first, Sk, b, h, q_pos, k_pos,
                                     k_pos_key, seed, threshold, PLAIN, DV0, DV1, DV, N, True, EXACT,
                                     PRECISION)  # fmt: skip
    else:
        start, full, full_end, end = blocks(seen_lo, seen_hi, all_lo, all_hi, N)
        if EXACT:  # rare, so one loop serves, without a pipeline's registers
            full_end = full
        else:
            for n_block in tl.range(full, full_end):
                first = n_block * N
                b_s = score_block(b_q0, b_q1, p_k, k_row, first, Sk, rows, terms, PLAIN, HAS_SOFTCAP, D0, D1, D, N,
                                  False, CHUNK, PRECISION)  # fmt: skip
                m, l, acc0, acc1 = weigh(m, l, acc0, acc1, b_s, factor, p_v, v_row, first, Sk, b, h, q_pos, k_pos,
                                         k_pos_key, seed, threshold, PLAIN, DV0, DV1, DV, N, False, False,
                                         PRECISION)  # fmt: skip
        for t in tl.range(0, full - start + end - full_end, num_stages=1 if EXACT else None):
            first = edge(t, start, full, full_end) * N
            b_s = score_block(b_q0, b_q1, p_k, k_row, first, Sk, rows, terms, PLAIN, HAS_SOFTCAP, D0, D1, D, N,
                              True, CHUNK, PRECISION)  # fmt: skip
            b_s = tl.where(within(b_lo, b_hi, first + tl.arange(0, N)), b_s, float("-inf"))
            m, l, acc0, acc1 = weigh(m, l, acc0, acc1, b_s, factor, p_v, v_row, first, Sk, b, h, q_pos, k_pos,
                                     k_pos_key, seed, threshold, PLAIN, DV0, DV1, DV, N, True, EXACT,
                                     PRECISION)  # fmt: skip
    return m, l, acc0, acc1


@triton.jit
def place(pid, n_blocks, planes, section, DESCENDING: tl.constexpr):
    """(block of rows, plane) of a program. Sections of planes run one after another, so that their K and V stay in
    the last-level cache; in one, DESCENDING takes the last block of rows of all its planes first: the longest, under
    a causal mask."""
    if DESCENDING:
        in_section = n_blocks * section
        start = pid // in_section * section
        size = tl.minimum(section, planes - start)
        rest = pid % in_section
        m_block = n_blocks - 1 - rest // size
        plane = start + rest % size
    else:
        m_block = pid % n_blocks
        plane = pid // n_blocks
    return m_block, plane


@triton.jit
def has_nan(x):
    return tl.max(tl.max((x != x).to(tl.int32), 1), 0) > 0


@triton.jit
def attend_rows(start, i_b, i_h, split, part, tensors, strides, shape, ranges, bits, terms, dropout, positions,
                D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr,
                DV1: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr,
                ALIGN: tl.constexpr, PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_RANGES: tl.constexpr,
                EXACT: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows start .. start + M of plane (i_b, i_h), from q to out; the tuples are the kernel's arguments.

    part: their first row in `partials`. Returns whether a NaN came out.
    """
    q, k, v, out, lse, partials = tensors
    (q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row) = (
        strides
    )
    Hq, group, Sq, Sk = shape
    band_lo, band_hi, lo, lo_batch, lo_head, lo_row, hi, hi_batch, hi_head, hi_row = ranges
    block_offsets, map_batch, map_head, block_list, bit_tiles = bits
    scale, softcap, bias, bias_batch, bias_head, bias_row, bias_key, alibi, alibi_batch, alibi_head, sinks = (
        terms
    )
    seed, threshold, keep_scale = dropout
    q_pos, q_pos_batch, q_pos_row, k_pos, k_pos_batch, k_pos_key = positions
    o_r = start + tl.arange(0, M)
    if PACKED:
        o_i = o_r // group
        o_h = i_h * group + o_r % group
        i_kv = i_h
    else:
        o_i = o_r
        o_h = tl.zeros([M], tl.int32) + i_h
        i_kv = i_h // group
    m_i = o_i < Sq
    b64, h64, i64 = i_b.to(tl.int64), o_h.to(tl.int64), o_i.to(tl.int64)

    # Strides of q, k, v and out come in units of ALIGN elements, 16 bytes where they can: the compiler sees it.
    k_row = k_row.to(tl.int64) * ALIGN
    v_row = v_row.to(tl.int64) * ALIGN
    o_q = (h64 * q_head + i64 * q_row) * ALIGN
    p_q = q + b64 * q_batch * ALIGN
    p_k = k + (b64 * k_batch + i_kv.to(tl.int64) * k_head) * ALIGN
    p_v = v + (b64 * v_batch + i_kv.to(tl.int64) * v_head) * ALIGN
    if CHUNK > 0:
        b_q0 = (p_q, o_q, m_i)
        b_q1 = b_q0
    else:
        b_q0 = load_part(p_q, o_q, 1, m_i, 0, D0, D, True)
        b_q1 = b_q0
        if D1 > 0:
            b_q1 = load_part(p_q, o_q, 1, m_i, D0, D1, D, True)

    first, end = 0, Sk
    if SPLIT > 0:
        first = split * SPLIT
        end = tl.minimum(first + SPLIT, Sk)
    p_lo, p_hi, p_bias, slope, sink, p_k_pos = None, None, None, None, None, None
    if lo is not None:
        p_lo = lo + b64 * lo_batch + h64 * lo_head
    if hi is not None:
        p_hi = hi + b64 * hi_batch + h64 * hi_head
    b_lo, b_hi = row_bounds(o_i, m_i, p_lo, lo_row, p_hi, hi_row, band_lo, band_hi, first, end)
    entry, entry_end = 0, 0
    if block_offsets is not None:
        p_map = block_offsets + b64 * map_batch + i_h.to(tl.int64) * map_head
        if PACKED:  # fewer rows than a granule, and one map for all heads
            p_map = block_offsets + b64 * map_batch
        else:
            p_map += start // GRANULE
        entry, entry_end = tl.load(p_map), tl.load(p_map + 1)
    if bias is not None:
        p_bias = bias + b64 * bias_batch + h64 * bias_head + i64 * bias_row
    if alibi is not None:
        slope = tl.load(alibi + b64 * alibi_batch + h64 * alibi_head)
    b_q_pos = o_i
    if q_pos is not None:
        b_q_pos = tl.load(q_pos + b64 * q_pos_batch + i64 * q_pos_row, mask=m_i, other=0)
    if k_pos is not None:
        p_k_pos = k_pos + b64 * k_pos_batch

    factor = scale * LOG2E
    unit = LN2 if PLAIN else 1.0
    m, l, acc0, acc1 = attend(b_q0, b_q1, p_k, k_row, p_v, v_row, Sk, o_i, b_lo, b_hi,
                              (block_list, entry, entry_end, bit_tiles), (b_q_pos, p_bias, slope, m_i),
                              (scale, softcap, bias_key, p_k_pos, k_pos_key), factor,
                              (i_b, o_h, seed, threshold), M, N, D0, D1, D, DV0, DV1, DV, PLAIN, HAS_SOFTCAP,
                              HAS_RANGES, EXACT, CHUNK, PRECISION)  # fmt: skip
    if SPLIT > 0:
        o_part = (part + tl.arange(0, M)) * (DV + 2)
        tl.store(partials + o_part, m)
        tl.store(partials + o_part + 1, l)
        every = tl.full([M], True, tl.int1)
        store_part(partials + 2, o_part, every, acc0, 0, DV0, DV)
        if DV1 > 0:
            store_part(partials + 2, o_part, every, acc1, DV0, DV1, DV)
    else:
        if sinks is not None:
            sink = tl.load(sinks + o_h, mask=m_i, other=0.0)
        o_out = (b64 * out_batch + h64 * out_head + i64 * out_row) * ALIGN
        o_lse = (b64 * Hq + h64) * Sq + i64
        store_rows(acc0, acc1, m, l, unit, out, o_out, lse, o_lse, m_i, sink, keep_scale, DV0, DV1, DV)
    wrong = has_nan(acc0)
    if DV1 > 0:
        wrong = wrong | has_nan(acc1)
    return wrong


_INTS = [
    *(f"{t}_{s}" for t in ("q", "k", "v", "out") for s in ("batch", "head", "row")),
    *("Hq", "heads", "group", "Sq", "Sk", "n_blocks", "planes", "section", "splits", "band_lo", "band_hi"),
    *(f"{t}_{s}" for t in ("lo", "hi") for s in ("batch", "head", "row")),
    *("map_batch", "map_head", "bias_batch", "bias_head", "bias_row", "bias_key", "alibi_batch", "alibi_head"),
    *("q_pos_batch", "q_pos_row", "k_pos_batch", "k_pos_key", "threshold"),
]  # fmt: skip


@triton.jit(do_not_specialize=_INTS)
def attention_kernel(
    q, k, v, out, lse, partials,
    q_batch: tl.int64, q_head: tl.int64, q_row: tl.int64,
    k_batch: tl.int64, k_head: tl.int64, k_row: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_row: tl.int64,
    out_batch: tl.int64, out_head: tl.int64, out_row: tl.int64,
    Hq: tl.int32, heads: tl.int32, group: tl.int32, Sq: tl.int32, Sk: tl.int32,
    n_blocks: tl.int32, planes: tl.int32, section: tl.int32, splits: tl.int32,
    scale: tl.float32, softcap: tl.float32, band_lo: tl.int32, band_hi: tl.int32,
    lo, lo_batch: tl.int64, lo_head: tl.int64, lo_row: tl.int64,
    hi, hi_batch: tl.int64, hi_head: tl.int64, hi_row: tl.int64,
    block_offsets, map_batch: tl.int64, map_head: tl.int64, block_list, bit_tiles,
    bias, bias_batch: tl.int64, bias_head: tl.int64, bias_row: tl.int64, bias_key: tl.int64,
    alibi, alibi_batch: tl.int64, alibi_head: tl.int64,
    sinks, seed, threshold: tl.int32, keep_scale: tl.float32,
    q_pos, q_pos_batch: tl.int64, q_pos_row: tl.int64,
    k_pos, k_pos_batch: tl.int64, k_pos_key: tl.int64,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr,
    PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_RANGES: tl.constexpr, DESCENDING: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`heads` and `planes` count what a grid row is: query heads, or, PACKED, K/V heads. With SPLIT the program takes
    SPLIT keys only and leaves its state in `partials` (see decode.py)."""
    pid = tl.program_id(0)
    split = pid % splits
    m_block, plane = place(pid // splits, n_blocks, planes, section, DESCENDING)
    i_b = plane // heads
    i_h = plane % heads
    part = ((plane.to(tl.int64) * n_blocks + m_block) * splits + split) * M
    tensors = (q, k, v, out, lse, partials)
    strides = (
        q_batch,
        q_head,
        q_row,
        k_batch,
        k_head,
        k_row,
        v_batch,
        v_head,
        v_row,
        out_batch,
        out_head,
        out_row,
    )
    shape = (Hq, group, Sq, Sk)
    ranges = (band_lo, band_hi, lo, lo_batch, lo_head, lo_row, hi, hi_batch, hi_head, hi_row)
    bits = (block_offsets, map_batch, map_head, block_list, bit_tiles)
    terms = (
        scale,
        softcap,
        bias,
        bias_batch,
        bias_head,
        bias_row,
        bias_key,
        alibi,
        alibi_batch,
        alibi_head,
        sinks,
    )
    dropout = (seed, threshold, keep_scale)
    positions = (q_pos, q_pos_batch, q_pos_row, k_pos, k_pos_batch, k_pos_key)
    wrong = attend_rows(m_block * M, i_b, i_h, split, part, tensors, strides, shape, ranges, bits, terms, dropout,
                        positions, D, D0, D1, DV, DV0, DV1, M, N, SPLIT, PACKED, ALIGN, PLAIN, HAS_SOFTCAP,
                        HAS_RANGES, False, CHUNK, PRECISION)  # fmt: skip
    if wrong:  # rare: 16 rows at a time, so that it costs the rest no registers
        for s in tl.range(0, M, 16):
            attend_rows(m_block * M + s, i_b, i_h, split, part + s, tensors, strides, shape, ranges, bits, terms,
                        dropout, positions, D, D0, D1, DV, DV0, DV1, 16, N, SPLIT, PACKED, ALIGN, PLAIN, HAS_SOFTCAP,
                        HAS_RANGES, True, CHUNK, PRECISION)  # fmt: skip


def attention_fwd(
    q, k, v, scale, band_lo, band_hi, lo, hi, block_offsets, block_list, bit_tiles, bias, alibi_slopes, softcap,
    dropout_p, dropout_seed, q_pos, k_pos, block_table, kv_lengths, k_scale, v_scale, sinks, out_fp32,
):  # fmt: skip
    """The op; arguments and results as in csrc/ops.cpp."""
    refuse_caches(block_table, kv_lengths, k_scale, v_scale)
    if _triton.interpreted() and q.dtype == torch.bfloat16:
        # Triton's interpreter computes wrongly in bfloat16.
        wide = [t.float() for t in (q, k, v)]
        rest = [
            None if bias is None else bias.float(),
            alibi_slopes,
            softcap,
            dropout_p,
            dropout_seed,
            q_pos,
            k_pos,
        ]
        out, lse = attention_fwd(
            *wide, scale, band_lo, band_hi, lo, hi, block_offsets, block_list, bit_tiles, *rest, None, None, None,
            None, sinks, True,
        )  # fmt: skip
        return out if out_fp32 else out.to(q.dtype), lse

    q, k, v = (columns_adjacent(t) for t in (q, k, v))
    out = output_like(q, v.shape[3], torch.float32 if out_fp32 else q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    terms = bool(softcap or dropout_p) or bias is not None or alibi_slopes is not None
    bits = block_offsets is not None
    p = plan(q, k, v, bits, bits and block_offsets.shape[1] > 1, terms)

    def run(tile: launch.AttentionLaunch) -> None:
        forward(
            replace(p, tile=tile), q, k, v, out, lse, scale, (band_lo, band_hi, lo, hi),
            (block_offsets, block_list, bit_tiles), bias, alibi_slopes, softcap, dropout_p, dropout_seed, q_pos, k_pos,
            sinks,
        )  # fmt: skip

    tile = p.tile
    if p.candidates:
        tile = tune.best(p.kind, p.candidates, run, q.device)
    run(tile)
    return out, lse


def forward(p, q, k, v, out, lse, scale, ranges, bits, bias, alibi_slopes, softcap, dropout_p, dropout_seed, q_pos,
            k_pos, sinks) -> None:  # fmt: skip
    """out and lse by the kernels that a Plan names; ranges: band_lo, band_hi, lo, hi; bits: the three tensors."""
    B, Hq, Sq, D = q.shape
    Hkv, Sk, DV = k.shape[1], k.shape[2], v.shape[3]
    band_lo, band_hi, lo, hi = ranges
    block_offsets, block_list, bit_tiles = bits
    tile, group = p.tile, Hq // Hkv
    heads = Hkv if p.packed else Hq
    n_blocks, planes = -(-p.rows // tile.M), B * heads
    split = p.splits > 1
    partials = None
    if split:
        partials = q.new_empty(planes * n_blocks * p.splits * tile.M * (DV + 2), dtype=torch.float32)
    cache = Sk * (D + DV) * k.element_size() // (1 if p.packed else group)
    section = max(1, min(planes, launch.SECTION_BYTES // max(cache, 1)))
    threshold, keep_scale = dropout_scalars(dropout_p)
    has_ranges = not (band_lo is band_hi is lo is hi is None)
    # The softmax scales the scores where nothing comes between; a factor of 0 or less would turn its maximum round.
    plain = scale > 0 and not softcap and bias is None and alibi_slopes is None
    D0, D1 = launch.parts(D)
    DV0, DV1 = launch.value_parts(DV, tile)
    cells = (B, Hq, Sq)
    unit, strides = in_units(q, k, v, out)
    attention_kernel[(planes * n_blocks * p.splits,)](
        q, k, v, out, lse, partials,
        *strides,
        Hq, heads, group, Sq, Sk, n_blocks, planes, section, p.splits,
        float(scale), float(softcap), clamp_band(band_lo, -(2**30), Sq + Sk), clamp_band(band_hi, 2**30, Sq + Sk),
        lo, *strides_of(lo, cells), hi, *strides_of(hi, cells),
        block_offsets, *strides_of(block_offsets, (B, Hq)), block_list, bit_tiles,
        bias, *strides_of(bias, (B, Hq, Sq, Sk)), alibi_slopes, *strides_of(alibi_slopes, (B, Hq)),
        sinks, dropout_seed if dropout_p else None, threshold, keep_scale,
        q_pos, *strides_of(q_pos, (B, Sq)), k_pos, *strides_of(k_pos, (B, Sk)),
        D=D, D0=D0, D1=D1, DV=DV, DV0=DV0, DV1=DV1, M=tile.M, N=tile.N,
        SPLIT=launch.DECODE_SPLIT if split else 0, PACKED=p.packed,
        ALIGN=unit, PLAIN=plain, HAS_SOFTCAP=bool(softcap), HAS_RANGES=has_ranges,
        DESCENDING=has_ranges and (band_hi is not None or band_lo is None) or block_offsets is not None,
        CHUNK=tile.chunk, PRECISION=precision() if q.dtype == torch.float32 else None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if split:
        of_m = math.log(2) if plain else 1.0
        decode.merge(partials, out, lse, sinks, keep_scale, of_m, p, n_blocks, heads, group)


def _case(name: str, arch: str, dtype: str, D: int, DV: int = 0, *, ranges=False, bits=False, terms=False,
          positions=False, rows=4096, packed=False, splits=1, tile=None) -> AotCase:  # fmt: skip
    """terms: bias, ALiBi, softcap, dropout and sinks, together; positions: of rows and keys, as tensors."""
    DV = DV or D
    itemsize = 4 if dtype == "fp32" else 2
    width = max(sum(launch.parts(D)), sum(launch.parts(DV)))
    tile = tile or launch.attention(arch, itemsize, width, rows, bits, terms, packed)
    (D0, D1), (DV0, DV1) = launch.parts(D), launch.value_parts(DV, tile)
    constexprs = dict(
        D=D, D0=D0, D1=D1, DV=DV, DV0=DV0, DV1=DV1, M=tile.M, N=tile.N,
        SPLIT=launch.DECODE_SPLIT if splits > 1 else 0, PACKED=packed, ALIGN=16 // itemsize, PLAIN=not terms,
        HAS_SOFTCAP=terms, HAS_RANGES=ranges, DESCENDING=ranges or bits,
        CHUNK=tile.chunk, PRECISION="ieee" if itemsize == 4 else None,
    )  # fmt: skip
    pointers = dict(q=dtype, k=dtype, v=dtype, out=dtype, lse="fp32")
    for given, kinds in (
        (splits > 1, {"partials": "fp32"}),
        (ranges, {"lo": "i32", "hi": "i32"}),
        (bits, {"block_offsets": "i32", "block_list": "i32", "bit_tiles": "i64"}),
        (terms, {"bias": dtype, "alibi": "fp32", "sinks": "fp32", "seed": "i64"}),
        (positions, {"q_pos": "i32", "k_pos": "i32"}),
    ):
        if given:
            pointers |= kinds
        else:
            constexprs |= dict.fromkeys(kinds)
    signature = {n: f"*{kind}" for n, kind in pointers.items()}
    signature |= dict.fromkeys(("scale", "softcap", "keep_scale"), "fp32")
    for n in attention_kernel.arg_names:
        if n not in signature and n not in constexprs:
            signature[n] = "i64" if n.endswith(("_batch", "_head", "_row", "_key")) else "i32"
    return AotCase(
        name, attention_kernel, signature, constexprs, tile.num_warps, tile.num_stages, tuple(pointers),
        tensor_cores=dtype != "fp32", targets=(arch,), oldest=_triton.OLDEST_FOR_ATTENTION.get(arch, _triton.OLDEST),
    )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """Each row of the launch table with what makes its kernel the largest: the widest heads it serves, bounds of rows
    by tensors, and all score terms at once or none. A call with fewer of them takes no more."""
    for arch in TARGETS:
        yield _case("d64", arch, "bf16", 64, ranges=True)
        yield _case("d128", arch, "bf16", 128, ranges=True)
        yield _case("d128_bits", arch, "bf16", 128, ranges=True, bits=True)
        yield _case("d64_terms", arch, "bf16", 64, ranges=True, terms=True)
        yield _case("d128_terms", arch, "bf16", 128, ranges=True, terms=True)
        yield _case("d128_bits_terms", arch, "fp16", 128, ranges=True, bits=True, terms=True, positions=True)
        yield _case("d192_128", arch, "bf16", 192, 128, ranges=True)
        yield _case("d256", arch, "bf16", 256, ranges=True)
        yield _case("d256_bits_terms", arch, "fp16", 256, ranges=True, bits=True, terms=True)
        yield _case("d128_fp32_bits_terms", arch, "fp32", 128, ranges=True, bits=True, terms=True)
        yield _case("d256_fp32", arch, "fp32", 256, ranges=True, bits=True)
        yield _case("d128_decode", arch, "bf16", 128, ranges=True, rows=8, packed=True, splits=2)
        yield _case(
            "d128_decode_terms", arch, "bf16", 128, ranges=True, terms=True, rows=64, packed=True, splits=2
        )
