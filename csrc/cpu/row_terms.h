// The score terms and dropout words of score_terms.h for packed rows: S[row][key], keys are the lanes.
#pragma once

#include "packed_mask.h"
#include "score_terms.h"

namespace fastattn {
namespace {

inline int32_t query_position(const AttentionArgs& a, const PackedRows& rows, int r) {
  const int64_t i = rows.row[r];
  return a.q_pos ? a.q_pos[rows.b * a.q_pos_batch + i * a.q_pos_row] : int32_t(i);
}

template <class B>
const B* row_bias(const AttentionArgs& a, const PackedRows& rows, int r, int64_t key) {
  return (const B*)a.bias + rows.b * a.bias_batch + rows.head[r] * a.bias_head + rows.row[r] * a.bias_row +
         key * a.bias_key;
}

// kLanes entries of a row of bias, of which `left` are there.
template <class B>
FASTATTN_INLINE F32 load_bias(const B* bias, int64_t step, int64_t left) {
  if (step == 1) return load_n(bias, left);
  alignas(64) float x[kLanes];
  for (int n = 0; n < kLanes; ++n) x[n] = n < left ? as_float(bias[n * step]) : 0.f;
  return load(x);
}

// Bit j says whether the bias shows key j of the granule to packed row r: an entry of -inf hides it.
template <class B>
uint64_t row_bias_word(const AttentionArgs& a, const PackedRows& rows, int r, int64_t key, int keys) {
  const B* bias = row_bias<B>(a, rows, r, key);
  uint64_t word = 0;
  for (int j = 0; j < keys; j += kLanes) {
    const F32 x = load_bias(bias + j * a.bias_key, a.bias_key, keys - j);
    word |= uint64_t(bits_of((x > splat(-__builtin_inff())) | is_nan(x))) << j;
  }
  return word & low_bits(keys);
}

// scores: raw q.k in, natural units out.
template <class T>
void apply_row_terms(const AttentionArgs& a, const PackedRows& rows, int64_t key, int keys, float* scores) {
  alignas(64) int32_t k_pos[kGranule];
  if (a.alibi_slopes) {
    for (int j = 0; j < kGranule; ++j) k_pos[j] = j < keys ? key_position(a, rows.b, key + j) : 0;
  }
  const F32 scale = splat(a.scale), cap = splat(a.softcap), inverse_cap = splat(1.f / a.softcap);
  for (int r = 0; r < rows.count; ++r, scores += kGranule) {
    const I32 q_pos = splat_int(query_position(a, rows, r));
    const F32 slope =
        splat(a.alibi_slopes ? a.alibi_slopes[rows.b * a.alibi_batch + rows.head[r] * a.alibi_head] : 0.f);
    for (int j = 0; j < keys; j += kLanes) {
      F32 s = load(scores + j) * scale;
      if (a.softcap != 0.f) s = cap * tanh(s * inverse_cap);
      if (a.bias && a.bias_fp32) {
        s = s + load_bias(row_bias<float>(a, rows, r, key + j), a.bias_key, keys - j);
      } else if (a.bias) {
        s = s + load_bias(row_bias<T>(a, rows, r, key + j), a.bias_key, keys - j);
      }
      if (a.alibi_slopes) s = s - slope * abs(to_float(q_pos - load(k_pos + j)));
      store(scores + j, s);
    }
  }
}

// Bit j says whether packed row r keeps key j of the granule.
inline uint64_t dropout_row_word(const AttentionArgs& a, const PackedRows& rows, int r, int64_t key,
                                 int keys) {
  uint64_t word = 0;
  const Philox philox(a.dropout_seed);
  const I32 threshold = splat_int(int32_t(a.dropout_threshold));
  alignas(64) int32_t position[kGranule], group[kGranule];
  for (int j = 0; j < kGranule; ++j) {
    position[j] = j < keys ? key_position(a, rows.b, key + j) : 0;
    group[j] = position[j] / 4;
  }
  for (int j = 0; j < keys; j += kLanes) {
    I32 lanes[4];
    uint64_t dropped[4];
    const I32 q_pos = splat_int(query_position(a, rows, r));
    philox.words<1>(splat_int(int32_t(rows.b)), splat_int(int32_t(rows.head[r])), &q_pos, load(group + j),
                    lanes);
    for (int w = 0; w < 4; ++w) dropped[w] = bits_of(below_unsigned(lanes[w], threshold));
    for (int n = 0; n < kLanes; ++n) word |= (~dropped[position[j + n] % 4] >> n & 1) << (j + n);
  }
  return word;
}

}  // namespace
}  // namespace fastattn
