// What a consumer of attention_sm90 does with its rows between the products: scores to weights, and the rows'
// end. A thread holds two rows, r = lane / 4 and r + 8 of its warp's 16; x[4 i + 2 half + e] is column
// 8 i + lane % 4 * 2 + e of row r + 8 half.
#pragma once

#include "attention_score.cuh"
#include "attention_sm90_walk.cuh"
#include "attention_tile.cuh"

namespace fastattn::cuda {

// Scores in registers times `factor`, which is positive, are in units of log2.
struct ScoreUnits {
  enum Transform { kNone, kMultiply, kSoftcap } transform;
  float before, factor;
};
inline ScoreUnits score_units(const AttentionArgs& args) {
  if (args.softcap > 0.0f) return {ScoreUnits::kSoftcap, args.scale / args.softcap, args.softcap * kLog2e};
  if (args.scale > 0.0f) return {ScoreUnits::kNone, 1.0f, args.scale * kLog2e};
  // A running maximum wants a positive factor: the sign, or the 0, goes to the scores.
  if (args.scale < 0.0f) return {ScoreUnits::kMultiply, -1.0f, -args.scale * kLog2e};
  return {ScoreUnits::kMultiply, args.scale, kLog2e};
}
__device__ __forceinline__ float transform_score(float s, const ScoreUnits& units) {
  s *= units.before;
  // tanh by exp2: within 2^-22 of 1, where tanh.approx is only within 2^-11.
  if (units.transform == ScoreUnits::kSoftcap) {
    s = 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(s * (2.0f * kLog2e)));
  }
  return s;
}
template <int kCount>
__device__ __forceinline__ void transform_scores(float (&s)[kCount], const ScoreUnits& units) {
  if (units.transform == ScoreUnits::kNone) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = transform_score(s[i], units);
}

// The first of a thread's two rows, of the 64 of its warpgroup.
__device__ __forceinline__ int row_in_granule() {
  return thread_index() / kWarp % 4 * 16 + thread_index() % kWarp / 4;
}

// Bits [lo, hi) of a word.
__device__ __forceinline__ uint64_t range_word(int lo, int hi) {
  const uint64_t below_hi = hi >= 64 ? ~0ull : hi <= 0 ? 0ull : (1ull << hi) - 1;
  return lo <= 0 ? below_hi : lo >= 64 ? 0ull : below_hi & ~0ull << lo;
}

__device__ __forceinline__ uint64_t tile_word(const AttentionArgs& args, int tile, int row) {
  if (tile < 0) return tile == kFullTile ? ~0ull : 0ull;
  return args.bit_tiles[int64_t(tile) * kGranule + row];
}

// Scores of keys that a thread's two rows do not see become -inf. `words` are the bit tiles that the plan
// names and `range` the rows' ranges, both of this warpgroup's granule; `key` is the block's first.
template <int kKeyGranules>
__device__ __forceinline__ void hide_scores(float (&s)[kKeyGranules * 32],
                                            const GranulePlan<kKeyGranules>& plan,
                                            const uint64_t (&words)[kKeyGranules][kGranule],
                                            const KeyRange* range, int key) {
  const int first_column = thread_index() % 4 * 2, first_row = row_in_granule();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const KeyRange seen = range[first_row + 8 * half];
#pragma unroll
    for (int g = 0; g < kKeyGranules; ++g) {
      uint64_t word = plan.tile[g] == kFullTile ? ~0ull : 0ull;
      if (plan.tile[g] >= 0) word = words[g][first_row + 8 * half];
      const int first = key + g * kGranule;
      if (plan.seen == kSeenByRanges) word &= range_word(seen.lo - first, seen.hi - first);
      word >>= first_column;  // the thread's columns stand at fixed bits
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t bits = uint32_t(word >> (i * 8));
        float* pair = &s[g * 32 + i * 4 + half * 2];
        if (!(bits & 1)) pair[0] = -INFINITY;
        if (!(bits & 2)) pair[1] = -INFINITY;
      }
    }
  }
}

