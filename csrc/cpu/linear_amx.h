// A linear layer of inference, fp32, on AMX: every number as three bf16, which hold all of its 24 bits, and
// of the nine products of parts the six that count.
//
//   x = h + m + l;  x w = h h + h m + m h + m m + h l + l h, and what is left out is 2^-24 of it
//
// Six products at 32 times the rate of fp32 vectors. Products of parts are exact and their sums are fp32, 32
// steps of k to an addition, so the errors are smaller than those of a chain of fp32 multiply-adds (2.3e-7
// rms of the result for 5.2e-7 at 768 steps). Parts below 2^-126 are 0 to the tiles: numbers below 2^-110
// lose their last bits, below 2^-118 all but the first eight.
//
// The weight is the left operand, split into rows of parts beside the products of the outputs before; x is
// split and transposed once for all outputs of a task. Products come out as [output][row], as those of
// linear.h do, which stores them. A sum that is not finite is computed again in fp32: an infinity times a
// part that is 0 would be NaN.
#pragma once

#include "linear.h"
#include "tile_queue.h"

namespace fastattn {
namespace {

constexpr int kSplitParts = 3;
constexpr int64_t kPieceSteps = 768;              // of k at once: 256 rows of x take 1.2 MB
constexpr int64_t kTiledRows = 4 * kPanelRows;    // to a task
constexpr int64_t kTiledOutputs = 2 * kTileSide;  // whose weights are split at a time
constexpr int64_t kStripRows = kTileSide;         // of x, to a tile

// A tile of 16 rows by 32 steps of k holds 1 KB; those of a step's parts lie one after the other.
constexpr int64_t kStepParts = kSplitParts * kTileBytes / 2;  // in bf16

// Splits rows into tiles, [16 rows][step][part][row][32], 32 numbers at a time: between products of tiles,
// which leave the vectors idle. Rows past `count` and numbers past `width` are 0.
class RowSplitter {
 public:
  RowSplitter() = default;
  RowSplitter(const float* x, int64_t stride, int64_t count, int64_t width, int64_t padded)
      : x_(x), stride_(stride), count_(count), width_(width), padded_(padded) {}

  // `rows`, a multiple of 16, of which `count` are there.
  void start(int64_t rows, BFloat16* out) { left_ = rows * padded_ / kBlockSide, out_ = out; }
  FASTATTN_INLINE void step() {
    if (left_ > 0) split();
  }
  void finish() {
    while (left_ > 0) split();
  }

 private:
  __attribute__((noinline)) void split() {
    BFloat16* at = out_ + row_ / kTileSide * kTileSide * kSplitParts * padded_ +
                   k_ / kBlockSide * kStepParts + row_ % kTileSide * kBlockSide;
    F32 x = numbers(k_), y = numbers(k_ + kLanes);
    for (int part = 0; part < kSplitParts; ++part, at += kTileBytes / 2) {
      store(at, x), store(at + kLanes, y);
      x = x - load(at), y = y - load(at + kLanes);
    }
    if ((k_ += kBlockSide) == padded_) k_ = 0, ++row_;
    --left_;
  }
  FASTATTN_INLINE F32 numbers(int64_t k) const {
    if (row_ >= count_ || k >= width_) return zero();
    const float* at = x_ + row_ * stride_ + k;
    return k + kLanes <= width_ ? load(at) : load_n(at, width_ - k);
  }

  const float* x_ = nullptr;
  int64_t stride_ = 0, count_ = 0, width_ = 0, padded_ = 0;
  BFloat16* out_ = nullptr;
  int64_t left_ = 0, row_ = 0, k_ = 0;
};

class TiledLinear {
 public:
  static int64_t bytes(const LinearArgs& a) {
    const int64_t padded = padded_steps(smaller(a.K, kPieceSteps));
    return kHeaderBytes + kSplitParts * padded * 2 * (kTiledRows + 2 * kTiledOutputs + kStripRows) +
           4 * kTiledRows * sums_of_row(a);
  }

  static int64_t rows_per_task(const LinearArgs&) { return kTiledRows; }

  static void run(const LinearArgs& a, int64_t index, void* scratch) {
    TiledLinear(a, index / a.groups() * a.rows_per_task, index % a.groups() * a.outputs_per_task,
                (char*)scratch)
        .run();
  }

 private:
  static constexpr int64_t kHeaderBytes = 64;

