// What one block of query rows sees: ranges and bits of the lowered mask, granule by granule.
//
// Both forms end as the same thing, one 64-bit word a key whose bit r says whether row r sees it; a kernel
// asks for the words of partial granules only. Full granules run maskless, empty ones are never visited.
#pragma once

#include "attention_args.h"

namespace fastattn {
namespace {

// a[i] bit j <-> a[j] bit i.
inline void transpose_bits(uint64_t* a) {
#ifdef FASTATTN_HAS_BIT_TRANSPOSE
  uint32_t half[2][kGranule];
  transpose_bits_32(a, half[0]), transpose_bits_32(a + 32, half[1]);
  for (int j = 0; j < kGranule; ++j) a[j] = half[0][j] | uint64_t(half[1][j]) << 32;
#else
  uint64_t m = 0x00000000ffffffffull;
  for (int j = 32; j != 0; j >>= 1, m ^= m << j) {
    for (int k = 0; k < 64; k = ((k | j) + 1) & ~j) {
      const uint64_t t = ((a[k] >> j) ^ a[k | j]) & m;
      a[k] ^= t << j;
      a[k | j] ^= t;
    }
  }
#endif
}

inline uint64_t low_bits(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }

struct KeyExtent {
  int32_t seen_lo, seen_hi, all_lo, all_hi;

  bool misses(int64_t key, int keys) const { return seen_lo >= key + keys || seen_hi <= key; }
  bool covers(int64_t key, int keys) const { return all_lo <= key && all_hi >= key + keys; }
};

class BlockMask {
 public:
  struct Granule {
    int64_t key;   // first key
    int keys;      // 64, or fewer at the end of the sequence
    bool partial;  // false: every row sees every key
    const uint64_t* tile;
  };

  BlockMask(const AttentionArgs& a, int64_t b, int64_t h, int64_t first_row, int rows)
      : rows_(rows), sk_(a.Sk) {
    int64_t seen_lo = a.Sk, seen_hi = 0;
    all_lo_ = 0, all_hi_ = a.Sk;
    const int32_t* lo = a.lo ? a.lo + b * a.lo_batch + h * a.lo_head : nullptr;
    const int32_t* hi = a.hi ? a.hi + b * a.hi_batch + h * a.hi_head : nullptr;
    for (int r = 0; r < rows; ++r) {
      const int64_t i = first_row + r;
      int64_t from = 0, to = a.Sk;
      if (a.has_band_lo) from = larger(from, i + a.band_lo);
      if (a.has_band_hi) to = smaller(to, i + a.band_hi + 1);
      if (lo) from = larger(from, lo[i * a.lo_row]);
      if (hi) to = smaller(to, hi[i * a.hi_row]);
      if (to <= from) from = to = 0;  // sees nothing, and must not widen the block's extent
      lo_[r] = from, hi_[r] = to;
      if (to > from) seen_lo = smaller(seen_lo, from), seen_hi = larger(seen_hi, to);
      all_lo_ = larger(all_lo_, from), all_hi_ = smaller(all_hi_, to);
    }
    seen_lo_ = seen_lo;
    key_ = seen_lo / kGranule * kGranule;
    end_ = seen_hi;
    if (a.block_offsets) {
      has_bits_ = true;
      const int32_t* offsets = a.block_offsets + b * a.map_batch + h * a.map_head + first_row / kGranule;
      entry_ = a.block_list + 2 * int64_t(offsets[0]);
      entries_end_ = a.block_list + 2 * int64_t(offsets[1]);
      tiles_ = a.bit_tiles;
    }
  }

  // About where the rows from `row` on begin to see keys; a guess for those who ask for memory ahead.
  static int64_t first_key(const AttentionArgs& a, int64_t b, int64_t h, int64_t row) {
    int64_t key = 0;
    if (a.has_band_lo) key = larger(key, row + a.band_lo);
    if (a.lo) key = larger(key, a.lo[b * a.lo_batch + h * a.lo_head + row * a.lo_row]);
    if (a.block_offsets) {
      const int32_t* offsets = a.block_offsets + b * a.map_batch + h * a.map_head + row / kGranule;
      if (offsets[0] < offsets[1])
        key = larger(key, int64_t(a.block_list[2 * int64_t(offsets[0])]) * kGranule);
    }
    return key / kGranule * kGranule;
  }

  // The next granule that may be visible, in key order.
  bool next(Granule* g) {
    g->tile = nullptr;
    bool whole = true;
    if (has_bits_) {
      while (entry_ != entries_end_ && int64_t(entry_[0]) * kGranule < key_) entry_ += 2;
      if (entry_ == entries_end_) return false;
      key_ = int64_t(entry_[0]) * kGranule;
      if (entry_[1] >= 0) g->tile = tiles_ + int64_t(entry_[1]) * kGranule, whole = false;
    }
    if (key_ >= end_) return false;
    g->key = key_;
    g->keys = int(smaller(kGranule, sk_ - key_));
    g->partial = !whole || all_lo_ > key_ || all_hi_ < key_ + g->keys;
    key_ += kGranule;
    return true;
  }

  // Fills a word a key of a partial granule; false where no row sees any of them.
  bool words(const Granule& g, uint64_t* by_key) const {
    if (!row_words(g, by_key)) return false;
    transpose_bits(by_key);
    return true;
  }

  // The same with a word a row, bit j for key j.
  bool row_words(const Granule& g, uint64_t* by_row) const {
    uint64_t seen = 0;
    for (int r = 0; r < rows_; ++r) {
      const uint64_t range = low_bits(hi_[r] - g.key) & ~low_bits(lo_[r] - g.key);
      by_row[r] = g.tile ? range & g.tile[r] : range;
      seen |= by_row[r];
    }
    for (int r = rows_; r < kGranule; ++r) by_row[r] = 0;
    return seen != 0;
  }

  // By ranges alone: any row sees keys of [seen_lo, seen_hi) only, every row sees [all_lo, all_hi).
  KeyExtent extent() const { return {int32_t(seen_lo_), int32_t(end_), int32_t(all_lo_), int32_t(all_hi_)}; }

 private:
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  int rows_;
  int64_t sk_, key_, end_, seen_lo_, all_lo_, all_hi_;
  int64_t lo_[kGranule], hi_[kGranule];
  bool has_bits_ = false;  // an empty list has no address, so the pointers cannot tell
  const int32_t *entry_ = nullptr, *entries_end_ = nullptr;
  const uint64_t* tiles_ = nullptr;
};

// Keys [first, last) of a granule and the lane vectors [from, to) in which any row sees any of them.
struct Segment {
  int first, last, from, to;
};

// Cuts a partial granule into runs of 16 keys and drops what no lane sees, so that a diagonal granule costs
// little more than its visible half.
inline int segments_of(const uint64_t* by_key, int keys, Segment* out) {
  constexpr int kRun = 16;
  int count = 0;
  for (int first = 0; first < keys; first += kRun) {
    const int last = first + kRun < keys ? first + kRun : keys;
    uint64_t lanes = 0;
    for (int j = first; j < last; ++j) lanes |= by_key[j];
    if (!lanes) continue;
    const int from = __builtin_ctzll(lanes) / kLanes, to = (63 - __builtin_clzll(lanes)) / kLanes + 1;
    if (count && out[count - 1].last == first && out[count - 1].from == from && out[count - 1].to == to) {
      out[count - 1].last = last;
    } else {
      out[count++] = {first, last, from, to};
    }
  }
  return count;
}

}  // namespace
}  // namespace fastattn