// Scores become weights 2^(factor * (s - maximum)). `correction` is what earlier sums are to be multiplied
// by; row_sum holds this thread's columns only, until the end.
template <int kCount>
__device__ __forceinline__ void online_softmax(float (&s)[kCount], float (&row_max)[2], float (&row_sum)[2],
                                               float (&correction)[2], float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float maximum = row_max[half];
#pragma unroll
    for (int i = 2 * half; i < kCount; i += 4) maximum = fmaxf(maximum, fmaxf(s[i], s[i + 1]));
    maximum = quad_max(maximum);
    const float pivot = maximum == -INFINITY ? 0.0f : maximum * factor;
    correction[half] = exp2_approx(fmaf(row_max[half], factor, -pivot));
    row_max[half] = maximum;
    float sum = row_sum[half] * correction[half];
#pragma unroll
    for (int i = 2 * half; i < kCount; i += 4) {
      s[i] = exp2_approx(fmaf(s[i], factor, -pivot));
      s[i + 1] = exp2_approx(fmaf(s[i + 1], factor, -pivot));
      sum += s[i] + s[i + 1];
    }
    row_sum[half] = sum;
  }
}

template <int kCount>
__device__ __forceinline__ void rescale(float (&o)[kCount], const float (&correction)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= correction[i / 2 % 2];
}

// Weights as wgmma's left operand.
template <class T, int kSteps>
__device__ __forceinline__ void round_weights(uint32_t (&p)[kSteps][4], const float (&s)[kSteps * 8]) {
#pragma unroll
  for (int i = 0; i < kSteps * 4; ++i) p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
}

// word[j] is this lane's pair of column group j; afterwards all of group lane % 4.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const uint32_t other = shfl_xor(odd ? word[j] : word[j + 1], 1);
    if (odd) word[j] = other;
    else word[j + 1] = other;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t other = shfl_xor(high ? word[j] : word[j + 2], 2);
    if (high) word[j] = other;
    else word[j + 2] = other;
  }
}

// Where a visible score is finite and a weight's value is not, 0 * NaN may have come from a hidden key that
// shares a block with visible ones. The row is summed again, by a warp, over the keys that it sees.
template <class T, int kD>
__device__ __forceinline__ void recompute_row(const AttentionArgs& args, int b, int h, int row, float lse,
                                              const ScoreUnits& units) {
  const int lane = int(threadIdx.x) % kWarp;
  const int kv_head = h / (args.Hq / args.Hkv);
  // This lane's columns are lane, lane + 32, ...
  const auto row_of = [&](const Operand& x, int batch, int head, int index) {
    return static_cast<const T*>(x.data) + batch * x.batch + head * x.head + index * x.row + uint32_t(lane);
  };
  float q[kD / kWarp], o[kD / kWarp];
  const T* q_row = row_of(args.q, b, h, row);
#pragma unroll
  for (int i = 0; i < kD / kWarp; ++i) {
    q[i] = to_float(q_row[i * kWarp]);
    o[i] = 0.0f;
  }
  const KeyRange range = RowRanges(args, uint32_t(b), uint32_t(h))(uint32_t(row));
  const int32_t* offsets = nullptr;
  int at = 0, end = 0;
  if (args.block_offsets) {
    offsets = args.block_offsets + b * args.map_batch + h * args.map_head + row / kGranule;
    at = offsets[0];
    end = offsets[1];
  }
  bool settled = false;  // every element has met a value that is not finite and is seen
  for (int granule = range.lo / kGranule; granule * kGranule < range.hi && !settled; ++granule) {
    uint64_t word = range_word(range.lo - granule * kGranule, range.hi - granule * kGranule);
    if (offsets) {
      while (at < end && args.block_list[2 * at] < granule) ++at;
      if (at == end) break;
      word &= args.block_list[2 * at] == granule
                  ? tile_word(args, args.block_list[2 * at + 1], row % kGranule)
                  : 0ull;
    }
    for (int key = granule * kGranule; word != 0 && !settled; ++key, word >>= 1) {
      if (!(word & 1)) continue;
      const T *k_row = row_of(args.k, b, kv_head, key), *v_row = row_of(args.v, b, kv_head, key);
      float score = 0.0f;
#pragma unroll
      for (int i = 0; i < kD / kWarp; ++i) score += q[i] * to_float(k_row[i * kWarp]);
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) score += shfl_xor(score, mask);
      if (units.transform != ScoreUnits::kNone) score = transform_score(score, units);
      const float weight = exp2_approx(score * units.factor - lse * kLog2e);
      bool finite = false;
#pragma unroll
      for (int i = 0; i < kD / kWarp; ++i) {
        o[i] += weight * to_float(v_row[i * kWarp]);
        finite |= o[i] - o[i] == 0.0f;
      }
      settled = !warp_any(finite);
    }
  }
  const int64_t out = b * args.out.batch + h * args.out.head + row * args.out.row + uint32_t(lane);
