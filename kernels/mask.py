"""What rows of queries see: ranges and bits of a lowered mask (fastattn/masks/lower.py), block by block.

Ranges: row i sees keys of [lo, hi), from two scalars (the band) and two tensors with any strides. Bits: granules
of 64 x 64, listed a Q granule, each full or a tile of 64 words. A kernel visits the blocks that ranges and lists
leave, and applies the mask to those only that are seen in part.
"""

import triton
import triton.language as tl

GRANULE = tl.constexpr(64)
# Past any key; small enough to add a block to.
FAR = tl.constexpr(0x7FFF0000)


@triton.jit
def row_bounds(o_i, m_i, lo, lo_row, hi, hi_row, band_lo, band_hi, first, end):
    """[lo, hi) of rows o_i, int32 [M] each, within keys [first, end); (0, 0) for rows that see nothing.

    m_i: which rows exist. lo, hi: pointers of the rows' batch and head, a block [M] or a scalar, or None. The band
    shows i + band_lo <= j <= i + band_hi; its scalars are clamped so that sums fit 32 bits.
    """
    b_lo = tl.maximum(o_i + band_lo, first)
    b_hi = tl.minimum(o_i + band_hi + 1, end)
    if lo is not None:
        b_lo = tl.maximum(b_lo, tl.load(lo + o_i * lo_row, mask=m_i, other=0))
    if hi is not None:
        b_hi = tl.minimum(b_hi, tl.load(hi + o_i * hi_row, mask=m_i, other=0))
    some = m_i & (b_hi > b_lo)
    return tl.where(some, b_lo, 0), tl.where(some, b_hi, 0)


@triton.jit
def extent(b_lo, b_hi, m_i):
    """Of rows [M]: any sees keys of [seen_lo, seen_hi) only, every one sees [all_lo, all_hi)."""
    some = b_hi > b_lo
    seen_lo = tl.min(tl.where(some, b_lo, FAR), 0)
    seen_hi = tl.max(b_hi, 0)
    all_lo = tl.max(tl.where(m_i, b_lo, 0), 0)
    all_hi = tl.min(tl.where(m_i, b_hi, FAR), 0)
    return tl.minimum(seen_lo, seen_hi), seen_hi, all_lo, all_hi


@triton.jit
def blocks(seen_lo, seen_hi, all_lo, all_hi, N: tl.constexpr):
    """Blocks of N keys: [first, last) are seen, [full, full_end) of them by every row whole."""
    first = seen_lo // N
    last = tl.cdiv(seen_hi, N)
    full = tl.minimum(tl.maximum(tl.cdiv(all_lo, N), first), last)
    full_end = tl.maximum(tl.minimum(all_hi // N, last), full)
    return first, full, full_end, last


@triton.jit
def edge(t, first, full, full_end):
    """The t-th block that is not full: those left of the full ones, then those right of them."""
    return tl.where(t < full - first, first + t, full_end + t - (full - first))


@triton.jit
def find(p_list, start, end, granule):
    """The first entry of start..end whose granule is at least the one given; entries ascend."""
    while start < end:
        middle = (start + end) // 2
        below = tl.load(p_list + middle + middle) < granule
        start = tl.where(below, middle + 1, start)
        end = tl.where(below, end, middle)
    return start


@triton.jit
def bits_of(p_tiles, tile, o_r, from_key=0, N: tl.constexpr = 64):
    """bool [M, N] of a bit tile, for rows o_r of the granule and its keys from from_key on; a tile of -1 is full."""
    words = tl.load(
        p_tiles + tile.to(tl.int64) * GRANULE + o_r, mask=o_r >= tl.where(tile < 0, GRANULE, 0), other=-1
    )
    low = words.to(tl.int32)
    high = (words >> 32).to(tl.int32)
    o_c = from_key + tl.arange(0, N)
    half = tl.where(o_c[None, :] < 32, low[:, None], high[:, None])
    return ((half >> (o_c % 32)[None, :]) & 1) != 0


@triton.jit
def within(b_lo, b_hi, o_n):
    """bool [M, N]: which keys the ranges show."""
    return (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] < b_hi[:, None])
