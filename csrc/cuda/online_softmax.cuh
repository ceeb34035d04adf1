// The softmax of a stream of score tiles, in a warp's accumulator layout (attention_tile.cuh).
#pragma once

#include "attention_score.cuh"
#include "attention_tile.cuh"

namespace fastattn::cuda {

// The running maximum and sum of each row this lane has a part of; sums are a lane's own until the end.
template <int kRowTiles>
struct OnlineSoftmax {
  float row_max[kRowTiles][2], row_sum[kRowTiles][2] = {};

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) row_max[t][0] = row_max[t][1] = -INFINITY;
  }

  // Turns scores into weights by the new maximum, and what `out` holds too. All lanes of the warp.
  template <int kTilesN, int kTilesD>
  __device__ __forceinline__ void add(const ScoreUnit& unit, float (&s)[kRowTiles][kTilesN][4],
                                      float (&out)[kRowTiles][kTilesD][4]) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float peak = row_max[t][half];
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          peak = fmaxf(peak, fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
        }
        peak = quad_max(peak);
        const float pivot = peak == -INFINITY ? 0.0f : peak;  // nothing seen yet
        const float correction = unit.power(row_max[t][half], pivot);
        row_max[t][half] = peak;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[t][n][i] = unit.power(s[t][n][i], pivot);
            sum += s[t][n][i];
          }
        }
        row_sum[t][half] = row_sum[t][half] * correction + sum;
        if (warp_any(correction != 1.0f)) {
#pragma unroll
          for (int d = 0; d < kTilesD; ++d) {
            out[t][d][2 * half] *= correction;
            out[t][d][2 * half + 1] *= correction;
          }
        }
      }
    }
  }
};

// -inf where word(row below the lane's first), shifted to the lane's first key, has no bit.
template <int kRowTiles, int kTilesN, class Word>
__device__ __forceinline__ void hide_elements(float (&s)[kRowTiles][kTilesN][4], Word word_of) {
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t word = word_of(t * 16 + half * 8);
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        if (!(word >> (n * 8) & 1)) s[t][n][2 * half] = -INFINITY;
        if (!(word >> (n * 8) & 2)) s[t][n][2 * half + 1] = -INFINITY;
      }
    }
  }
}

// 0 where `kept`, of kept_elements, has no bit.
template <int kRowTiles, int kTilesN>
__device__ __forceinline__ void drop_elements(float (&s)[kRowTiles][kTilesN][4], uint64_t kept) {
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!(kept >> ((t * kTilesN + n) * 4 + i) & 1)) s[t][n][i] = 0.0f;
      }
    }
  }
}

}  // namespace fastattn::cuda
