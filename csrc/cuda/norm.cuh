// LayerNorm and RMSNorm of rows, alone or after adding a residual.
//
//   y = (h - mean) / sqrt(mean((h - mean)^2) + eps) * (weight + offset) + bias
//   y = h / sqrt(mean(h^2) + eps) * (weight + offset)
//
// Up to 16384 columns a row stays in registers, with 8 lanes, a warp or a block to it; statistics take two
// passes over it, a mean and then the squares around it, and what rounding left of the mean is subtracted
// too: a mean of a million times the deviation does not cancel. A longer row is looped over: its squares are
// taken around the mean of its first 2048 columns, whose distance from the row's mean can cost no more digits
// than the share of the row that those columns are. A row whose squares leave the range of float is scaled by
// a power of two first.
#pragma once

#include "rows.cuh"

namespace fastattn::cuda {

constexpr int kNormLoopThreads = 256, kNormLoopElements = 8;

struct RowMoments {
  float mean, rest, variance;  // mean + rest is the mean
};

// How a row is normalised: (h * power - mean - rest) * rstd.
struct RowScaling {
  float power, mean, rest, rstd;
};

// The moments from the sums of d = h - pivot and of its squares over a row; of RMSNorm, around 0.
__device__ __forceinline__ RowMoments moments_of(bool rms, float pivot, float sum, float squares,
                                                 float inverse) {
  if (rms) return {0.f, 0.f, squares * inverse};
  const float shift = sum * inverse, mean = pivot + shift;
  // max(), but keeping NaN
  const float variance = squares * inverse - shift * shift;
  return {mean, shift - (mean - pivot), variance < 0.f ? 0.f : variance};
}

// Squares that overflowed, or that lost digits to underflow which eps does not hide.
__device__ __forceinline__ bool out_of_range(float variance, float eps) {
  return !(variance < 0x1p110f) || (variance < 0x1p-100f && eps < 0x1p-76f);
}

// The power of two that brings the largest magnitude to [1, 2); 1 where there is none.
__device__ __forceinline__ float taming_power(float peak) {
  if (!(peak > 0.f) || !(peak <= kLargest)) return 1.f;
  const int exponent = int(as_bits(peak) >> 23);  // 0 for subnormals
  return from_bits(uint32_t(exponent == 0 ? 253 : exponent > 253 ? 1 : 254 - exponent) << 23);
}

// 1 / sqrt(variance + eps * power^2) where the row was multiplied by `power`. The product may leave the range
// of float, its root does not; a row without variance is 0, not 0 * inf, as long as there is an eps.
__device__ __forceinline__ float inverse_root(float variance, float eps, float power) {
  if (power == 1.f) return 1.f / sqrtf(variance + eps);
  const float floor = sqrtf(eps) * power;
  if (floor > 0x1p20f) return 1.f / floor;
  const float rstd = 1.f / sqrtf(fmaf(floor, floor, variance));
  return eps > 0.f && rstd > kLargest ? kLargest : rstd;
}

__device__ __forceinline__ void keep_stats(const NormCall& a, int64_t row, const RowScaling& s) {
  a.stats[row] = s.rstd * s.power;
  if (!a.rms) {
    a.stats[a.grid.rows + row] = s.mean / s.power;
    a.stats[2 * a.grid.rows + row] = s.power == 1.f ? s.rest : 0.f;
  }
}

// Packs of a row of h = x, or of x + residual as sum's storage holds it, which is stored.
template <class X, int kPacks, int kPack, int kLanes>
__device__ __forceinline__ void load_h(const NormCall& a, const Team<kLanes>& team, int64_t row, int first,
                                       int width, bool write, float (&h)[kPacks][kPack]) {
  load_packs(team, static_cast<const X*>(a.x.data) + a.grid.offset(a.x.stride, row), a.x.aligned, first,
             width, h);
  if (!a.residual.data) return;
  with_storage(a.residual, a.grid.offset(a.residual.stride, row), [&](const auto* residual) {
    float r[kPacks][kPack];
    load_packs(team, residual, a.residual.aligned, first, width, r);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) h[p][e] = rounded(h[p][e] + r[p][e], a.sum.storage);
    }
  });
  with_storage(a.sum, a.grid.offset(a.sum.stride, row),
               [&](auto* sum) { store_packs(team, sum, a.sum.aligned, first, write ? width : 0, h); });
}