  // What x holds, for the next task of the same rows.
  struct Header {
    uint64_t call;
    int64_t row;
  };

  static int64_t padded_steps(int64_t steps) { return (steps + kBlockSide - 1) / kBlockSide * kBlockSide; }
  // Where k comes in pieces, all sums of a task wait for the last one.
  static int64_t sums_of_row(const LinearArgs& a) {
    return a.K > kPieceSteps ? (a.outputs_per_task + kTiledOutputs - 1) / kTiledOutputs * kTiledOutputs
                             : kTiledOutputs;
  }

  TiledLinear(const LinearArgs& a, int64_t row, int64_t begin, char* scratch)
      : a_(a), row_(row), begin_(begin), header_((Header*)scratch) {
    const int64_t part = padded_steps(smaller(a.K, kPieceSteps)) * 2;
    x_ = scratch + kHeaderBytes;
    weight_ = (BFloat16*)(x_ + kTiledRows * kSplitParts * part);
    next_weight_ = (BFloat16*)((char*)weight_ + kTiledOutputs * kSplitParts * part);
    strip_ = (BFloat16*)((char*)next_weight_ + kTiledOutputs * kSplitParts * part);
    sums_ = (float*)((char*)strip_ + kStripRows * kSplitParts * part);
    rows_ = smaller(a.M - row, a.rows_per_task);
    end_ = smaller(a.N, begin + a.outputs_per_task);
  }

  void run() {
    int64_t first = 0;
    do {
      steps_ = smaller(kPieceSteps, a_.K - first), padded_ = padded_steps(steps_);
      const bool last = first + steps_ >= a_.K;
      pack_x(first);
      split_weight(begin_, first);
      for (int64_t column = begin_; column < end_; column += kTiledOutputs) {
        const int64_t outputs = smaller(kTiledOutputs, end_ - column);
        take_weight();
        split_weight(column + kTiledOutputs, first);
        float* sums = sums_ + (a_.K > kPieceSteps ? (column - begin_) * kTiledRows : 0);
        for (int64_t r = 0; r < rows_; r += 2 * kStripRows) add_products(r, first > 0, sums_of(sums, r));
        for (int64_t r = 0; last && r < rows_; r += kPanelRows) {
          const int64_t count = smaller(kPanelRows, rows_ - r);
          repair(sums_of(sums, r), row_ + r, count, column, outputs);
          finish(a_, sums_of(sums, r), row_ + r, count, column, outputs);
        }
      }
      first += steps_;
    } while (first < a_.K);
  }

  // Of the outputs from `column` on, beside the products of those before them.
  void split_weight(int64_t column, int64_t first) {
    if (column >= end_) return;
    splitter_ = {a_.weight + column * a_.weight_row + first, a_.weight_row, end_ - column, steps_, padded_};
    splitter_.start(kTiledOutputs, next_weight_);
  }
  void take_weight() {
    splitter_.finish();
    BFloat16* const ready = next_weight_;
    next_weight_ = weight_, weight_ = ready;
  }

  // The sums [output][64 rows] of the panel that row r is in, at that row.
  static float* sums_of(float* sums, int64_t r) {
    return sums + r / kPanelRows * kPanelRows * kTiledOutputs + r % kPanelRows;
  }

  // x as [16 rows][step][part][pair of k][row], a word two neighbours of a row.
  void pack_x(int64_t first) {
    if (a_.K <= kPieceSteps && header_->call == a_.call && header_->row == row_) return;
    *header_ = {a_.call, row_};
    // The products take strips in twos.
    const int64_t pairs = (rows_ + 2 * kStripRows - 1) / (2 * kStripRows);
    for (int64_t r = 0; r < pairs * 2 * kStripRows; r += kStripRows) {
      RowSplitter strip(a_.x + (row_ + r) * a_.x_row + first, a_.x_row, rows_ - r, steps_, padded_);
      strip.start(kStripRows, strip_);
      strip.finish();
      for (int64_t tile = 0; tile < kSplitParts * padded_ / kBlockSide; ++tile) {
        const float* from = (const float*)strip_ + tile * kTileBytes / 4;
        float* to = (float*)x_at(r) + tile * kTileBytes / 4;
        F32 words[kTileSide];
        for (int i = 0; i < kTileSide; ++i) words[i] = load(from + i * kLanes);
        transpose(words);
        for (int i = 0; i < kTileSide; ++i) store(to + i * kLanes, words[i]);
      }
    }
  }

