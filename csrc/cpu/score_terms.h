// What may change a score between q.k and the mask: scale, softcap, bias, ALiBi, in the contract's order.
// Also the dropout words. All on S^T, one key a row, one query a lane; calls without terms skip this file.
#pragma once

#include "attention_args.h"
#include "block_mask.h"
#include "math.h"
#include "philox.h"

namespace fastattn {
namespace {

// The rows of one task: where they are and their logical positions.
struct QueryRows {
  int64_t b, h, first;
  int count;
  alignas(64) int32_t position[kGranule];

  QueryRows(const AttentionArgs& a, int64_t b, int64_t h, int64_t first, int count)
      : b(b), h(h), first(first), count(count) {
    for (int r = 0; r < kGranule && r < count + 2 * kLanes; ++r) {
      const int64_t i = first + (r < count ? r : count - 1);
      position[r] = a.q_pos ? a.q_pos[b * a.q_pos_batch + i * a.q_pos_row] : int32_t(i);
    }
  }
};

inline int32_t key_position(const AttentionArgs& a, int64_t b, int64_t j) {
  return a.k_pos ? a.k_pos[b * a.k_pos_batch + j * a.k_pos_key] : int32_t(j);
}

inline bool has_score_terms(const AttentionArgs& a) {
  // A scale that is not positive would turn the maximum over, and 0 * -inf is NaN: apply it before the mask.
  return a.softcap != 0.f || a.bias || a.alibi_slopes || !(a.scale > 0.f);
}

FASTATTN_INLINE Mask hidden_by(F32 bias) { return splat(-3.402823466e38f) > bias; }

// terms[key][lane] = bias(row = lane, key), whichever way the tensor lies, for lane vectors [from, to). ROW:
// the floats of a row of terms and scores.
template <class T, int64_t ROW = kGranule>
void gather_bias(const AttentionArgs& a, const QueryRows& rows, int64_t key, int keys, float* terms, int from,
                 int to) {
  const T* bias = (const T*)a.bias + rows.b * a.bias_batch + rows.h * a.bias_head + rows.first * a.bias_row +
                  key * a.bias_key;
  if (a.bias_row == 0) {
    for (int j = 0; j < keys; ++j) {
      const F32 x = splat(as_float(bias[j * a.bias_key]));
      for (int c = from; c < to; ++c) store(terms + j * ROW + c * kLanes, x);
    }
  } else if (a.bias_key == 1) {
    for (int c = from; c < to; ++c) {
      for (int j = 0; j < keys; j += kLanes) {
        F32 r[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int lane = c * kLanes + i;
          r[i] = lane < rows.count ? load_n(bias + lane * a.bias_row + j, keys - j) : zero();
        }
        transpose(r);
        for (int i = 0; i < kLanes && j + i < keys; ++i) store(terms + (j + i) * ROW + c * kLanes, r[i]);
      }
    }
  } else {
    for (int j = 0; j < keys; ++j) {
      for (int r = from * kLanes; r < to * kLanes && r < rows.count; ++r) {
        terms[j * ROW + r] = as_float(bias[r * a.bias_row + j * a.bias_key]);
      }
    }
  }
}

// scores: raw q.k in, natural units out, in lane vectors [from, to). `terms` is scratch of the same shape.
template <class T, int64_t ROW = kGranule>
void apply_score_terms(const AttentionArgs& a, const QueryRows& rows, int64_t key, int keys, float* scores,
                       float* terms, int from, int to) {
  if (a.bias) {
    a.bias_fp32 ? gather_bias<float, ROW>(a, rows, key, keys, terms, from, to)
                : gather_bias<T, ROW>(a, rows, key, keys, terms, from, to);
  }
  const F32 scale = splat(a.scale), cap = splat(a.softcap), inverse_cap = splat(1.f / a.softcap);
  const F32 slope =
      splat(a.alibi_slopes ? a.alibi_slopes[rows.b * a.alibi_batch + rows.h * a.alibi_head] : 0.f);
  for (int j = 0; j < keys; ++j) {
    const I32 k_pos = splat_int(a.alibi_slopes ? key_position(a, rows.b, key + j) : 0);
    for (int c = from; c < to; ++c) {
      float* at = scores + j * ROW + c * kLanes;
      F32 s = load(at) * scale;
      if (a.softcap != 0.f) s = cap * tanh(s * inverse_cap);
      const F32 b = a.bias ? load(terms + j * ROW + c * kLanes) : zero();
      if (a.bias) s = s + b;
      if (a.alibi_slopes) s = s - slope * abs(to_float(load(rows.position + c * kLanes) - k_pos));
      // A bias of -inf hides its key, a NaN of it too.
      if (a.bias) s = select(hidden_by(b), b, s);
      store(at, s);
    }
  }
}

// kLanes numbers of a bias row from its element `first` on, of which n exist.
template <class B>
FASTATTN_INLINE F32 bias_lanes(const B* row, int64_t stride, int first, int n) {
  if (stride == 1) return load_n(row + first, n);
  if (stride == 0) return splat(as_float(row[0]));
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? as_float(row[(first + i) * stride]) : 0.f;
  return load(lanes);
}

// The same as apply_score_terms on S, one query a row and one key a lane, where segments have rows for keys.
// Also the derivative of the softcap, and from words[row] the bits of keys that a bias of -inf hides are
// taken; false where there are any.
template <class T>
bool apply_score_terms_rows(const AttentionArgs& a, const QueryRows& rows, int64_t key, int keys,
                            const Segment* segments, int count, float* scores, float* softcap_slope,
                            uint64_t* words) {
  const F32 scale = splat(a.scale), cap = splat(a.softcap), inverse_cap = splat(1.f / a.softcap);
  const F32 slope =
      splat(a.alibi_slopes ? a.alibi_slopes[rows.b * a.alibi_batch + rows.h * a.alibi_head] : 0.f);
  const int64_t bias_at =
      rows.b * a.bias_batch + rows.h * a.bias_head + rows.first * a.bias_row + key * a.bias_key;
  alignas(64) int32_t k_pos[kGranule];
  for (int j = 0; j < kGranule; ++j) {
    k_pos[j] = a.alibi_slopes ? key_position(a, rows.b, key + (j < keys ? j : keys - 1)) : 0;
  }
  uint64_t hidden = 0;
  for (const Segment* seg = segments; seg != segments + count; ++seg) {
    for (int r = seg->first; r < seg->last; ++r) {
      uint64_t seen = ~(low_bits((seg->to - seg->from) * kLanes) << (seg->from * kLanes));
      for (int c = seg->from; c < seg->to; ++c) {
        float* at = scores + r * kGranule + c * kLanes;
        F32 s = load(at) * scale;
        if (a.softcap != 0.f) {
          const F32 t = tanh(s * inverse_cap);
          s = cap * t;
          store(softcap_slope + r * kGranule + c * kLanes, fma(zero() - t, t, splat(1.f)));
        }
        if (a.bias) {
          const int64_t row = bias_at + r * a.bias_row;
          const int first = c * kLanes;
          const F32 b = a.bias_fp32 ? bias_lanes((const float*)a.bias + row, a.bias_key, first, keys - first)
                                    : bias_lanes((const T*)a.bias + row, a.bias_key, first, keys - first);
          seen |= uint64_t(~bits_of(hidden_by(b)) & low_bits(kLanes)) << first;
          s = s + b;
        }
        if (a.alibi_slopes) {
          s = s - slope * abs(to_float(splat_int(rows.position[r]) - load(k_pos + c * kLanes)));
        }
        store(at, s);
      }
      if (a.bias) {
        hidden |= words[r] & ~seen;
        words[r] &= seen;
      }
    }
  }
  return hidden == 0;
}

// keep[key]: bit r says whether row r keeps the key.
inline void dropout_words(const AttentionArgs& a, const QueryRows& rows, int64_t key, int keys,
                          uint64_t* keep) {
  const Philox philox(a.dropout_seed);
  const I32 threshold = splat_int(int32_t(a.dropout_threshold));
  for (int j = 0; j < keys; ++j) keep[j] = 0;
  for (int c = 0; c * kLanes < rows.count; c += 2) {
    const I32 q_pos[2] = {load(rows.position + c * kLanes), load(rows.position + (c + 1) * kLanes)};
    I32 word[8];
    int32_t group = -1;
    for (int j = 0; j < keys; ++j) {
      const int32_t position = key_position(a, rows.b, key + j);
      if (position / 4 != group) {
        group = position / 4;
        philox.words<2>(splat_int(int32_t(rows.b)), splat_int(int32_t(rows.h)), q_pos, splat_int(group),
                        word);
      }
      for (int n = 0; n < 2; ++n) {
        const uint64_t dropped = bits_of(below_unsigned(word[4 * n + position % 4], threshold));
        keep[j] |= (dropped ^ low_bits(kLanes)) << ((c + n) * kLanes);
      }
    }
  }
}

}  // namespace
}  // namespace fastattn
