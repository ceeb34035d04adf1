// Which blocks of keys a tile of query rows visits, and what it may see of each: found by the producer's
// warp, told to the consumers with the block. Each of the first lanes walks for one Q granule, so that lists
// of bits are read side by side.
#pragma once

#include "attention_args.cuh"
#include "ptx.h"

namespace fastattn::cuda {

// The keys [lo, hi) that ranges let a row see.
struct KeyRange {
  int lo, hi;
};

// The ranges of one head's rows. Unsigned numbers: their upper halves cost no register.
class RowRanges {
 public:
  __device__ __forceinline__ RowRanges(const AttentionArgs& args, uint32_t b, uint32_t h)
      : args_(args),
        lo_(args.lo + (int64_t(b) * args.lo_batch + int64_t(h) * args.lo_head)),
        hi_(args.hi + (int64_t(b) * args.hi_batch + int64_t(h) * args.hi_head)) {}

  __device__ __forceinline__ KeyRange operator()(uint32_t row) const {
    KeyRange range{max(0, int(row) + args_.band_lo), min(args_.Sk - 1, int(row) + args_.band_hi) + 1};
    if (args_.lo) range.lo = max(range.lo, lo_[int64_t(row) * args_.lo_row]);
    if (args_.hi) range.hi = min(range.hi, hi_[int64_t(row) * args_.hi_row]);
    return range;
  }

 private:
  const AttentionArgs& args_;
  const int32_t *lo_, *hi_;  // not to be read where args has none
};

// What a warpgroup, 64 rows, sees of a block of keys.
enum Seen : int {
  kSeenWhole = 0,
  kSeenByBits = 1,    // apply the tiles
  kSeenByRanges = 2,  // apply the tiles, then each row's range
  kSeenNothing = 3,
};
constexpr int kFullTile = -1, kEmptyTile = -2;  // in place of an index into bit_tiles

template <int kKeyGranules>
struct alignas(16) GranulePlan {
  int seen;
  int tile[kKeyGranules];  // of bit_tiles, or one of the above
};

// The same for all lanes, and the compiler knows: products in a branch that could diverge would wait for each
// other.
template <int kKeyGranules>
__device__ __forceinline__ GranulePlan<kKeyGranules> uniform(const GranulePlan<kKeyGranules>& plan) {
  GranulePlan<kKeyGranules> same;
  same.seen = shfl(plan.seen, 0);
#pragma unroll
  for (int i = 0; i < kKeyGranules; ++i) same.tile[i] = shfl(plan.tile[i], 0);
  return same;
}

// Blocks go from the last to the first, so that the diagonal of a causal mask comes first and tiles that
// began together read the same keys.
template <int kQGranules, int kKeyGranules>
class BlockWalk {
 public:
  using Plan = GranulePlan<kKeyGranules>;
  static constexpr int kKeys = kKeyGranules * kGranule;

  __device__ __forceinline__ BlockWalk(const AttentionArgs& args, int b, int h, int first_granule)
      : args_(args) {
    const int lane = int(threadIdx.x) % kWarp;
    const RowRanges ranges(args, uint32_t(b), uint32_t(h));
#pragma unroll 1  // registers are few
    for (int g = 0; g < kQGranules; ++g) {
      int lo = args.Sk, hi = 0, all_lo = 0, all_hi = args.Sk;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int row = (first_granule + g) * kGranule + part * kWarp + lane;
        if (row >= args.Sq) continue;
        const KeyRange range = ranges(uint32_t(row));
        all_lo = max(all_lo, range.lo);
        all_hi = min(all_hi, range.hi);
        if (range.lo >= range.hi) continue;
        lo = min(lo, range.lo);
        hi = max(hi, range.hi);
      }
      lo = warp_min(lo);
      hi = warp_max(hi);
      all_lo = warp_max(all_lo);
      all_hi = warp_min(all_hi);
      if (lane == g) some_ = {lo, hi}, all_ = {all_lo, all_hi};
    }
    if (!args.block_offsets || some_.lo >= some_.hi) return;
    const int32_t* offsets = args.block_offsets + uint32_t(b) * args.map_batch + uint32_t(h) * args.map_head +
                             first_granule + lane;
    first_ = offsets[0];
    // The entries below the range's end, by halving.
    int end = offsets[1];
    for (int low = first_; low < end;) {
      const int middle = low + (end - low) / 2;
      if (args.block_list[2 * middle] * kGranule < some_.hi) low = middle + 1;
      else end = middle;
    }
    at_ = end;
    read_entry();
  }

  // The next block: its number, or -1 after the last, the same in all lanes; `plan` is this lane's granule's.
  __device__ __forceinline__ int next(Plan& plan) {
    const bool listed = args_.block_offsets != nullptr;
    int block = -1;
    if (listed) {
      if (granule_ >= 0 && (granule_ + 1) * kGranule > some_.lo) block = granule_ / kKeyGranules;
    } else if (some_.hi > some_.lo) {
      block = (some_.hi - 1) / kKeys;
    }
    block = warp_max(block);
    bool any = false, all = true, cut = false;
#pragma unroll
    for (int i = kKeyGranules - 1; i >= 0; --i) {
      const int granule = block * kKeyGranules + i, key = granule * kGranule;
      int tile = listed ? kEmptyTile : kFullTile;
      if (listed && granule_ == granule && block >= 0) {
        tile = args_.block_list[2 * at_ + 1];
        read_entry();
      }
      if (key >= some_.hi || key + kGranule <= some_.lo) tile = kEmptyTile;
      else if (key < all_.lo || key + kGranule > all_.hi) cut |= tile != kEmptyTile;
      plan.tile[i] = tile;
      any |= tile != kEmptyTile;
      all &= tile == kFullTile;
    }
    plan.seen = !any ? kSeenNothing : cut ? kSeenByRanges : all ? kSeenWhole : kSeenByBits;
    if (!listed && block >= 0) some_.hi = min(some_.hi, block * kKeys);
    return block;
  }

 private:
  __device__ __forceinline__ void read_entry() {
    granule_ = --at_ >= first_ ? args_.block_list[2 * at_] : -1;
  }

  const AttentionArgs& args_;
  KeyRange some_{0, 0}, all_{0, 0};  // keys that some row, that every row sees
  int first_ = 0, at_ = 0;           // list entries [first_, at_] are still to come
  int granule_ = -1;                 // of the last of them
};

}  // namespace fastattn::cuda