  char* x_at(int64_t r) const { return x_ + r * kSplitParts * padded_ * 2; }

  // 32 outputs by 32 rows from r on. Each piece of k sums from 0: of one long chain the roundings add up.
  void add_products(int64_t r, bool more, float* sums) {
    if (!more) {
      multiply(r, sums, kPanelRows);
      return;
    }
    alignas(64) float piece[kTiledOutputs * 2 * kStripRows];
    multiply(r, piece, 2 * kStripRows);
    for (int64_t j = 0; j < kTiledOutputs; ++j) {
      for (int64_t i = 0; i < 2 * kStripRows; i += kLanes) {
        float* at = sums + j * kPanelRows + i;
        store(at, load(at) + load(piece + j * 2 * kStripRows + i));
      }
    }
  }

  void multiply(int64_t r, float* sums, int64_t stride) {
    const int64_t row = stride * 4;
    char *c0 = (char*)sums, *c1 = c0 + kTileSide * row;
    Tiles::fence();
    tiles_.zero<0>(), tiles_.zero<1>(), tiles_.zero<2>(), tiles_.zero<3>();
    for (int64_t k = 0; k < padded_; k += kBlockSide) {
      load_weight(0, k), load_x(r, 0, k), multiply_tiles();
      load_x(r, 1, k), multiply_tiles();
      load_weight(1, k), multiply_tiles();
      load_x(r, 0, k), multiply_tiles();
      load_weight(2, k), multiply_tiles();
      load_weight(0, k), load_x(r, 2, k), multiply_tiles();
    }
    tiles_.store_free<0>(c0, row), tiles_.store_free<1>(c0 + kTileRowBytes, row);
    tiles_.store_free<2>(c1, row), tiles_.store_free<3>(c1 + kTileRowBytes, row);
    Tiles::fence();
  }

  FASTATTN_INLINE void load_weight(int part, int64_t k) {
    const char* at = (const char*)weight_ + k / kBlockSide * kStepParts * 2 + part * kTileBytes;
    tiles_.load_free<4>(at, kTileRowBytes),
        tiles_.load_free<5>(at + kTileSide * kSplitParts * padded_ * 2, kTileRowBytes);
  }
  FASTATTN_INLINE void load_x(int64_t r, int part, int64_t k) {
    const int64_t at = k / kBlockSide * kStepParts * 2 + part * kTileBytes;
    tiles_.load_free<6>(x_at(r) + at, kTileRowBytes),
        tiles_.load_free<7>(x_at(r + kStripRows) + at, kTileRowBytes);
  }
  FASTATTN_INLINE void multiply_tiles() {
    tiles_.multiply<0, 4, 6>(), tiles_.multiply<1, 4, 7>(), tiles_.multiply<2, 5, 6>(),
        tiles_.multiply<3, 5, 7>();
    splitter_.step();
  }

  // Sums that are not finite, in fp32.
  void repair(float* sums, int64_t row, int64_t rows, int64_t column, int64_t outputs) const {
    for (int64_t j = 0; j < outputs; ++j) {
      float* at = sums + j * kPanelRows;
      for (int64_t i = 0; i < rows; i += kLanes) {
        uint32_t bad = bits_of(is_nan(load(at + i) * zero())) & uint32_t(low_bits(rows - i));
        for (; bad; bad &= bad - 1) {
          const int64_t lane = i + __builtin_ctz(bad);
          at[lane] = dot(a_.x + (row + lane) * a_.x_row, a_.weight + (column + j) * a_.weight_row);
        }
      }
    }
  }

  float dot(const float* x, const float* w) const {
    F32 sum = zero();
    for (int64_t k = 0; k < a_.K; k += kLanes)
      sum = fma(load_n(x + k, a_.K - k), load_n(w + k, a_.K - k), sum);
    return reduce_add(sum);
  }

  Tiles tiles_{whole_tiles()};
  const LinearArgs& a_;
  const int64_t row_, begin_;
  Header* header_;
  char* x_;
  BFloat16 *weight_, *next_weight_, *strip_;
  RowSplitter splitter_;
  float* sums_;
  int64_t rows_, end_, steps_ = 0, padded_ = 0;
};

}  // namespace
}  // namespace fastattn