// h to y, in place. Packs are finished one by one, so that few weights are in registers at a time.
template <int kPacks, int kPack, int kLanes>
__device__ __forceinline__ void normalise(const NormCall& a, const Team<kLanes>& team, int first, int width,
                                          const RowScaling& s, float (&h)[kPacks][kPack]) {
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      h[p][e] = ((h[p][e] * s.power - s.mean) - s.rest) * s.rstd;
    }
  }
  const auto with_weight = [&](const RowOperand& t, auto apply) {
    with_storage(t, 0, [&](const auto* weight) {
      const auto packs = [&](auto aligned) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          float w[kPack];
          load_pack<decltype(aligned)::value>(team, weight, first, p, width, w);
#pragma unroll
          for (int e = 0; e < kPack; ++e) apply(h[p][e], w[e]);
        }
      };
      t.aligned ? packs(std::true_type{}) : packs(std::false_type{});
    });
  };
  const float offset = a.weight_offset;
  if (a.weight.data) with_weight(a.weight, [=](float& v, float w) { v *= w + offset; });
  if (a.bias.data) with_weight(a.bias, [](float& v, float b) { v += b; });
}

// Of the columns that a thread holds, the sums of h * power - pivot and of its squares.
template <int kPacks, int kPack, int kLanes>
__device__ __forceinline__ void add_moments(const Team<kLanes>& team, const float (&h)[kPacks][kPack],
                                            int first, int width, float power, float pivot,
                                            float (&sums)[2]) {
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = column_of<kPack>(team, first, p);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const float d = column + e < width ? fmaf(h[p][e], power, -pivot) : 0.f;
      sums[0] += d;
      sums[1] = fmaf(d, d, sums[1]);
    }
  }
}

template <int kPacks, int kPack, int kLanes>
__device__ __forceinline__ float sum_of(const Team<kLanes>& team, const float (&h)[kPacks][kPack], int first,
                                        int width, float power) {
  float sum = 0.f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = column_of<kPack>(team, first, p);
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum += column + e < width ? h[p][e] * power : 0.f;
  }
  return sum;
}

template <int kPacks, int kPack>
__device__ __forceinline__ float peak_of(const float (&h)[kPacks][kPack]) {
  float peak = 0.f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) peak = fmaxf(peak, fabsf(h[p][e]));
  }
  return peak;
}

// moments(power) gives those of the row times `power`, peak() its largest magnitude; the team asks together.
template <int kLanes, class Moments, class Peak>
__device__ __forceinline__ RowScaling scaling_of(Team<kLanes>& team, float eps, const Moments& moments,
                                                 const Peak& peak) {
  float power = 1.f;
  RowMoments m = moments(1.f);
  const bool tame = out_of_range(m.variance, eps);
  if (team.some(tame)) {
    const float other = taming_power(team.reduce_one(peak(), Max{}));
    power = tame ? other : 1.f;
    m = moments(power);
  }
  return {power, m.mean, m.rest, inverse_root(m.variance, eps, power)};
}

template <class X, int kLanes>
__global__ void __launch_bounds__(kLanes == 0 ? kMaxThreads : kWarpBlock, 1) norm_rows(NormCall a) {
  constexpr int kPack = kPackOf<X>, kPacks = elements_of(kLanes) / kPack;
  Team<kLanes> team;
  const int64_t given = int64_t(blockIdx.x) * team.count() + team.index();
  const int64_t row = smaller(given, a.grid.rows - 1);  // the last block's idle teams repeat a row, unwritten
  const int width = int(a.width);
  const float inverse = 1.f / float(width);
  float h[kPacks][kPack];
  load_h<X>(a, team, row, 0, width, given == row, h);
  const auto moments = [&](float power) {
    float pivot = 0.f, sums[2] = {};
    if (!a.rms) pivot = team.reduce_one(sum_of(team, h, 0, width, power), Add{}) * inverse;
    add_moments(team, h, 0, width, power, pivot, sums);
    team.reduce(sums, Add{});
    return moments_of(a.rms, pivot, sums[0], sums[1], inverse);
  };
  const RowScaling s = scaling_of(team, a.eps, moments, [&] { return peak_of(h); });
  if (a.stats && team.thread() == 0 && given == row) keep_stats(a, row, s);
  normalise(a, team, 0, width, s, h);
  X* y = static_cast<X*>(a.y.data) + a.grid.offset(a.y.stride, row);
  store_packs(team, y, a.y.aligned, 0, given == row ? width : 0, h);
}

