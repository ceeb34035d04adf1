"""The backward's pass over rows, which comes before all others, and what they read of it.

delta = sum(dO * O) - dlse, exponents, the sinks' gradient, and the keys that each block sees.
"""

import math
from collections.abc import Iterator

import triton
import triton.language as tl

from . import launch
from .aot_case import TARGETS, AotCase
from .mask import FAR, blocks, extent, row_bounds
from .tiles import load_part

# Blocks of rows whose extents a program of the pass over keys reads at once.
SCAN = tl.constexpr(128)
TINY_GATE, TINY_EXPONENT = tl.constexpr(2.0**-40), tl.constexpr(40 * math.log(2))
ROW_WARPS = 4  # at the widest head and the most rows two tiles of 64 numbers a thread
_STRIDES = [f"{t}_{s}" for t in ("out", "dout", "lo", "hi") for s in ("batch", "head", "row")]
_COUNTS = ["Hq", "Sq", "Sk", "n_blocks", "band_lo", "band_hi"]


@triton.jit(do_not_specialize=[*_STRIDES, *_COUNTS])
def row_kernel(
    out, out_batch: tl.int64, out_head: tl.int64, out_row: tl.int64, dout, dout_batch: tl.int64,
    dout_head: tl.int64, dout_row: tl.int64, lse, dlse, sinks, exponent, delta, dsinks, extents,
    Hq: tl.int32, Sq: tl.int32, Sk: tl.int32, n_blocks: tl.int32, band_lo: tl.int32, band_hi: tl.int32,
    lo, lo_batch: tl.int64, lo_head: tl.int64, lo_row: tl.int64, hi, hi_batch: tl.int64, hi_head: tl.int64,
    hi_row: tl.int64, unit: tl.float32, UNIT: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """exponent: in `unit`s of a natural logarithm, +inf for rows that see nothing. extents: see mask.extent. UNIT: as
    in backward_kernel, of out's and dout's strides."""
    out_batch, out_head, out_row = out_batch * UNIT, out_head * UNIT, out_row * UNIT
    dout_batch, dout_head, dout_row = dout_batch * UNIT, dout_head * UNIT, dout_row * UNIT
    pid = tl.program_id(0)
    plane, m_block = pid // n_blocks, pid % n_blocks
    i_b, i_h = plane // Hq, plane % Hq
    b64, h64 = i_b.to(tl.int64), i_h.to(tl.int64)
    o_i = m_block * M + tl.arange(0, M)
    i64 = o_i.to(tl.int64)
    m_i = o_i < Sq
    if extents is not None:
        p_lo, p_hi = None, None
        if lo is not None:
            p_lo = lo + b64 * lo_batch + h64 * lo_head
        if hi is not None:
            p_hi = hi + b64 * hi_batch + h64 * hi_head
        b_lo, b_hi = row_bounds(o_i, m_i, p_lo, lo_row, p_hi, hi_row, band_lo, band_hi, 0, Sk)
        seen_lo, seen_hi, all_lo, all_hi = extent(b_lo, b_hi, m_i)
        p_extent = extents + pid.to(tl.int64) * 4
        tl.store(p_extent, seen_lo)
        tl.store(p_extent + 1, seen_hi)
        tl.store(p_extent + 2, all_lo)
        tl.store(p_extent + 3, all_hi)

    b_out = load_part(out + b64 * out_batch + h64 * out_head, i64 * out_row, 1, m_i, 0, BLOCK_DV, DV, True)
    b_do = load_part(dout + b64 * dout_batch + h64 * dout_head, i64 * dout_row, 1, m_i, 0, BLOCK_DV, DV, True)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    o = (b64 * Hq + h64) * Sq + i64
    b_lse = tl.load(lse + o, mask=m_i, other=float("-inf"))
    m_some = b_lse != float("-inf")
    b_lse = tl.where(m_some, b_lse, 0.0)
    b_gated = b_lse
    b_gate = tl.full([M], 1.0, tl.float32)
    if sinks is not None:
        # out = sigmoid(lse - sink) * (P V), so P * sigmoid(lse - sink) = exp(s - gated) takes P's place.
        sink = tl.load(sinks + i_h)
        b_gated = tl.maximum(b_lse, sink) + tl.log(1.0 + tl.exp(-tl.abs(b_lse - sink)))
        b_gate = tl.exp(b_lse - b_gated)
        if dsinks is not None:
            tl.store(dsinks + pid, -tl.sum(tl.where(m_some, b_delta * tl.exp(sink - b_gated), 0.0)))
    if dlse is not None:
        # The gradient of LSE weighs P itself, without the gate. Below 2^-40 that no longer matters beside it.
        tiny = b_gate < TINY_GATE
        b_gate = tl.where(tiny, TINY_GATE, b_gate)
        b_gated = tl.where(tiny, b_lse + TINY_EXPONENT, b_gated)
        b_delta -= tl.load(dlse + o, mask=m_i, other=0.0) / b_gate
    tl.store(exponent + o, tl.where(m_some, b_gated * unit, float("inf")), mask=m_i)
    tl.store(delta + o, tl.where(m_some, b_delta, 0.0), mask=m_i)


@triton.jit
def rows_that_see(first, end, p_extents, n_blocks, band_lo, band_hi, Sq, M: tl.constexpr):
    """Blocks of M rows that see keys [first, end): [start, stop), of them [full, full_end) all of these keys.

    By the band, or by the extents of blocks, where the full ones count only if they are all of them."""
    if p_extents is None:
        lo = tl.minimum(tl.maximum(first - band_hi, 0), Sq)
        hi = tl.maximum(tl.minimum(end - band_lo, Sq), lo)
        all_lo = tl.maximum(end - 1 - band_hi, lo)
        all_hi = tl.minimum(first - band_lo + 1, hi)
        # Rows past the last one weigh nothing.
        all_hi = tl.where(all_hi == Sq, tl.cdiv(Sq, M) * M, all_hi)
        start, full, full_end, stop = blocks(lo, tl.where(hi > lo, hi, 0), all_lo, all_hi, M)
        start = tl.minimum(start, stop)
    else:
        start, stop, n_full = FAR + 0, 0, 0
        for c in tl.range(0, n_blocks, SCAN):
            o = c + tl.arange(0, SCAN)
            m = o < n_blocks
            p = p_extents + o.to(tl.int64) * 4
            seen_lo, seen_hi = tl.load(p, mask=m, other=0), tl.load(p + 1, mask=m, other=0)
            all_lo, all_hi = tl.load(p + 2, mask=m, other=0), tl.load(p + 3, mask=m, other=0)
            m = m & (seen_lo < end) & (seen_hi > first)
            start = tl.minimum(start, tl.min(tl.where(m, o, FAR), 0))
            stop = tl.maximum(stop, tl.max(tl.where(m, o + 1, 0), 0))
            n_full += tl.sum((m & (all_lo <= first) & (all_hi >= end)).to(tl.int32), 0)
        start = tl.minimum(start, stop)
        full = tl.where(n_full == stop - start, start, stop)
        full_end = stop
    return start, full, full_end, stop


def aot_cases() -> Iterator[AotCase]:
    """With everything that a call may bring."""
    for dtype, width in (("bf16", 128), ("bf16", 256), ("fp32", 256)):
        for target in TARGETS:
            tile = launch.attention_bwd(target, 4 if dtype == "fp32" else 2, width, True, False, "keys")
            floats = ("lse", "dlse", "sinks", "exponent", "delta", "dsinks")
            pointers = dict.fromkeys(("out", "dout"), f"*{dtype}") | dict.fromkeys(floats, "*fp32")
            pointers |= dict.fromkeys(("lo", "hi", "extents"), "*i32")
            signature = pointers | dict.fromkeys(_STRIDES, "i64") | dict.fromkeys(_COUNTS, "i32")
            signature |= {"unit": "fp32"}
            constexprs = {"UNIT": 4 if dtype == "fp32" else 8, "DV": width, "BLOCK_DV": width, "M": tile.M}
            yield AotCase(
                f"rows_{dtype}_d{width}",
                row_kernel,
                signature,
                constexprs,
                ROW_WARPS,
                3,
                tuple(pointers),
                False,
                (target,),
            )
