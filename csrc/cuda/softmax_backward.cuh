// Backward of softmax, from its result:
//
//   ds = y * (dy - sum(dy * y)),   dx = scale * ds
//   dbias = the sum of ds over the rows that share a row of bias
//
// dx in the regimes of softmax.cuh, with half as much of a row to a thread because two tensors are kept. For
// dbias the dots are written out, and a second kernel adds columns through the rows that share one of bias;
// where those are split, their sums are added in order. A row that mask and bias emptied has y = 0, so a
// gradient of 0.
#pragma once

#include "column_sums.cuh"
#include "rows.cuh"

namespace fastattn::cuda {

constexpr int kSoftmaxBackwardElements = 16;

template <class Y, class X, int kLanes>
__global__ void __launch_bounds__(kLanes == 0 ? kMaxThreads : kWarpBlock)
    softmax_backward_rows(SoftmaxBackwardCall a) {
  constexpr int kPack = kPackOf<Y>, kPacks = kSoftmaxBackwardElements / kPack;
  Team<kLanes> team;
  const int64_t given = int64_t(blockIdx.x) * team.count() + team.index();
  const int64_t row = smaller(given, a.grid.rows - 1);
  const int width = int(a.width);
  float y[kPacks][kPack], dy[kPacks][kPack];
  load_packs(team, static_cast<const Y*>(a.y.data) + a.grid.offset(a.y.stride, row), a.y.aligned, 0, width,
             y);
  load_packs(team, static_cast<const Y*>(a.dy.data) + a.grid.offset(a.dy.stride, row), a.dy.aligned, 0, width,
             dy);
  float dot = 0.f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) dot = fmaf(y[p][e], dy[p][e], dot);
  }
  dot = team.reduce_one(dot, Add{});
  if (a.dots && team.thread() == 0 && given == row) a.dots[row] = dot;
  if (!a.dx.data) return;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) y[p][e] = y[p][e] * (dy[p][e] - dot) * a.scale;
  }
  X* dx = static_cast<X*>(a.dx.data) + a.grid.offset(a.dx.stride, row);
  store_packs(team, dx, a.dx.aligned, 0, given == row ? width : 0, y);
}

constexpr int kBackwardLoopThreads = 512;

template <class Y, class X>
__global__ void __launch_bounds__(kBackwardLoopThreads) softmax_backward_looped(SoftmaxBackwardCall a) {
  constexpr int kPack = kPackOf<Y>, kPacks = 1;
  Team<0> team;
  const int64_t row = blockIdx.x;
  const int width = int(a.width), step = team.threads() * kPacks * kPack;
  const Y* y_row = static_cast<const Y*>(a.y.data) + a.grid.offset(a.y.stride, row);
  const Y* dy_row = static_cast<const Y*>(a.dy.data) + a.grid.offset(a.dy.stride, row);
  float y[kPacks][kPack], dy[kPacks][kPack], dot = 0.f;
#pragma unroll 2
  for (int first = 0; first < width; first += step) {
    load_packs(team, y_row, a.y.aligned, first, width, y);
    load_packs(team, dy_row, a.dy.aligned, first, width, dy);
#pragma unroll
    for (int e = 0; e < kPack; ++e) dot = fmaf(y[0][e], dy[0][e], dot);
  }
  dot = team.reduce_one(dot, Add{});
  if (a.dots && team.thread() == 0) a.dots[row] = dot;
  if (!a.dx.data) return;
  X* dx = static_cast<X*>(a.dx.data) + a.grid.offset(a.dx.stride, row);
#pragma unroll 2
  for (int first = 0; first < width; first += step) {
    load_packs(team, y_row, a.y.aligned, first, width, y);
    load_packs(team, dy_row, a.dy.aligned, first, width, dy);
#pragma unroll
    for (int e = 0; e < kPack; ++e) y[0][e] = y[0][e] * (dy[0][e] - dot) * a.scale;
    store_packs(team, dx, a.dx.aligned, first, width, y);
  }
}

// Rows whose elements are not adjacent, as in softmax_columns.
constexpr int kBackwardColumnWarps = 8;

struct SoftmaxBackwardShared {
  float dot[kBackwardColumnWarps][32];
};