// One block a row of any width.
template <class X>
__global__ void __launch_bounds__(kNormLoopThreads, 3) norm_looped(NormCall a) {
  constexpr int kPack = kPackOf<X>, kPacks = kNormLoopElements / kPack;
  Team<0> team;
  const int64_t row = blockIdx.x;
  const int width = int(a.width), step = team.threads() * kNormLoopElements;
  const float inverse = 1.f / float(width);
  float h[kPacks][kPack];
  // The sum is written on a first pass; what was written is h from then on.
  if (a.residual.data) {
    for (int first = 0; first < width; first += step) load_h<X>(a, team, row, first, width, true, h);
  }
  const auto load = [&](int first) {
    if (a.residual.data) {
      with_storage(a.sum, a.grid.offset(a.sum.stride, row),
                   [&](const auto* sum) { load_packs(team, sum, a.sum.aligned, first, width, h); });
    } else {
      const X* x = static_cast<const X*>(a.x.data) + a.grid.offset(a.x.stride, row);
      load_packs(team, x, a.x.aligned, first, width, h);
    }
  };
  const auto moments = [&](float power) {
    float pivot = 0.f, sums[2] = {};
    if (!a.rms) {
      load(0);
      pivot = team.reduce_one(sum_of(team, h, 0, width, power), Add{}) / float(step);  // width exceeds a step
    }
    for (int first = 0; first < width; first += step) {
      load(first);
      add_moments(team, h, first, width, power, pivot, sums);
    }
    team.reduce(sums, Add{});
    return moments_of(a.rms, pivot, sums[0], sums[1], inverse);
  };
  const auto peak = [&] {
    float largest = 0.f;
    for (int first = 0; first < width; first += step) {
      load(first);
      largest = fmaxf(largest, peak_of(h));
    }
    return largest;
  };
  const RowScaling s = scaling_of(team, a.eps, moments, peak);
  if (a.stats && team.thread() == 0) keep_stats(a, row, s);
  X* y = static_cast<X*>(a.y.data) + a.grid.offset(a.y.stride, row);
  for (int first = 0; first < width; first += step) {
    load(first);
    normalise(a, team, first, width, s, h);
    store_packs(team, y, a.y.aligned, first, width, h);
  }
}

template <class X>
int norm(const NormCall& a, void* stream) {
  const int64_t rows = a.grid.rows;
  const bool exchange =
      staged(a.x) || staged(a.residual) || staged(a.sum) || staged(a.y) || staged(a.weight) || staged(a.bias);
  const auto by_warps = [&](auto kernel, int lanes) {
    const int teams = kWarpBlock / lanes;
    return start(kernel, (rows + teams - 1) / teams, kWarpBlock, row_shared_bytes(kWarpBlock, exchange),
                 stream, a);
  };
  if (a.width <= width_of(8)) return by_warps(norm_rows<X, 8>, 8);
  if (a.width <= width_of(32)) return by_warps(norm_rows<X, 32>, 32);
  if (a.width <= width_of(0)) {
    const int threads = block_threads(a.width, elements_of(0));
    return start(norm_rows<X, 0>, rows, threads, row_shared_bytes(threads, exchange), stream, a);
  }
  return start(norm_looped<X>, rows, kNormLoopThreads, row_shared_bytes(kNormLoopThreads, exchange), stream,
               a);
}

}  // namespace fastattn::cuda
