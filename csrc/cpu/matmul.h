// The register tile of every matrix product: C[rows][lanes] = C0 + sum over k of A(row, k) * B[k][lanes].
//
// B and C are rows of lanes, by default 64 of them (kGranule floats apart); A is read in place, one number
// broadcast a step. A product is fp32 FMA, or a dot of bf16 pairs where the machine has it; then A and B hold
// pairs.
#pragma once

#include "attention_args.h"
#include "prefetch.h"

namespace fastattn {
namespace {

constexpr int kTileRows = 6;
constexpr int kVectors = kGranule / kLanes;  // lane vectors of a granule

struct FmaProduct {
  using B = F32;
  static FASTATTN_INLINE B load_b(const float* p) { return load(p); }
  static FASTATTN_INLINE F32 step(const char* a, B b, F32 acc) {
    return fma(splat(*(const float*)a), b, acc);
  }
};

#ifdef FASTATTN_HAS_DOT2
struct Dot2Product {
  using B = I32;
  static FASTATTN_INLINE B load_b(const float* p) { return load((const int32_t*)p); }
  static FASTATTN_INLINE F32 step(const char* a, B b, F32 acc) {
    int32_t pair;
    memcpy(&pair, a, 4);
    return dot2(splat_int(pair), b, acc);
  }
};
#endif

// Where A lies: element (row, k) at data + row * row_bytes + k * step_bytes. One of the two is 4.
struct Broadcast {
  const char* data;
  int64_t row_bytes, step_bytes;
};

// Where a sum starts: at 0, at what C holds, or at 0 to be added to C, which keeps long sums in short chains.
enum class Start { kZero, kAccumulate, kAdd };

// Aligned, so that the loop lies in cache lines the same way in every build: it ran up to 5 % slower
// elsewhere.
template <class Product, Start START, bool ROWS_ADJACENT, int ROWS, int VECTORS>
__attribute__((noinline, aligned(64))) void tile(Broadcast a, int64_t steps, const float* b, int64_t b_stride,
                                                 float* c, int64_t c_stride) {
  F32 acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      acc[i][j] = START == Start::kAccumulate ? load(c + i * c_stride + j * kLanes) : zero();
    }
  }
  const int64_t row_bytes = ROWS_ADJACENT ? 4 : a.row_bytes, step_bytes = ROWS_ADJACENT ? a.step_bytes : 4;
  const char* p = a.data;
#pragma GCC unroll 2
  for (int64_t k = 0; k < steps; ++k, p += step_bytes, b += b_stride) {
    typename Product::B row[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) row[j] = Product::load_b(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = Product::step(p + i * row_bytes, row[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      float* out = c + i * c_stride + j * kLanes;
      store(out, START == Start::kAdd ? load(out) + acc[i][j] : acc[i][j]);
    }
  }
}

template <class Product, Start START, bool ROWS_ADJACENT, int VECTORS>
void column(Broadcast a, int64_t rows, int64_t steps, const float* b, int64_t b_stride, float* c,
            int64_t c_stride, Prefetch* prefetch) {
  const auto advance = [&](int n) {
    if (prefetch) prefetch->step();
    a.data += n * (ROWS_ADJACENT ? 4 : a.row_bytes);
    c += n * c_stride;
    rows -= n;
  };
  for (; rows >= 6; advance(6))
    tile<Product, START, ROWS_ADJACENT, 6, VECTORS>(a, steps, b, b_stride, c, c_stride);
  if (rows >= 4)
    tile<Product, START, ROWS_ADJACENT, 4, VECTORS>(a, steps, b, b_stride, c, c_stride), advance(4);
  if (rows >= 2)
    tile<Product, START, ROWS_ADJACENT, 2, VECTORS>(a, steps, b, b_stride, c, c_stride), advance(2);
  if (rows >= 1) tile<Product, START, ROWS_ADJACENT, 1, VECTORS>(a, steps, b, b_stride, c, c_stride);
}

// All rows, lane vectors [from, to), with `prefetch` (or null) between the register tiles. The strides of B's
// steps and C's rows are in floats.
template <class Product, Start START, bool ROWS_ADJACENT>
void product(Broadcast a, int64_t rows, int64_t steps, const float* b, float* c, int from, int to,
             int64_t b_stride = kGranule, int64_t c_stride = kGranule, Prefetch* prefetch = nullptr) {
  static_assert(kTileVectors == 2 || kTileVectors == 4, "the cases below");
  for (int v = from; v < to; v += kTileVectors) {
    const float* bv = b + v * kLanes;
    float* cv = c + v * kLanes;
    switch (to - v < kTileVectors ? to - v : kTileVectors) {
      case 1:
        column<Product, START, ROWS_ADJACENT, 1>(a, rows, steps, bv, b_stride, cv, c_stride, prefetch);
        break;
      case 2:
        column<Product, START, ROWS_ADJACENT, 2>(a, rows, steps, bv, b_stride, cv, c_stride, prefetch);
        break;
      case 3:
        if constexpr (kTileVectors == 4)
          column<Product, START, ROWS_ADJACENT, 3>(a, rows, steps, bv, b_stride, cv, c_stride, prefetch);
        break;
      case 4:
        if constexpr (kTileVectors == 4)
          column<Product, START, ROWS_ADJACENT, 4>(a, rows, steps, bv, b_stride, cv, c_stride, prefetch);
        break;
    }
  }
}

}  // namespace
}  // namespace fastattn
