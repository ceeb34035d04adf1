// The backward's pass over rows, before the others: delta = sum(dout * out) - dlse and the exponent of each
// row, and what every 64 rows see by ranges. And the sinks' gradient, a sum over rows.
#pragma once

#include "attention_mask.cuh"
#include "attention_score.cuh"

namespace fastattn::cuda {

constexpr int kRowPassThreads = 128;

struct RowPassSmem {
  Extent extent[2];
  float sums[kRowPassThreads / kWarp];
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += shfl_xor(x, lanes);
  return x;
}

// log(2^40): how far the exponent may lie above lse where lse has a gradient of its own.
constexpr float kFarthest = 27.72588722f;

// log(exp(lse) + exp(sink)).
__device__ __forceinline__ float add_sink(float lse, float sink) {
  const float high = fmaxf(lse, sink), low = fminf(lse, sink);
  return high + log1pf(expf(low - high));
}

// A block takes 64 rows of one head, a warp 16 of them.
template <class T, MaskForm kForm>
__global__ void __launch_bounds__(kRowPassThreads)
    attention_bwd_rows(const __grid_constant__ AttentionBwdArgs a) {
  auto& smem = shared_storage<RowPassSmem>();
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int granules = (a.Sq + kGranule - 1) / kGranule, granule = int(blockIdx.x) % granules;
  const int head = int(blockIdx.x) / granules, h = head % a.Hq, b = head / a.Hq, first = granule * kGranule;

  if (warp < 2) {
    Extent extent = no_rows();
    if (first + thread < a.Sq) extent = extent_of(row_range<kForm>(a, b, h, first + thread));
    extent = join_warp(extent);
    if (lane == 0) smem.extent[warp] = extent;
  }
  __syncthreads();
  if (thread == 0) {
    const Extent e = join(smem.extent[0], smem.extent[1]);
    reinterpret_cast<int4*>(a.extents)[int64_t(head) * granules + granule] =
        make_int4(e.seen_lo, e.seen_hi, e.all_lo, e.all_hi);
  }

  for (int row = first + warp; row < min(first + kGranule, a.Sq); row += kRowPassThreads / kWarp) {
    const T* dout =
        static_cast<const T*>(a.dout.data) + b * a.dout.batch + h * a.dout.head + row * a.dout.row;
    const int64_t out = b * a.out.batch + h * a.out.head + row * a.out.row;
    const int64_t at = int64_t(head) * a.Sq + row;
    const float lse = a.lse[at];
    float exponent = INFINITY, delta = 0.0f;
    if (lse != -INFINITY) {  // else neither dout nor out is looked at: they may be NaN
      for (int col = lane; col < a.Dv; col += kWarp) {
        const float y = a.out_fp32 ? static_cast<const float*>(a.out.data)[out + col]
                                   : to_float(static_cast<const T*>(a.out.data)[out + col]);
        delta += y * to_float(dout[col]);
      }
      exponent = a.sinks ? add_sink(lse, a.sinks[h]) : lse;
    }
    delta = warp_sum(delta);
    const float sink_term = a.dsinks ? -expf(a.sinks[h] - exponent) * delta : 0.0f;
    // lse is the logarithm of the sum without the sink, whose weights are larger by exp(exponent - lse).
    // Where they are that by 2^40 what the sink leaves of out no longer matters beside lse, and a larger
    // factor would only take digits from P.
    if (a.dlse && lse != -INFINITY) {
      if (exponent > lse + kFarthest) exponent = lse + kFarthest;
      delta -= a.dlse[at] * expf(exponent - lse);
    }
    if (lane == 0) {
      a.exponent[at] = exponent;
      a.delta[at] = delta;
      if (a.dsinks) a.sink_terms[at] = sink_term;
    }
  }
}

// dsinks[b, h] = the sum of the rows' terms. One block a head.
static __global__ void __launch_bounds__(kRowPassThreads)
    attention_bwd_sinks(const __grid_constant__ AttentionBwdArgs a) {
  auto& smem = shared_storage<RowPassSmem>();
  const int thread = int(threadIdx.x);
  const float* terms = a.sink_terms + int64_t(blockIdx.x) * a.Sq;
  float sum = 0.0f;
  for (int row = thread; row < a.Sq; row += kRowPassThreads) sum += terms[row];
  sum = warp_sum(sum);
  if (thread % kWarp == 0) smem.sums[thread / kWarp] = sum;
  __syncthreads();
  if (thread == 0) a.dsinks[blockIdx.x] = smem.sums[0] + smem.sums[1] + smem.sums[2] + smem.sums[3];
}

}  // namespace fastattn::cuda
