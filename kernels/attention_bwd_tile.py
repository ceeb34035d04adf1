"""Attention backward, one tile: M query rows against N keys of one head.

    S = scale Q K^T, P = exp(S - lse), dP = dO V^T, dS = P * (dP - delta)
    dV += P^T dO, dK += dS^T Q, dQ += dS K                        (FlashAttention-2's backward, unscaled)

The passes over tiles are in attention_bwd.py. Where they sum over rows the tile is transposed, keys by rows, so that
P and dS are left operands as they stand. Values of rows or keys come as blocks [M] and [N]; `across` lays them out.

Hidden NaN: P and dS are selected, never multiplied by a mask.
"""

import triton
import triton.language as tl

from .mask import FAR, GRANULE, row_bounds
from .online_softmax import LOG2E
from .philox import dropout_keep
from .score import tanh
from .tiles import load_part


@triton.jit
def across(b, ROW: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A value a row ([M], if ROW) or a key ([N]) along its dimension of a tile."""
    if ROW == TRANSPOSED:
        b = b[None, :]
    else:
        b = b[:, None]
    return b


@triton.jit
def head_of(call, i_b, i_h):
    """Where one batch item and head start in each tensor of the call, in elements, and its ALiBi slope.

    Tuples never hold a local None, which Triton refuses: what is absent is so in `call`, made of kernel arguments."""
    operands, _, bounds, terms, places, _, sizes = call
    _, q_batch, q_head, _, _, dout_batch, dout_head, _ = operands
    _, lo_batch, lo_head, _, _, hi_batch, hi_head, _ = bounds
    _, bias_batch, bias_head, alibi, alibi_batch, alibi_head = terms
    _, q_pos_batch, _, _, k_pos_batch, _ = places
    Hq, Sq, _ = sizes
    b64, h64 = i_b.to(tl.int64), i_h.to(tl.int64)
    slope = tl.zeros([], tl.float32)
    if alibi is not None:
        slope = tl.load(alibi + b64 * alibi_batch + h64 * alibi_head)
    return (
        b64 * q_batch + h64 * q_head,
        b64 * dout_batch + h64 * dout_head,
        (b64 * Hq + h64) * Sq,
        b64 * lo_batch + h64 * lo_head,
        b64 * hi_batch + h64 * hi_head,
        b64 * bias_batch + h64 * bias_head,
        slope,
        b64 * q_pos_batch,
        b64 * k_pos_batch,
    )


@triton.jit
def row_values(call, head, band_lo, band_hi, o_i, REPEAT: tl.constexpr):
    """Of rows o_i: exponent, delta, shift; the bounds [b_lo, b_hi) of their keys; logical positions.

    A row that does not exist has an exponent of +inf and so weights of 0. REPEAT reads a number more than once: Triton
    lays fewer numbers than threads out like the tile they will meet, where each takes a pointer a column."""
    _, statistics, bounds, _, places, _, sizes = call
    exponent, delta, shift = statistics
    lo, _, _, lo_row, hi, _, _, hi_row = bounds
    q_pos, _, q_pos_row, _, _, _ = places
    _, Sq, Sk = sizes
    _, _, row, o_lo, o_hi, _, _, o_q_pos, _ = head
    m_i = o_i < Sq
    if REPEAT > 1:
        o = o_i[:, None] + 0 * tl.arange(0, REPEAT)[None, :]
        b_exponent = tl.max(tl.load(exponent + row + o, mask=o < Sq, other=float("inf")), 1)
        b_delta = tl.max(tl.load(delta + row + o, mask=o < Sq, other=0.0), 1)
    else:
        b_exponent = tl.load(exponent + row + o_i, mask=m_i, other=float("inf"))
        b_delta = tl.load(delta + row + o_i, mask=m_i, other=0.0)
    b_shift = b_delta * 0.0
    if shift is not None:
        b_shift = tl.load(shift + row + o_i, mask=m_i, other=0.0)
    p_lo, p_hi = None, None
    if lo is not None:
        p_lo = lo + o_lo
    if hi is not None:
        p_hi = hi + o_hi
    b_lo, b_hi = row_bounds(o_i, m_i, p_lo, lo_row, p_hi, hi_row, band_lo, band_hi, 0, Sk)
    b_q_pos = o_i
    if q_pos is not None:
        b_q_pos = tl.load(q_pos + o_q_pos + o_i.to(tl.int64) * q_pos_row, mask=m_i, other=0)
    return b_exponent, b_delta, b_shift, b_lo, b_hi, b_q_pos


@triton.jit
def key_places(call, head, o_j):
    """Logical positions int32 [N] of keys o_j."""
    _, _, _, k_pos, _, k_pos_key = call[4]
    b = o_j
    if k_pos is not None:
        b = tl.load(k_pos + head[8] + o_j.to(tl.int64) * k_pos_key, mask=o_j < call[6][2], other=0)
    return b


@triton.jit
def seen_of(o_i, o_j, b_lo, b_hi, p_tiles, tile, TRANSPOSED: tl.constexpr):
    """bool: what ranges and, unless p_tiles is None, the tile of the granule's bits (-1: full) show of a block."""
    j = across(o_j, False, TRANSPOSED)
    m_seen = (j >= across(b_lo, True, TRANSPOSED)) & (j < across(b_hi, True, TRANSPOSED))
    if p_tiles is not None:
        words = tl.load(
            p_tiles + tile.to(tl.int64) * GRANULE + o_i % GRANULE,
            mask=o_i >= tl.where(tile < 0, FAR, 0),
            other=-1,
        )
        low = across(words.to(tl.int32), True, TRANSPOSED)
        high = across((words >> 32).to(tl.int32), True, TRANSPOSED)
        column = j % GRANULE
        m_seen = m_seen & (((tl.where(column < 32, low, high) >> (column % 32)) & 1) != 0)
    return m_seen


@triton.jit
def weights(b_s, m_seen, rows, scale, softcap, b_bias, slope, distance, PLAIN: tl.constexpr,
            HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr):  # fmt: skip
    """P of a tile from q.k, the derivative of the softcap (P where there is none), and the mask with what a bias of
    -inf hides taken out. PLAIN: no score terms; scale is then in units of log2, as the exponent is."""
    b_exponent, _, b_shift, _, _, _ = rows
    b_e = across(b_exponent, True, TRANSPOSED)
    b_s = b_s * scale
    b_slope = b_s
    if PLAIN:
        b_s = b_s - b_e
    else:
        if HAS_SOFTCAP:
            b_tanh = tanh(b_s / softcap)
            b_s = softcap * b_tanh
            b_slope = 1.0 - b_tanh * b_tanh
        if b_bias is not None:
            m_seen = m_seen & (b_bias != float("-inf"))
            b_s += b_bias
        b_s -= slope * distance
        # The lowest finite bias must not overflow: units of log2 come after the difference.
        b_s = (b_s - b_e) * LOG2E - across(b_shift, True, TRANSPOSED)
    b_p = tl.exp2(b_s)
    if MASKED:
        b_p = tl.where(m_seen, b_p, 0.0)
    return b_p, b_slope, m_seen


@triton.jit
def product(a, b, WIDTH: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T. With CHUNK both are (pointer, rows, stride, which rows exist), read CHUNK columns at a time: products on
    the FMA units hold all the columns of a step in registers."""
    if CHUNK > 0:
        p_a, o_a, a_row, m_a = a
        p_b, o_b, b_row, m_b = b
        b_ab = tl.zeros([o_a.shape[0], o_b.shape[0]], tl.float32)
        for c in tl.static_range(0, WIDTH, CHUNK):
            b_a = load_part(p_a, o_a, a_row, m_a, c, CHUNK, D, True)
            b_b = load_part(p_b, o_b, b_row, m_b, c, CHUNK, D, True)
            b_ab = tl.dot(b_a, tl.trans(b_b), b_ab, input_precision=PRECISION)
    else:
        b_ab = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return b_ab


@triton.jit
def gradients(call, head, rows, b_seed, b_q, b_do, b_k, b_v, o_i, o_j, b_k_pos, p_tiles, tile, i_b, i_h,
              D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
              PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr,
              M: tl.constexpr, N: tl.constexpr, SUM_ONLY: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """P as it multiplies V, dS by the biased score, dS by q.k * scale, the mask, and |q_pos - k_pos|, of one tile.

    SUM_ONLY: the first alone counts, without dropout."""
    _, _, _, terms, places, scalars, sizes = call
    bias = terms[0]
    k_pos = places[3]
    scale, softcap, bias_row, bias_key, seed, threshold, keep_scale = scalars
    _, Sq, Sk = sizes
    _, b_delta, _, b_lo, b_hi, b_q_pos = rows
    if TRANSPOSED:
        b_s = product(b_k, b_q, BLOCK_D, D, CHUNK, PRECISION)
        b_dp = product(b_v, b_do, BLOCK_DV, DV, CHUNK, PRECISION)
    else:
        b_s = product(b_q, b_k, BLOCK_D, D, CHUNK, PRECISION)
        b_dp = product(b_do, b_v, BLOCK_DV, DV, CHUNK, PRECISION)
    m_seen = seen_of(o_i, o_j, b_lo, b_hi, p_tiles, tile, TRANSPOSED)
    b_bias = None
    if bias is not None:
        i, j = across(o_i, True, TRANSPOSED), across(o_j, False, TRANSPOSED)
        p = bias + head[5] + i.to(tl.int64) * bias_row + j.to(tl.int64) * bias_key
        b_bias = tl.load(p, mask=(i < Sq) & (j < Sk), other=0.0).to(tl.float32)
    distance = tl.abs(across(b_q_pos, True, TRANSPOSED) - across(b_k_pos, False, TRANSPOSED)).to(tl.float32)
    b_p, b_slope, m_seen = weights(
        b_s, m_seen, rows, scale, softcap, b_bias, head[6], distance, PLAIN, HAS_SOFTCAP, MASKED, TRANSPOSED
    )
    b_kept = b_p
    if not SUM_ONLY and seed is not None:
        b_places = None
        if k_pos is not None:
            b_places = b_k_pos
        m_keep = dropout_keep(
            b_seed, threshold, i_b, tl.zeros([M], tl.int32) + i_h, b_q_pos, tl.min(o_j, 0), b_places, N
        )
        if TRANSPOSED:
            m_keep = tl.trans(m_keep)
        b_kept = tl.where(m_keep, b_p * keep_scale, 0.0)
        b_dp = tl.where(m_keep, b_dp * keep_scale, 0.0)
    b_ds = b_p * (b_dp - across(b_delta, True, TRANSPOSED))
    if MASKED:
        b_ds = tl.where(m_seen, b_ds, 0.0)
    b_dscore = b_ds
    if HAS_SOFTCAP:
        b_dscore = b_ds * b_slope
        if MASKED:
            b_dscore = tl.where(m_seen, b_dscore, 0.0)
    return b_kept, b_ds, b_dscore, m_seen, distance
