// Backward of LayerNorm and RMSNorm, from h and the statistics of the forward. With g = dy * (weight +
// offset) and n = (h - mean) * rstd:
//
//   dh = rstd * (g - mean(g) - n * mean(g * n)) + dsum
//   dweight = sum over rows of dy * n,   dbias = sum over rows of dy
//
// without mean(g) for RMSNorm; dsum is the gradient that reached the sum of add + norm by itself.
//
// Rows are split into norm_groups(width) groups. Up to 8192 columns (4096 of fp32) a block stays with a
// group: each row is read once, dh written, and the sums of a thread's columns stay in registers until the
// group ends. A longer row is looped over for dh, and another kernel adds its columns through the rows of a
// group. The groups' sums are added in order. No atomics; how rows fall into groups, warps and threads
// depends on shape and dtype only.
#pragma once

#include "column_sums.cuh"
#include "rows.cuh"

namespace fastattn::cuda {

constexpr int kNormBackwardThreads = 512;  // so that a thread may have 128 registers
constexpr int kNormWarpThreads = 256;
// Columns of h, dy and both sums in a thread's registers; packs of fp32 hold half as many.
template <class H>
constexpr int kNormBackwardElements = sizeof(H) == 4 ? 8 : 16;

struct RowStats {
  float mean, rest, rstd;
};

__device__ __forceinline__ RowStats stats_of(const NormBackwardCall& a, int64_t row) {
  if (a.rms) return {0.f, 0.f, a.stats[row]};
  return {a.stats[a.grid.rows + row], a.stats[2 * a.grid.rows + row], a.stats[row]};
}

__device__ __forceinline__ float normalised(float h, const RowStats& s) {
  return ((h - s.mean) - s.rest) * s.rstd;
}

// Loads packs of h as n, and of dy.
template <class H, int kPacks, int kPack, int kLanes>
__device__ __forceinline__ void load_row(const NormBackwardCall& a, const Team<kLanes>& team, int64_t row,
                                         const RowStats& s, int first, float (&n)[kPacks][kPack],
                                         float (&dy)[kPacks][kPack]) {
  const int width = int(a.width);
  load_packs(team, static_cast<const H*>(a.h.data) + a.grid.offset(a.h.stride, row), a.h.aligned, first,
             width, n);
  with_storage(a.dy, a.grid.offset(a.dy.stride, row),
               [&](const auto* from) { load_packs(team, from, a.dy.aligned, first, width, dy); });
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = column_of<kPack>(team, first, p);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const bool inside = column + e < width;
      n[p][e] = inside ? normalised(n[p][e], s) : 0.f;
      dy[p][e] = inside ? dy[p][e] : 0.f;
    }
  }
}

// dy to g, in place.
template <int kPacks, int kPack, int kLanes>
__device__ __forceinline__ void weigh(const NormBackwardCall& a, const Team<kLanes>& team, int first,
                                      float (&dy)[kPacks][kPack]) {
  if (!a.weight.data) return;
  with_storage(a.weight, 0, [&](const auto* weight) {
    const auto packs = [&](auto aligned) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        float w[kPack];
        load_pack<decltype(aligned)::value>(team, weight, first, p, int(a.width), w);
#pragma unroll
        for (int e = 0; e < kPack; ++e) dy[p][e] *= w[e] + a.weight_offset;
      }
    };
    a.weight.aligned ? packs(std::true_type{}) : packs(std::false_type{});
  });
}

// The sums that give mean(g) and mean(g * n).
template <int kPacks, int kPack>
__device__ __forceinline__ void add_means(const float (&n)[kPacks][kPack], const float (&g)[kPacks][kPack],
                                          float (&sums)[2]) {
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      sums[0] += g[p][e];
      sums[1] = fmaf(g[p][e], n[p][e], sums[1]);
    }
  }
}

