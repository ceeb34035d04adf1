// What a block of query rows sees: the ranges of its rows, the walk over the K granules that any of them
// sees, and a 64-bit word of keys a row for granules seen in part. Granules that no row sees are never
// visited.
#pragma once

#include <type_traits>

#include "attention_args.cuh"
#include "ptx.h"

namespace fastattn::cuda {

enum class MaskForm { None, Ranges, Bits };  // Bits: within the ranges, of which there may be none

constexpr int kFull = -1, kHidden = -2;  // beside tile numbers

// f with the form of a call's mask, as a constant.
template <class F>
auto with_mask_form(const AttentionArgs& a, const F& f) {
  const bool ranges = a.lo || a.hi || a.band_lo > -kUnbounded || a.band_hi < kUnbounded;
  // The list has no address where nobody sees anything.
  if (a.block_offsets) return f(std::integral_constant<MaskForm, MaskForm::Bits>());
  if (ranges) return f(std::integral_constant<MaskForm, MaskForm::Ranges>());
  return f(std::integral_constant<MaskForm, MaskForm::None>());
}

struct Range {
  int lo, hi;  // keys lo to hi - 1; {0, 0} where there are none
};

// By ranges, the keys that row i of head (b, h) sees.
template <MaskForm kForm>
__device__ __forceinline__ Range row_range(const AttentionArgs& a, int b, int h, int i) {
  if (kForm == MaskForm::None) return {0, a.Sk};
  Range r{max(i + a.band_lo, 0), min(i + a.band_hi + 1, a.Sk)};
  if (a.lo) r.lo = max(r.lo, a.lo[b * a.lo_batch + h * a.lo_head + i * a.lo_row]);
  if (a.hi) r.hi = min(r.hi, a.hi[b * a.hi_batch + h * a.hi_head + i * a.hi_row]);
  if (r.hi <= r.lo) r = {0, 0};
  return r;
}

// Of some rows, by ranges: the keys [seen_lo, seen_hi) hold all that any row sees, and [all_lo, all_hi) are
// seen by every row. Rows that see nothing do not widen the first.
struct Extent {
  int seen_lo, seen_hi, all_lo, all_hi;

  __device__ __forceinline__ bool sees(int key, int keys) const {
    return key < seen_hi && key + keys > seen_lo;
  }
  __device__ __forceinline__ bool covers(int key, int keys) const {
    return key >= all_lo && key + keys <= all_hi;
  }
};

__device__ __forceinline__ Extent no_rows() { return {kUnbounded, 0, 0, kUnbounded}; }
__device__ __forceinline__ Extent extent_of(Range r) {
  return {r.hi > r.lo ? r.lo : kUnbounded, r.hi, r.lo, r.hi};
}
__device__ __forceinline__ Extent join(Extent x, Extent y) {
  return {min(x.seen_lo, y.seen_lo), max(x.seen_hi, y.seen_hi), max(x.all_lo, y.all_lo),
          min(x.all_hi, y.all_hi)};
}
// Of the rows of all lanes.
__device__ __forceinline__ Extent join_warp(Extent x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x = join(x, {shfl_xor(x.seen_lo, lanes), shfl_xor(x.seen_hi, lanes), shfl_xor(x.all_lo, lanes),
                 shfl_xor(x.all_hi, lanes)});
  }
  return x;
}

// Bits [from, to) of a word; the bounds may lie outside 0 to 64.
__device__ __forceinline__ uint64_t bits_between(int from, int to) {
  from = max(from, 0);
  to = min(to, 64);
  return to > from ? (~uint64_t(0) >> (64 - (to - from))) << from : 0;
}

// The keys of granule `key` (its first key) that any row sees, by the bits alone: what of K and V is read.
// Keys that nobody sees are zeros instead, since they may hold NaN. `tiles` are those of the kGranules
// granules of rows; all lanes take part.
template <int kGranules>
__device__ __forceinline__ uint64_t seen_columns(const AttentionArgs& a, const int (&tiles)[kGranules]) {
  uint64_t mine = 0;
  bool full = false;
#pragma unroll
  for (int g = 0; g < kGranules; ++g) {
    full |= tiles[g] == kFull;
    if (tiles[g] < 0) continue;
    const uint64_t* words = a.bit_tiles + int64_t(tiles[g]) * kGranule;
    mine |= words[threadIdx.x % kWarp] | words[threadIdx.x % kWarp + kWarp];
  }
  if (full) return ~uint64_t(0);
  return warp_or(uint32_t(mine)) | uint64_t(warp_or(uint32_t(mine >> 32))) << 32;
}

// Where the walk of a block stands: a K granule and, of each granule of rows, kFull, kHidden or a tile of
// bits.
template <int kGranules>
struct Stop {
  int granule;  // -1: the walk has ended
  int tiles[kGranules];
};

// The first of entries [from, to) of a list of (granule, tile) whose granule is at least this one.
__device__ __forceinline__ int first_entry(const int32_t* list, int from, int to, int granule) {
  while (from < to) {
    const int middle = from + (to - from) / 2;
    if (list[2 * int64_t(middle)] < granule) from = middle + 1;
    else to = middle;
  }
  return from;
}

