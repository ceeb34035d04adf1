// Matrix products cut into single tile instructions, so that vector code can stand between them.
//
// A product runs over blocks of 32 x 32 results, a 2 x 2 square of tiles: C[m][n] (+)= sum over k of
// A[m][k] B[k][n]. A step is 32 of the inner dimension: 4 tile loads for 4 tile products, which the four
// accumulators keep independent of each other. B and C are rows of 64 words (kGranule), B holding two rows of
// the matrix as pairs; the columns are one half of those 64. Blocks follow each other down the rows of A.
//
// The matrix unit is fed in program order and works while the core goes on, so whoever owns a queue puts a
// product between every few vectors of its own work and drains what is left.
#pragma once

#include "attention_args.h"

namespace fastattn {
namespace {

constexpr int kBlockSide = 2 * kTileSide;
constexpr int64_t kLaneRowBytes = kGranule * 4;              // a row of 64 words
constexpr int64_t kStepBytes = kTileSide * kLaneRowBytes;    // of B in a step: 16 rows of pairs
constexpr int64_t kBlockBytes = kBlockSide * kLaneRowBytes;  // of C in a block
constexpr int64_t kStripBytes = kTileSide * 4;               // 16 columns
constexpr int64_t kHalfFloats = kBlockSide, kHalves = kGranule / kBlockSide;

struct TileProduct {
  const char *a, *b;
  char* c;
  // In bytes: a row of A, from the upper tile of a block to the lower, from step to step, from block to
  // block.
  int64_t a_row, a_tile, a_step, a_block;
  int steps, blocks;
  bool accumulate;
  // Operands in two parts, high + low, take three legs: (high, high), (low, high), (high, low).
  int64_t a_low, b_low;
};

template <int LEGS>
class TileQueue {
 public:
  TileQueue(Tiles& tiles, const TileProduct* first, const TileProduct* end)
      : tiles_(tiles), at_(first), end_(end) {
    if (at_ != end_) start_product();
  }

  FASTATTN_INLINE bool busy() const { return at_ != end_; }

  // The next quarter of a step; I counts 0, 1, 2, 3.
  template <int I>
  FASTATTN_INLINE void multiply() {
    if constexpr (I == 0) {
      tiles_.template load<4>(a_, at_->a_row);
      tiles_.template load<6>(b_, kLaneRowBytes);
      tiles_.template multiply<0, 4, 6>();
    } else if constexpr (I == 1) {
      tiles_.template load<7>(b_ + kStripBytes, kLaneRowBytes);
      tiles_.template multiply<1, 4, 7>();
    } else if constexpr (I == 2) {
      tiles_.template load<5>(a_ + at_->a_tile, at_->a_row);
      tiles_.template multiply<2, 5, 6>();
    } else {
      tiles_.template multiply<3, 5, 7>();
      a_ += at_->a_step;
      b_ += kStepBytes;
      if (--steps_ == 0) finish_leg();
    }
  }

  FASTATTN_INLINE void step() { multiply<0>(), multiply<1>(), multiply<2>(), multiply<3>(); }

  FASTATTN_INLINE void drain() {
    while (busy()) step();
  }

 private:
  FASTATTN_INLINE void start_product() {
    c_ = at_->c, block_a_ = at_->a, blocks_ = at_->blocks;
    start_block();
  }
  FASTATTN_INLINE void start_block() {
    a_ = block_a_, b_ = at_->b, steps_ = at_->steps, leg_ = 0;
    if (!at_->accumulate) {
      tiles_.template zero<0>(), tiles_.template zero<1>();
      tiles_.template zero<2>(), tiles_.template zero<3>();
      return;
    }
    tiles_.template load<0>(c_, kLaneRowBytes), tiles_.template load<1>(c_ + kStripBytes, kLaneRowBytes);
    tiles_.template load<2>(c_ + kStepBytes, kLaneRowBytes);
    tiles_.template load<3>(c_ + kStepBytes + kStripBytes, kLaneRowBytes);
  }
  FASTATTN_INLINE void finish_leg() {
    if (LEGS > 1 && ++leg_ < LEGS) {
      a_ = block_a_ + (leg_ == 1 ? at_->a_low : 0), b_ = at_->b + (leg_ == 2 ? at_->b_low : 0);
      steps_ = at_->steps;
      return;
    }
    tiles_.template store<0>(c_, kLaneRowBytes), tiles_.template store<1>(c_ + kStripBytes, kLaneRowBytes);
    tiles_.template store<2>(c_ + kStepBytes, kLaneRowBytes);
    tiles_.template store<3>(c_ + kStepBytes + kStripBytes, kLaneRowBytes);
    c_ += kBlockBytes, block_a_ += at_->a_block;
    if (--blocks_ > 0) {
      start_block();
    } else if (++at_ != end_) {
      start_product();
    }
  }

  Tiles& tiles_;
  const TileProduct *at_, *end_;
  const char *a_ = nullptr, *b_ = nullptr, *block_a_ = nullptr;
  char* c_ = nullptr;
  int steps_ = 0, blocks_ = 0, leg_ = 0;
};

}  // namespace
}  // namespace fastattn
