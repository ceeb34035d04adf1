// What may change a score between q.k and the mask: scale, softcap, bias, ALiBi, in the contract's order. And
// the dropout words: Philox4x32-10 (Salmon et al., 2011), key = seed, counter = (b, h, q_pos, k_pos / 4), a
// word a key.
#pragma once

#include "attention_args.cuh"
#include "ptx.h"

namespace fastattn::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A scale that is not positive would turn the maximum over, and 0 * -inf is NaN: apply it before the mask.
__device__ __forceinline__ bool has_score_terms(const AttentionArgs& a) {
  return a.softcap != 0.0f || a.bias || a.alibi_slopes || !(a.scale > 0.0f);
}

__device__ __forceinline__ int query_position(const AttentionArgs& a, int b, int i) {
  return a.q_pos && i < a.Sq ? a.q_pos[b * a.q_pos_batch + i * a.q_pos_row] : i;
}
__device__ __forceinline__ int key_position(const AttentionArgs& a, int b, int j) {
  return a.k_pos && j < a.Sk ? a.k_pos[b * a.k_pos_batch + j * a.k_pos_key] : j;
}

// tanh by exp2, within 2e-7: the approximate instruction is off by 5e-4, which a cap of 50 makes visible.
__device__ __forceinline__ float tanh_by_exp2(float x) {
  const float e = exp2_approx(fabsf(x) * (2.0f * kLog2e));  // NaN stays
  return copysignf(1.0f - 2.0f * reciprocal_approx(e + 1.0f), x);
}

// How scores become exponents of 2. They are raw q.k where `plain`, and natural otherwise: the lowest finite
// number, in a bias, times log2(e) would be -inf.
struct ScoreUnit {
  const bool plain;
  const float unit;  // of a score, in log2

  __device__ __forceinline__ explicit ScoreUnit(const AttentionArgs& a)
      : plain(!has_score_terms(a)), unit(plain ? a.scale * kLog2e : kLog2e) {}

  // 2^((s - pivot) * unit), in one instruction less where nothing can overflow.
  __device__ __forceinline__ float power(float s, float pivot) const {
    return exp2_approx(plain ? fmaf(s, unit, -pivot * unit) : (s - pivot) * unit);
  }
};

// The terms of one head.
template <class T>
class ScoreTerms {
 public:
  __device__ __forceinline__ ScoreTerms(const AttentionArgs& a, int b, int h)
      : slope_(a.alibi_slopes ? a.alibi_slopes[b * a.alibi_batch + h * a.alibi_head] : 0.0f),
        bias_(a.bias ? b * a.bias_batch + h * a.bias_head : 0),
        b_(b) {}

  // The natural score of raw q.k, at row i and key j; outside the call's shape it is anything. `cap_slope`,
  // if asked for, becomes the softcap's derivative.
  __device__ __forceinline__ float apply(const AttentionArgs& a, float s, int i, int j,
                                         float* cap_slope = nullptr) const {
    s *= a.scale;
    if (a.softcap != 0.0f) {
      const float t = tanh_by_exp2(s / a.softcap);
      s = a.softcap * (s != s ? s : t);  // a NaN stays one
      if (cap_slope) *cap_slope = 1.0f - t * t;
    }
    if (a.bias && i < a.Sq && j < a.Sk) {
      const int64_t at = bias_ + i * a.bias_row + j * a.bias_key;
      const float bias =
          a.bias_fp32 ? static_cast<const float*>(a.bias)[at] : to_float(static_cast<const T*>(a.bias)[at]);
      s = bias == -INFINITY ? bias : s + bias;  // it hides a NaN too
    }
    if (a.alibi_slopes) s -= slope_ * fabsf(float(query_position(a, b_, i) - key_position(a, b_, j)));
    return s;
  }

 private:
  const float slope_;
  const int64_t bias_;
  const int b_;
};

__device__ __forceinline__ void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                       uint32_t (&out)[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xd2511f53u) * c0, p1 = uint64_t(0xcd9e8d57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// Which of the keys j and j + 1 row i keeps: bits 0 and 1.
__device__ __forceinline__ int kept_pair(const AttentionArgs& a, uint64_t seed, int b, int h, int i, int j) {
  const auto row = uint32_t(query_position(a, b, i));
  const auto first = uint32_t(key_position(a, b, j)), second = uint32_t(key_position(a, b, j + 1));
  uint32_t words[4];
  philox(seed, uint32_t(b), uint32_t(h), row, first / 4, words);
  const auto keeps = [&](uint32_t position) {
    const uint32_t low = position & 1 ? words[1] : words[0], high = position & 1 ? words[3] : words[2];
    return (position & 2 ? high : low) >= a.dropout_threshold;
  };
  int kept = keeps(first);
  if (second / 4 != first / 4) {
    philox(seed, uint32_t(b), uint32_t(h), row, second / 4, words);
  }
  return kept | keeps(second) << 1;
}

// Whether row i keeps key j.
__device__ __forceinline__ bool keeps(const AttentionArgs& a, uint64_t seed, int b, int h, int i, int j) {
  const auto position = uint32_t(key_position(a, b, j));
  uint32_t words[4];
  philox(seed, uint32_t(b), uint32_t(h), uint32_t(query_position(a, b, i)), position / 4, words);
  const uint32_t low = position & 1 ? words[1] : words[0], high = position & 1 ? words[3] : words[2];
  return (position & 2 ? high : low) >= a.dropout_threshold;
}

// Of a warp's accumulator whose elements of this lane start at row i and key j: a bit an element, tile by
// tile. Drawn before the scores exist, in a loop, because Philox needs the registers that they will take.
template <int kRowTiles, int kTilesN>
__device__ __forceinline__ uint64_t kept_elements(const AttentionArgs& a, int b, int h, int i, int j) {
  static_assert(kRowTiles * kTilesN * 4 <= 64, "the bits fit a word");
  const uint64_t seed = uint64_t(*a.dropout_seed);
  uint64_t kept = 0;
#pragma unroll 1
  for (int at = 0; at < kRowTiles * kTilesN * 2; ++at) {
    const int row = i + at / (2 * kTilesN) * 16 + at % 2 * 8, key = j + at / 2 % kTilesN * 8;
    kept |= uint64_t(kept_pair(a, seed, b, h, row, key)) << (2 * at);
  }
  return kept;
}

// s = apply(s, t, n, i) for the elements i of every tile (t, n). A loop over the first tile of an array that
// turns, not one unrolled: loads of a bias for all tiles at once would take more registers than there are.
template <int kRowTiles, int kTilesN, class Apply>
__device__ __forceinline__ void apply_terms(float (&s)[kRowTiles][kTilesN][4], Apply apply) {
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll 1
    for (int n = 0; n < kTilesN; ++n) {
      float done[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) done[i] = apply(s[t][0][i], t, n, i);
#pragma unroll
      for (int m = 0; m + 1 < kTilesN; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][m][i] = s[t][m + 1][i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) s[t][kTilesN - 1][i] = done[i];
    }
  }
}

}  // namespace fastattn::cuda
