// Tiles of Q, K, V and dO in shared memory, and a warp's products of them by mma.sync. A warp's accumulator
// is kRowTiles x n tiles of 16 x 8: lane l holds, of each, rows l / 4 and l / 4 + 8, columns l % 4 * 2 and
// the next.
#pragma once

#include "attention_args.cuh"
#include "ptx.h"

namespace fastattn::cuda {

// One head of an operand.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int columns;
  bool vectors;  // 16 bytes at a time

  __device__ __forceinline__ Rows(const Operand& o, int b, int h, int columns)
      : data(static_cast<const T*>(o.data) + b * o.batch + h * o.head),
        stride(o.row),
        columns(columns),
        vectors(reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0 && columns % 8 == 0) {}
};

// Starts to copy rows first.. of a head into a swizzled tile of kRows x kHead: row r where bit r of `wanted`
// is set, zeros elsewhere and beyond the last column. The caller commits the group.
template <int kRows, int kHead, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* tile, const Rows<T>& rows, int first, uint64_t wanted) {
  // Some lanes share a row; a pass is a multiple of 8 rows, so that a thread's places differ by constants.
  constexpr int kLanes = kHead % 64 == 0 ? 8 : 4, kPass = kThreads / kLanes;
  static_assert(kPass % 8 == 0 && kRows % kPass == 0, "whole passes, each of whole swizzle periods");
  const int thread = opaque(int(threadIdx.x)), my_row = thread / kLanes, my_col = thread % kLanes * 8;
  T* to = &tile[swizzle<kHead>(my_row, my_col)];
  wanted >>= my_row;
  if (rows.vectors) {
    const T* from = rows.data + (first + my_row) * rows.stride + my_col;
#pragma unroll
    for (int row = 0; row < kRows; row += kPass) {
#pragma unroll
      for (int col = 0; col < kHead; col += kLanes * 8) {
        const bool valid = (wanted >> row & 1) && my_col + col < rows.columns;
        cp_async_16(to + row * kHead + col, valid ? from + col : rows.data, valid);
      }
      from += kPass * rows.stride;
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kRows / kPass * (kHead / (kLanes * 8)); ++i) {
    const int row = i / (kHead / (kLanes * 8)) * kPass, col = i % (kHead / (kLanes * 8)) * (kLanes * 8);
    const T* from = rows.data + (first + my_row + row) * rows.stride + my_col + col;
#pragma unroll 1
    for (int j = 0; j < 8; ++j) {
      const bool valid = (wanted >> row & 1) && my_col + col + j < rows.columns;
      to[row * kHead + col + j] = valid ? from[j] : T{0};
    }
  }
}

// Where a lane's row of 16 bytes lies, for ldmatrix at tiles of 16 columns and whole eights of rows: one
// register and constants, since the swizzle only turns bits that no such step carries into.
template <int kHead>
class LanePlace {
 public:
  __device__ __forceinline__ LanePlace(int row, int col) : place_(swizzle<kHead>(row, col)) {}
  __device__ __forceinline__ int at(int row, int col) const {
    constexpr int kLine = kHead % 64 == 0 ? 64 : 32;
    return (place_ ^ (col % kLine)) + row * kHead + col / kLine * kLine;
  }

 private:
  const int place_;
};

// s += a b^T: rows `row` on of a tile A against kTilesN * 8 rows of a tile B, both kHead wide.
template <int kHead, int kRowTiles, int kTilesN, class T>
__device__ __forceinline__ void multiply_transposed(float (&s)[kRowTiles][kTilesN][4], const T* a, int row,
                                                    const T* b) {
  static_assert(kTilesN % 2 == 0, "B is read 16 rows at a time");
  const int lane = int(threadIdx.x) % kWarp;
  const LanePlace<kHead> of_a(row + lane % 16, lane / 16 * 8),
      of_b(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);
#pragma unroll
  for (int k = 0; k < kHead; k += 16) {
    uint32_t left[kRowTiles][4];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) ldmatrix_x4(left[t], &a[of_a.at(t * 16, k)]);
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t right[4];
      ldmatrix_x4(right, &b[of_b.at(n * 8, k)]);
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        mma_m16n8k16<T>(s[t][n], left[t], right[0], right[1]);
        mma_m16n8k16<T>(s[t][n + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// out += p b: an accumulator p of kTilesN * 8 columns, rounded, against as many rows of a tile B, whose
// columns `col` to col + 8 * kTilesD - 1 count.
template <int kHead, int kRowTiles, int kTilesN, int kTilesD, class T>
__device__ __forceinline__ void multiply_rounded(float (&out)[kRowTiles][kTilesD][4],
                                                 const float (&p)[kRowTiles][kTilesN][4], const T* b,
                                                 int col) {
  static_assert(kTilesN % 2 == 0 && kTilesD % 2 == 0, "B is read 16 x 16 elements at a time");
  const int lane = int(threadIdx.x) % kWarp;
  const LanePlace<kHead> of_b(lane % 16, lane / 16 * 8);
#pragma unroll
  for (int n = 0; n < kTilesN; n += 2) {
    uint32_t left[kRowTiles][4];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      left[t][0] = pack<T>(p[t][n][0], p[t][n][1]);
      left[t][1] = pack<T>(p[t][n][2], p[t][n][3]);
      left[t][2] = pack<T>(p[t][n + 1][0], p[t][n + 1][1]);
      left[t][3] = pack<T>(p[t][n + 1][2], p[t][n + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < kTilesD; d += 2) {
      uint32_t right[4];
      ldmatrix_x4_trans(right, &b[of_b.at(n * 8, col + d * 8)]);
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        mma_m16n8k16<T>(out[t][d], left[t], right[0], right[1]);
        mma_m16n8k16<T>(out[t][d + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// Writes two neighbouring numbers of a row, of which `count` exist; in T, or in fp32.
template <class T>
__device__ __forceinline__ void store_pair(void* data, int64_t at, bool fp32, int count, float x, float y) {
  if (fp32) {
    float* to = static_cast<float*>(data) + at;
    if (count > 0) to[0] = x;
    if (count > 1) to[1] = y;
    return;
  }
  T* to = static_cast<T*>(data) + at;
  if (count > 1 && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to) = pack<T>(x, y);
  } else {
    if (count > 0) to[0] = from_float<T>(x);
    if (count > 1) to[1] = from_float<T>(y);
  }
}

// Over the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shfl_xor(x, 1));
  return fmaxf(x, shfl_xor(x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

}  // namespace fastattn::cuda