// The K granules that the rows of a block see, ascending. The same in all threads of a block.
template <MaskForm kForm, int kGranules>
class KeyWalk {
 public:
  // `first` is the first row, a multiple of 64; `seen_lo` and `seen_hi` bound what the rows see by ranges.
  __device__ __forceinline__ KeyWalk(const AttentionArgs& a, int b, int h, int first, int seen_lo,
                                     int seen_hi)
      : a_(a) {
    const bool some = seen_hi > seen_lo;
    const int from = some ? seen_lo / kGranule : 0, to = some ? (seen_hi + kGranule - 1) / kGranule : 0;
    if (kForm != MaskForm::Bits) {
      at_[0] = from;
      last_[0] = to;
      return;
    }
    const int32_t* offsets = a.block_offsets + b * a.map_batch + h * a.map_head + first / kGranule;
#pragma unroll
    for (int g = 0; g < kGranules; ++g) {
      const bool exists = first + g * kGranule < a.Sq;
      at_[g] = exists ? first_entry(a.block_list, offsets[g], offsets[g + 1], from) : 0;
      last_[g] = exists ? first_entry(a.block_list, at_[g], offsets[g + 1], to) : 0;
    }
  }

  __device__ __forceinline__ Stop<kGranules> next() {
    Stop<kGranules> stop;
    if constexpr (kForm != MaskForm::Bits) {
      stop.granule = at_[0] < last_[0] ? at_[0]++ : -1;
#pragma unroll
      for (int g = 0; g < kGranules; ++g) stop.tiles[g] = kFull;
    } else {
      stop.granule = kUnbounded;
#pragma unroll
      for (int g = 0; g < kGranules; ++g) {
        if (at_[g] < last_[g]) stop.granule = min(stop.granule, a_.block_list[2 * int64_t(at_[g])]);
      }
#pragma unroll
      for (int g = 0; g < kGranules; ++g) {
        const bool here = at_[g] < last_[g] && a_.block_list[2 * int64_t(at_[g])] == stop.granule;
        stop.tiles[g] = here ? a_.block_list[2 * int64_t(at_[g]) + 1] : kHidden;
        at_[g] += here;
      }
      if (stop.granule == kUnbounded) stop.granule = -1;
    }
    return stop;
  }

 private:
  const AttentionArgs& a_;
  int at_[kGranules], last_[kGranules];  // list entries; granules themselves where there are no bits
};

// What the row pass of the backward left about 64 rows: by ranges, the keys they see.
__device__ __forceinline__ Extent stored_extent(const AttentionBwdArgs& a, int b, int h, int granule) {
  const int64_t granules = (a.Sq + kGranule - 1) / kGranule;
  const int4 e = reinterpret_cast<const int4*>(a.extents)[(int64_t(b) * a.Hq + h) * granules + granule];
  return {e.x, e.y, e.z, e.w};
}

// A granule of rows that sees the block's keys.
struct QueryStop {
  int h, granule, tile;  // granule -1: the walk has ended; tile: kFull or a tile of bits
  bool covered;          // every row sees every key by ranges
};

// The Q granules that see 64 keys, head by head of a group, ascending. The same in all threads of a block.
template <MaskForm kForm>
class QueryWalk {
 public:
  __device__ __forceinline__ QueryWalk(const AttentionBwdArgs& a, int b, int kv, int key)
      : a_(a), b_(b), key_(key), h_(kv * (a.Hq / a.Hkv)), h_end_(h_ + a.Hq / a.Hkv) {
    enter();
  }

  __device__ __forceinline__ QueryStop next() {
    while (true) {
      while (at_ < last_) {
        const int at = at_++;
        QueryStop stop{h_, at, kFull, false};
        if (kForm == MaskForm::Bits) {
          stop.granule = a_.block_list_t[2 * int64_t(at)];
          stop.tile = a_.block_list_t[2 * int64_t(at) + 1];
        }
        const Extent extent = stored_extent(a_, b_, h_, stop.granule);
        stop.covered = extent.covers(key_, kGranule);
        if (extent.sees(key_, kGranule)) return stop;
      }
      if (++h_ >= h_end_) return {0, -1, kFull, false};
      enter();
    }
  }

 private:
  // The candidates of head h_: list entries, or granules within the band.
  __device__ __forceinline__ void enter() {
    if (kForm == MaskForm::Bits) {
      const int32_t* offsets =
          a_.block_offsets_t + b_ * a_.map_t_batch + h_ * a_.map_t_head + key_ / kGranule;
      at_ = offsets[0];
      last_ = offsets[1];
    } else {
      at_ = max(key_ - a_.band_hi, 0) / kGranule;
      last_ = (min(key_ + kGranule - a_.band_lo, a_.Sq) + kGranule - 1) / kGranule;
    }
  }

  const AttentionBwdArgs& a_;
  const int b_, key_;
  int h_;
  const int h_end_;
  int at_, last_;
};

}  // namespace fastattn::cuda
