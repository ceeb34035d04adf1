// out [groups, width] = the sum of each group's parts, [groups, parts, width] fp32, in a fixed order.
#pragma once

#include "rows.cuh"

namespace fastattn::cuda {

// One number of a tensor of any storage.
__device__ __forceinline__ void store_number(const RowTensor& t, int64_t at, float x) {
  with_storage(t, at, [&](auto* to) { *to = from_float<std::remove_reference_t<decltype(*to)>>(x); });
}

struct ColumnSums {
  const float* parts;
  int64_t count, width, groups;
  RowOperand out;
};

// 32 columns a block; each warp adds a slice of the parts, the slices are added in order.
constexpr int kSumWarps = 8;

struct ColumnSumsShared {
  float slice[kSumWarps][32];
};

static __global__ void __launch_bounds__(kSumWarps * 32) column_sums(ColumnSums a) {
  auto& shared = shared_storage<ColumnSumsShared>();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t blocks = (a.width + 31) / 32, group = blockIdx.x / blocks;
  const int64_t column = blockIdx.x % blocks * 32 + lane;
  const float* parts = a.parts + group * a.count * a.width + column;
  float sum = 0.f;
  if (column < a.width) {
#pragma unroll 4
    for (int64_t p = warp * a.count / kSumWarps; p < (warp + 1) * a.count / kSumWarps; ++p)
      sum += parts[p * a.width];
  }
  shared.slice[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= a.width) return;
  float total = 0.f;
  for (int w = 0; w < kSumWarps; ++w) total += shared.slice[w][lane];
  store_number(a.out, group * a.width + column, total);
}

inline int add_column_sums(const ColumnSums& a, void* stream) {
  return start(column_sums, a.groups * ((a.width + 31) / 32), kSumWarps * 32, sizeof(ColumnSumsShared),
               stream, a);
}

}  // namespace fastattn::cuda
