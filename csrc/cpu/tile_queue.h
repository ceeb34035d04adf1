// Matrix products cut into single tile instructions, so that vector code can stand between them.
//
// C[m][n] (+)= sum over k of A[m][k] B[k][n] for 32 columns n. B and C are rows of 32 words (kPass), B
// holding two rows of the matrix as pairs. A product goes in chunks of 64 of the inner dimension: the 2 x 2
// tiles of B that it needs stay in registers, and each 16 rows of A meet them in four tile products, chained
// on two accumulators.
//
//    tile 0, 1    C, the columns in two strips
//    tile 2, 3    A, the inner dimension in two steps
//    tile 4 - 7   B, [step][strip]
//
// A chain of products on one register runs at full speed, but a store waits for the last of them and what
// writes its register next waits for the store. So the store of a strip comes after two products of the
// other. Measured, four products with their loads and stores of C: 74 cycles out of the first-level cache (85
// with A out of the second), where the products take 67. Squares of 2 x 2 accumulators, stored together, took
// 140.
//
// The matrix unit is fed in program order and works while the core goes on, so whoever owns a queue puts a
// product between every few vectors of its own work and drains what is left. That work must not touch what
// the products read and write: only making a queue and draining it are in order with other accesses to
// memory.
#pragma once

#include "attention_args.h"

namespace fastattn {
namespace {

constexpr int kBlockSide = 2 * kTileSide;
constexpr int kPass = 2 * kTileSide;  // columns of a product: the query rows of a pass
constexpr int kPasses = kGranule / kPass;
constexpr int64_t kPassBytes = kPass * 4;               // a row of B or C
constexpr int64_t kStepBytes = kTileSide * kPassBytes;  // 16 rows: of B in a step, of C in a tile
constexpr int64_t kStripBytes = kTileSide * 4;          // 16 columns

struct TileProduct {
  const char *a, *b;
  char* c;
  // In bytes: a row of A, from 16 rows to the next, from step to step.
  int64_t a_row, a_tile, a_step;
  int steps, tiles;  // 32 of the inner dimension, 16 rows of A
  bool accumulate;
  bool streams;  // the operands are not to take the place of C in the first-level cache
  // Operands in two parts, high + low, take legs: (high, high), (low, high), (high, low) and, if there is a
  // fourth, (low, low).
  int legs;
  int64_t a_low, b_low;
};

class TileQueue {
 public:
  TileQueue(Tiles& tiles, const TileProduct* first, const TileProduct* end)
      : tiles_(tiles), at_(first), end_(end) {
    Tiles::fence();
    if (at_ != end_) start_product();
  }

  FASTATTN_INLINE bool busy() const { return at_ != end_; }

  // The next quarter of 16 rows by two steps, or of 32 rows by one; I counts 0, 1, 2, 3.
  template <int I>
  FASTATTN_INLINE void multiply() {
    if (two_steps_) long_chain<I>();
    else short_chain<I>();
  }

  FASTATTN_INLINE void step() { multiply<0>(), multiply<1>(), multiply<2>(), multiply<3>(); }

  FASTATTN_INLINE void drain() {
    while (busy()) step();
    Tiles::fence();
  }

 private:
  template <int I>
  FASTATTN_INLINE void long_chain() {
    if constexpr (I == 0) {
      tiles_.template multiply<0, 2, 4>();
      load<3>(a_ + at_->a_step, at_->a_row);
      if (late_) tiles_.template store_free<1>(late_ + kStripBytes, kPassBytes);
      start<1>(c_ + kStripBytes);
    } else if constexpr (I == 1) {
      tiles_.template multiply<0, 3, 6>();
    } else if constexpr (I == 2) {
      tiles_.template multiply<1, 2, 5>();
      tiles_.template store_free<0>(c_, kPassBytes);
    } else {
      tiles_.template multiply<1, 3, 7>();
      late_ = c_;
      a_ += at_->a_tile, c_ += kStepBytes;
      if (--left_ == 0) {
        tiles_.template store_free<1>(late_ + kStripBytes, kPassBytes);
        next_chunk();
      } else {
        start_long_chain();
      }
    }
  }
  // One product ahead of the others, so that none waits for its first rows.
  FASTATTN_INLINE void start_long_chain() {
    load<2>(a_, at_->a_row);
    start<0>(c_);
  }
  template <int I>
  FASTATTN_INLINE void short_chain() {
    if constexpr (I == 0) {
      load<2>(a_, at_->a_row);
      start<0>(c_);
      tiles_.template multiply<0, 2, 4>();
      if (late_) tiles_.template store_free<6>(late_, kPassBytes);
    } else if constexpr (I == 1) {
      start<1>(c_ + kStripBytes);
      tiles_.template multiply<1, 2, 5>();
      if (late_) tiles_.template store_free<7>(late_ + kStripBytes, kPassBytes);
    } else if constexpr (I == 2) {
      load<3>(a_ + at_->a_tile, at_->a_row);
      start<6>(c_ + kStepBytes);
      tiles_.template multiply<6, 3, 4>();
      tiles_.template store_free<0>(c_, kPassBytes);
    } else {
      start<7>(c_ + kStepBytes + kStripBytes);
      tiles_.template multiply<7, 3, 5>();
      tiles_.template store_free<1>(c_ + kStripBytes, kPassBytes);
      late_ = c_ + kStepBytes;
      a_ += 2 * at_->a_tile, c_ += 2 * kStepBytes;
      if ((left_ -= 2) == 0) {
        tiles_.template store_free<6>(late_, kPassBytes);
        tiles_.template store_free<7>(late_ + kStripBytes, kPassBytes);
        next_chunk();
      }
    }
  }

  // Of an operand.
  template <int TILE>
  FASTATTN_INLINE void load(const char* p, int64_t row) {
    if (at_->streams) tiles_.template load_past<TILE>(p, row);
    else tiles_.template load_free<TILE>(p, row);
  }

  template <int TILE>
  FASTATTN_INLINE void start(const char* c) {
    if (accumulate_) tiles_.template load_free<TILE>(c, kPassBytes);
    else tiles_.template zero<TILE>();
  }

  void start_product() {
    step_ = leg_ = 0, accumulate_ = at_->accumulate;
    start_chunk();
  }
  void start_chunk() {
    a_ = at_->a + step_ * at_->a_step + (leg_ % 2 ? at_->a_low : 0);
    c_ = at_->c, left_ = at_->tiles, two_steps_ = step_ + 1 < at_->steps, late_ = nullptr;
    const char* b = at_->b + step_ * kStepBytes + (leg_ >= 2 ? at_->b_low : 0);
    load<4>(b, kPassBytes), load<5>(b + kStripBytes, kPassBytes);
    if (!two_steps_) return;
    start_long_chain();
    b += kStepBytes;
    load<6>(b, kPassBytes), load<7>(b + kStripBytes, kPassBytes);
  }
  __attribute__((noinline)) void next_chunk() {
    accumulate_ = true, step_ += 2;
    if (step_ >= at_->steps) step_ = 0, ++leg_;
    if (leg_ < at_->legs) start_chunk();
    else if (++at_ != end_) start_product();
  }

  Tiles& tiles_;
  const TileProduct *at_, *end_;
  const char* a_ = nullptr;
  char *c_ = nullptr, *late_ = nullptr;
  int left_ = 0, step_ = 0, leg_ = 0;
  bool two_steps_ = false, accumulate_ = false;
};

}  // namespace
}  // namespace fastattn