// n to dh, in place, and to memory.
template <class H, int kPacks, int kPack, int kLanes>
__device__ __forceinline__ void store_dh(const NormBackwardCall& a, const Team<kLanes>& team, int64_t row,
                                         bool write, int first, float rstd, float mean_g, float mean_gn,
                                         float (&n)[kPacks][kPack], const float (&g)[kPacks][kPack]) {
  const int width = int(a.width);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) n[p][e] = rstd * (g[p][e] - mean_g - n[p][e] * mean_gn);
  }
  if (a.dsum.data) {
    const H* dsum = static_cast<const H*>(a.dsum.data) + a.grid.offset(a.dsum.stride, row);
    const auto packs = [&](auto aligned) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        float d[kPack];
        load_pack<decltype(aligned)::value>(team, dsum, first, p, width, d);
#pragma unroll
        for (int e = 0; e < kPack; ++e) n[p][e] += d[e];
      }
    };
    a.dsum.aligned ? packs(std::true_type{}) : packs(std::false_type{});
  }
  store_packs(team, static_cast<H*>(a.dx.data) + a.grid.offset(a.dx.stride, row), a.dx.aligned, first,
              write ? width : 0, n);
}

// The sums of a block's teams, added in the teams' order.
struct NormBackwardMerge {
  float weight[512], bias[512];
};
// Shared memory of a block of several teams: the merge stands behind what Team uses.
inline size_t norm_backward_shared(int threads, bool exchange, bool merges) {
  return row_shared_bytes(threads, exchange) + (merges ? sizeof(NormBackwardMerge) : 0);
}

template <class H, int kLanes>
__global__ void __launch_bounds__(kLanes == 0 ? kNormBackwardThreads : kNormWarpThreads, 1)
    norm_backward_rows(NormBackwardCall a, bool exchange) {
  constexpr int kPack = kPackOf<H>, kPacks = kNormBackwardElements<H> / kPack;
  Team<kLanes> team;
  const int64_t groups = a.groups, group = blockIdx.x;
  const int64_t begin = group * a.grid.rows / groups, end = (group + 1) * a.grid.rows / groups;
  const float inverse = 1.f / float(a.width);
  float dweight[kPacks][kPack] = {}, dbias[kPacks][kPack] = {}, n[kPacks][kPack], g[kPacks][kPack];
  // All teams go round as often, so that those of a warp stay together.
  for (int64_t at = begin; at < end; at += team.count()) {
    const int64_t given = at + team.index(), row = smaller(given, end - 1);
    const RowStats s = stats_of(a, row);
    load_row<H>(a, team, row, s, 0, n, g);
    if (given == row) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          dweight[p][e] = fmaf(g[p][e], n[p][e], dweight[p][e]);
          dbias[p][e] += g[p][e];
        }
      }
    }
    if (!a.dx.data) continue;
    weigh(a, team, 0, g);
    float sums[2] = {};
    add_means(n, g, sums);
    team.reduce(sums, Add{});
    store_dh<H>(a, team, row, given == row, 0, s.rstd, a.rms ? 0.f : sums[0] * inverse, sums[1] * inverse, n,
                g);
  }
  const auto each = [&](auto f) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = column_of<kPack>(team, 0, p);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (column + e < a.width) f(column + e, dweight[p][e], dbias[p][e]);
      }
    }
  };
  const bool sums_weight = a.weight_parts != nullptr, sums_bias = a.bias_parts != nullptr;
  if (!sums_weight && !sums_bias) return;
  if constexpr (kLanes == 0) {
    each([&](int column, float weight, float bias) {
      if (sums_weight) a.weight_parts[group * a.width + column] = weight;
      if (sums_bias) a.bias_parts[group * a.width + column] = bias;
    });
  } else {
    auto& merge = *reinterpret_cast<NormBackwardMerge*>(
        reinterpret_cast<unsigned char*>(&shared_storage<RowShared>()) + sizeof(RowShared) +
        (exchange ? int(blockDim.x) / 32 * kStageBytes : 0));
    for (int t = 0; t < team.count(); ++t) {
      if (t == team.index()) {
        each([&](int column, float weight, float bias) {
          merge.weight[column] = t == 0 ? weight : merge.weight[column] + weight;
          merge.bias[column] = t == 0 ? bias : merge.bias[column] + bias;
        });
      }
      __syncthreads();
    }
    for (int column = int(threadIdx.x); column < a.width; column += int(blockDim.x)) {
      if (sums_weight) a.weight_parts[group * a.width + column] = merge.weight[column];
      if (sums_bias) a.bias_parts[group * a.width + column] = merge.bias[column];
    }
  }
}

