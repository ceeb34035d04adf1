// What the packed rows of a decode task see, granule by granule: the ranges and bits of block_mask.h, but
// with a word a row (bit j: key j of the granule), as rows of several heads share the task and lanes are
// keys.
#pragma once

#include "block_mask.h"

namespace fastattn {
namespace {

// The packed rows of a task: row r is query row `row[r]` of head `head[r]`, the rows of a head adjacent.
struct PackedRows {
  int64_t b, kv_head, first_head;
  int heads, rows_of_head, count;
  int64_t head[kGranule], row[kGranule];

  PackedRows(int64_t b, int64_t kv_head, int64_t first_head, int64_t heads, int64_t rows_of_head)
      : b(b),
        kv_head(kv_head),
        first_head(first_head),
        heads(int(heads)),
        rows_of_head(int(rows_of_head)),
        count(int(heads * rows_of_head)) {
    int r = 0;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < rows_of_head; ++i, ++r) head[r] = first_head + h, row[r] = i;
    }
  }
};

class PackedMask {
 public:
  struct Granule {
    int64_t key;   // first key
    int keys;      // 64, or fewer at the end of the sequence
    bool partial;  // false: every row sees all 64 keys
  };

  // Keys [first, last) of the sequence; `first` is a multiple of the granule.
  PackedMask(const AttentionArgs& a, const PackedRows& rows, int64_t first, int64_t last)
      : rows_(rows), sk_(a.Sk) {
    int64_t seen_lo = last, seen_hi = first;
    all_lo_ = 0, all_hi_ = a.Sk;
    for (int r = 0; r < rows.count; ++r) {
      const int64_t i = rows.row[r], h = rows.head[r];
      int64_t from = 0, to = a.Sk;
      if (a.has_band_lo) from = larger(from, i + a.band_lo);
      if (a.has_band_hi) to = smaller(to, i + a.band_hi + 1);
      if (a.lo) from = larger(from, a.lo[rows.b * a.lo_batch + h * a.lo_head + i * a.lo_row]);
      if (a.hi) to = smaller(to, a.hi[rows.b * a.hi_batch + h * a.hi_head + i * a.hi_row]);
      if (to <= from) from = to = 0;  // sees nothing, and must not widen the extent
      lo_[r] = from, hi_[r] = to;
      if (to > from) seen_lo = smaller(seen_lo, from), seen_hi = larger(seen_hi, to);
      all_lo_ = larger(all_lo_, from), all_hi_ = smaller(all_hi_, to);
    }
    key_ = larger(first, seen_lo / kGranule * kGranule);
    end_ = smaller(last, seen_hi);
    if (!a.block_offsets) return;  // an empty list has no address
    maps_ = a.map_head ? rows.heads : 1;
    tiles_ = a.bit_tiles;
    for (int m = 0; m < maps_; ++m) {
      const int32_t* offsets = a.block_offsets + rows.b * a.map_batch + (rows.first_head + m) * a.map_head;
      entry_[m] = lower_bound(a.block_list, offsets[0], offsets[1], int32_t(key_ / kGranule));
      entries_end_[m] = a.block_list + 2 * int64_t(offsets[1]);
    }
  }

  // The next granule that may be visible, in key order.
  bool next(Granule* g) {
    bool whole = true;
    if (maps_) {
      int64_t key = end_;
      for (int m = 0; m < maps_; ++m) {
        while (entry_[m] != entries_end_[m] && granule_of(m) < key_) entry_[m] += 2;
        if (entry_[m] != entries_end_[m]) key = smaller(key, granule_of(m));
      }
      key_ = key;
      for (int m = 0; m < maps_; ++m) {
        whole &= entry_[m] != entries_end_[m] && granule_of(m) == key_ && entry_[m][1] < 0;
      }
    }
    if (key_ >= end_) return false;
    g->key = key_;
    g->keys = int(smaller(kGranule, sk_ - key_));
    g->partial = !whole || all_lo_ > key_ || all_hi_ < key_ + kGranule;
    key_ += kGranule;
    return true;
  }

  // Fills a word a row of a granule that next() just gave; returns the keys that any row sees.
  uint64_t words(const Granule& g, uint64_t* by_row) const {
    uint64_t seen = 0;
    for (int r = 0; r < rows_.count; ++r) {
      by_row[r] = low_bits(hi_[r] - g.key) & ~low_bits(lo_[r] - g.key);
      if (maps_) by_row[r] &= bits(g, maps_ == 1 ? 0 : r / rows_.rows_of_head, rows_.row[r]);
      seen |= by_row[r];
    }
    return seen;
  }

 private:
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  // The first of the entries [from, to), sorted by granule, that is not before `granule`.
  static const int32_t* lower_bound(const int32_t* list, int64_t from, int64_t to, int32_t granule) {
    while (from < to) {
      const int64_t middle = (from + to) / 2;
      if (list[2 * middle] < granule) from = middle + 1;
      else to = middle;
    }
    return list + 2 * from;
  }
  int64_t granule_of(int m) const { return int64_t(entry_[m][0]) * kGranule; }
  uint64_t bits(const Granule& g, int m, int64_t row) const {
    if (entry_[m] == entries_end_[m] || granule_of(m) != g.key) return 0;
    return entry_[m][1] < 0 ? ~0ull : tiles_[int64_t(entry_[m][1]) * kGranule + row];
  }

  const PackedRows& rows_;
  int64_t sk_, key_, end_, all_lo_, all_hi_;
  int64_t lo_[kGranule], hi_[kGranule];
  int maps_ = 0;  // 0: no bits, 1: one map for all heads, else a map a head
  const int32_t *entry_[kGranule], *entries_end_[kGranule];
  const uint64_t* tiles_ = nullptr;
};

}  // namespace
}  // namespace fastattn