template <class Y, class X>
__global__ void __launch_bounds__(kBackwardColumnWarps * 32) softmax_backward_columns(SoftmaxBackwardCall a) {
  auto& shared = shared_storage<SoftmaxBackwardShared>();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, width = int(a.width);
  const int64_t given = int64_t(blockIdx.x) * 32 + lane, row = smaller(given, a.grid.rows - 1);
  const Y* y = static_cast<const Y*>(a.y.data) + a.grid.offset(a.y.stride, row);
  const Y* dy = static_cast<const Y*>(a.dy.data) + a.grid.offset(a.dy.stride, row);
  float sum = 0.f;
#pragma unroll 4
  for (int column = warp; column < width; column += kBackwardColumnWarps) {
    sum = fmaf(to_float(y[column * a.y.column]), to_float(dy[column * a.dy.column]), sum);
  }
  shared.dot[warp][lane] = sum;
  __syncthreads();
  float dot = 0.f;
  for (int w = 0; w < kBackwardColumnWarps; ++w) dot += shared.dot[w][lane];
  if (given != row) return;
  if (a.dots && warp == 0) a.dots[row] = dot;
  if (!a.dx.data) return;
  X* dx = static_cast<X*>(a.dx.data) + a.grid.offset(a.dx.stride, row);
#pragma unroll 4
  for (int column = warp; column < width; column += kBackwardColumnWarps) {
    const float ds = to_float(y[column * a.y.column]) * (to_float(dy[column * a.dy.column]) - dot);
    dx[column * a.dx.column] = from_float<X>(ds * a.scale);
  }
}

// dbias, or its parts: block = (sum of rows, columns), a column a thread.
constexpr int kBiasThreads = 128;

template <class Y>
__global__ void __launch_bounds__(kBiasThreads) softmax_backward_bias(SoftmaxBackwardCall a) {
  const int64_t blocks = (a.width + kBiasThreads - 1) / kBiasThreads;
  const int64_t task = blockIdx.x / blocks, column = blockIdx.x % blocks * kBiasThreads + threadIdx.x;
  if (column >= a.width) return;
  const int64_t bias_row = task / a.split, part = task % a.split;
  const int64_t begin = bias_row * a.shared + part * a.shared / a.split;
  const int64_t end = bias_row * a.shared + (part + 1) * a.shared / a.split;
  float sum = 0.f;
#pragma unroll 4
  for (int64_t row = begin; row < end; ++row) {
    const Y y = static_cast<const Y*>(a.y.data)[a.grid.offset(a.y.stride, row) + column * a.y.column];
    const Y dy = static_cast<const Y*>(a.dy.data)[a.grid.offset(a.dy.stride, row) + column * a.dy.column];
    sum = fmaf(to_float(y), to_float(dy) - a.dots[row], sum);
  }
  if (a.split > 1) {
    a.parts[task * a.width + column] = sum;
  } else {
    store_number(a.dbias, bias_row * a.width + column, sum);
  }
}

template <class Y, class X>
int softmax_backward(const SoftmaxBackwardCall& a, void* stream) {
  const int64_t rows = a.grid.rows;
  const auto rows_pass = [&] {
    if (a.y.column != 1 || a.dy.column != 1 || (a.dx.data && a.dx.column != 1)) {
      return start(softmax_backward_columns<Y, X>, (rows + 31) / 32, kBackwardColumnWarps * 32,
                   sizeof(SoftmaxBackwardShared), stream, a);
    }
    const bool exchange = staged(a.y) || staged(a.dy) || staged(a.dx);
    const auto by_warps = [&](auto kernel, int lanes) {
      const int teams = kWarpBlock / lanes;
      return start(kernel, (rows + teams - 1) / teams, kWarpBlock, row_shared_bytes(kWarpBlock, exchange),
                   stream, a);
    };
    if (a.width <= 8 * kSoftmaxBackwardElements) return by_warps(softmax_backward_rows<Y, X, 8>, 8);
    if (a.width <= 32 * kSoftmaxBackwardElements) return by_warps(softmax_backward_rows<Y, X, 32>, 32);
    if (a.width <= kMaxThreads * kSoftmaxBackwardElements) {
      const int threads = block_threads(a.width, kSoftmaxBackwardElements);
      return start(softmax_backward_rows<Y, X, 0>, rows, threads, row_shared_bytes(threads, exchange), stream,
                   a);
    }
    return start(softmax_backward_looped<Y, X>, rows, kBackwardLoopThreads,
                 row_shared_bytes(kBackwardLoopThreads, exchange), stream, a);
  };
  if (const int error = rows_pass(); error != 0 || !a.dbias.data) return error;
  const int64_t bias_rows = rows / a.shared, blocks = (a.width + kBiasThreads - 1) / kBiasThreads;
  const int error = start(softmax_backward_bias<Y>, bias_rows * a.split * blocks, kBiasThreads, 0, stream, a);
  if (error != 0 || a.split == 1) return error;
  return add_column_sums({a.parts, a.split, a.width, bias_rows, a.dbias}, stream);
}

}  // namespace fastattn::cuda