// dh of rows of any width, a block each.
template <class H>
__global__ void __launch_bounds__(kNormBackwardThreads, 2) norm_backward_looped(NormBackwardCall a) {
  constexpr int kPack = kPackOf<H>, kPacks = 8 / kPack;
  Team<0> team;
  const int64_t row = blockIdx.x;
  const int width = int(a.width), step = team.threads() * kPacks * kPack;
  const float inverse = 1.f / float(width);
  const RowStats s = stats_of(a, row);
  float n[kPacks][kPack], g[kPacks][kPack], sums[2] = {};
  for (int first = 0; first < width; first += step) {
    load_row<H>(a, team, row, s, first, n, g);
    weigh(a, team, first, g);
    add_means(n, g, sums);
  }
  team.reduce(sums, Add{});
  for (int first = 0; first < width; first += step) {
    load_row<H>(a, team, row, s, first, n, g);
    weigh(a, team, first, g);
    store_dh<H>(a, team, row, true, first, s.rstd, a.rms ? 0.f : sums[0] * inverse, sums[1] * inverse, n, g);
  }
}

// The sums of a group of long rows: a block a group and a range of columns, a pack a thread.
constexpr int kNormColumnThreads = 128;

template <class H>
__global__ void __launch_bounds__(kNormColumnThreads) norm_backward_columns(NormBackwardCall a) {
  constexpr int kPack = kPackOf<H>;
  Team<0> team;
  const int64_t blocks = (a.width + kNormColumnThreads * kPack - 1) / (kNormColumnThreads * kPack);
  const int64_t groups = a.groups, group = blockIdx.x / blocks;
  const int first = int(blockIdx.x % blocks) * kNormColumnThreads * kPack;
  float dweight[kPack] = {}, dbias[kPack] = {}, n[1][kPack], dy[1][kPack];
#pragma unroll 2
  for (int64_t row = group * a.grid.rows / groups; row < (group + 1) * a.grid.rows / groups; ++row) {
    load_row<H>(a, team, row, stats_of(a, row), first, n, dy);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      dweight[e] = fmaf(dy[0][e], n[0][e], dweight[e]);
      dbias[e] += dy[0][e];
    }
  }
  const int column = column_of<kPack>(team, first, 0);
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    if (column + e >= a.width) break;
    if (a.weight_parts) a.weight_parts[group * a.width + column + e] = dweight[e];
    if (a.bias_parts) a.bias_parts[group * a.width + column + e] = dbias[e];
  }
}

template <class H>
int norm_backward(const NormBackwardCall& a, void* stream) {
  const bool exchange = staged(a.h) || staged(a.dy) || staged(a.dsum) || staged(a.dx) || staged(a.weight);
  const int64_t groups = a.groups;
  const bool sums = a.weight_parts || a.bias_parts;
  int error = 0;
  constexpr int kElements = kNormBackwardElements<H>;
  if (a.width <= kNormBackwardThreads * kElements) {
    const bool by_lanes = a.width <= 8 * kElements, by_warps = a.width <= 32 * kElements;
    const int threads = by_warps ? kNormWarpThreads : block_threads(a.width, kElements);
    const auto kernel = by_lanes   ? norm_backward_rows<H, 8>
                        : by_warps ? norm_backward_rows<H, 32>
                                   : norm_backward_rows<H, 0>;
    error = int(launch(kernel, dim3(unsigned(groups)), dim3(unsigned(threads)),
                       norm_backward_shared(threads, exchange, by_warps && sums),
                       static_cast<cudaStream_t>(stream), a, exchange));
  } else {
    if (a.dx.data) {
      error = start(norm_backward_looped<H>, a.grid.rows, kNormBackwardThreads,
                    row_shared_bytes(kNormBackwardThreads, exchange), stream, a);
    }
    if (sums && error == 0) {
      const int64_t columns = kNormColumnThreads * kPackOf<H>, blocks = (a.width + columns - 1) / columns;
      error = start(norm_backward_columns<H>, groups * blocks, kNormColumnThreads,
                    row_shared_bytes(kNormColumnThreads, exchange), stream, a);
    }
  }
  if (a.weight_parts && error == 0)
    error = add_column_sums({a.weight_parts, groups, a.width, 1, a.dweight}, stream);
  if (a.bias_parts && error == 0)
    error = add_column_sums({a.bias_parts, groups, a.width, 1, a.dbias}, stream);
  return error;
}

}  // namespace fastattn::cuda