#pragma unroll
  for (int i = 0; i < kD / kWarp; ++i) {
    if (args.out_fp32) static_cast<float*>(args.out.data)[out + i * kWarp] = o[i];
    else static_cast<T*>(args.out.data)[out + i * kWarp] = from_float<T>(o[i]);
  }
}

// Divides by the sum and stores out and lse. `cut`: some block showed these rows some of its keys only.
template <class T, int kD>
__device__ __forceinline__ void finish_rows(const AttentionArgs& args, int b, int h, int row,
                                            float (&o)[kD / 2], const float (&row_max)[2],
                                            const float (&row_sum)[2], const ScoreUnits& units, bool cut) {
  const int lane = int(threadIdx.x) % kWarp;
  float lse[2];
  bool repair[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + 8 * half;
    const bool inside = at < args.Sq;
    const float sum = quad_sum(row_sum[half]);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    lse[half] = sum == 0.0f ? -INFINITY : (row_max[half] * units.factor + log2f(sum)) * kLn2;
    bool finite = true;
#pragma unroll
    for (int i = 2 * half; i < kD / 2; i += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        o[i + e] = sum == 0.0f ? 0.0f : o[i + e] * inverse;  // not by 0: a hidden NaN
        finite &= o[i + e] - o[i + e] == 0.0f;
      }
    }
    repair[half] = cut && inside && !finite && lse[half] - lse[half] == 0.0f;
    if (inside && lane % 4 == 0) args.lse[(int64_t(b) * args.Hq + h) * args.Sq + at] = lse[half];

    const int64_t out = b * args.out.batch + h * args.out.head + at * args.out.row;
    if (args.out_fp32) {
      float* to = static_cast<float*>(args.out.data) + out + uint32_t(lane) % 4 * 2;
#pragma unroll
      for (int i = 0; i < kD / 8; ++i) {
        if (inside) *reinterpret_cast<float2*>(to + i * 8) = {o[i * 4 + half * 2], o[i * 4 + half * 2 + 1]};
      }
    } else {
      T* to = static_cast<T*>(args.out.data) + out + uint32_t(lane) % 4 * 8;
#pragma unroll
      for (int i = 0; i < kD / 8; i += 4) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          word[j] = pack<T>(o[(i + j) * 4 + half * 2], o[(i + j) * 4 + half * 2 + 1]);
        }
        transpose_quad(word, lane);
        if (inside) *reinterpret_cast<uint4*>(to + i * 8) = {word[0], word[1], word[2], word[3]};
      }
    }
  }
  if (!cut) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // A row is bad where any of its four lanes says so.
    for (uint32_t bad = warp_ballot(repair[half]); bad != 0;) {
      const int from = __ffs(int(bad)) - 1;
      __syncwarp();  // after the other lanes' stores to the row
      recompute_row<T, kD>(args, b, h, shfl(row, from) + 8 * half, shfl(lse[half], from), units);
      bad &= ~(0xfu << (from / 4 * 4));
    }
  }
}

}  // namespace fastattn::cuda
