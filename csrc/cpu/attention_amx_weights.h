// The softmax of the forward on AMX: from scores, as the tiles leave them, to pairs of weights, as the tiles
// read them.
//
// A row's weights are exp2(score - pivot), for a pivot somewhat over its maximum. What makes them is chosen
// by a type:
//
//   FoldedScale, NaturalScores   fp32, of scores without and with terms (attention.h)
//   FixedScale                   integers, bf16 without terms
//   MixedScale                   integers, and fp32 for rows that those cannot hold
#pragma once

#include "attention.h"
#include "packed_heads.h"
#include "tile_queue.h"

namespace fastattn {
namespace {

struct FixedScale {};

// From scores to weights: what a unit needs of scale and pivots.
template <class Units>
struct ScoreLine {
  F32 scale, pivot;
  explicit ScoreLine(float scale) : scale(splat(scale)) {}
  void start(F32 of_rows) { pivot = of_rows; }
  // A weight of 2 or more, or NaN: the uppermost bit of its exponent is set.
  bool exceeded(I32 bits) const { return any_bits(bits, 0x40000000); }
};
template <>
struct ScoreLine<FixedScale> {
  F32 scale, offset;
  FixedExp2 exp2;
  explicit ScoreLine(float scale) : scale(splat(scale * FixedExp2::kOne)) {}
  void start(F32 pivot) { offset = splat(FixedExp2::kOffset) - pivot * splat(FixedExp2::kOne); }
  template <bool MASKED>
  FASTATTN_INLINE I32 exponent(F32 score, Mask seen) const {
    return MASKED ? exp2.fixed(score, scale, offset, seen) : exp2.fixed(score, scale, offset);
  }
  bool exceeded(I32 bits) const { return exp2.exceeded(bits); }
};

// The bits of rows that integers hold are as they would be by FixedScale.
struct MixedScale {};
template <>
struct ScoreLine<MixedScale> {
  ScoreLine<FixedScale> by_integers;
  ScoreLine<FoldedScale> in_fp32;
  Mask lost;
  explicit ScoreLine(float scale) : by_integers(scale), in_fp32(scale) {}
  void start(F32 pivot) { by_integers.start(pivot), in_fp32.start(pivot); }
  bool exceeded(I32) const { return false; }
};

struct WeightSums {
  F32 even, odd;
  I32 bits;  // of all weights, or of all exponents, or-ed
};

// 16 keys of one lane vector: scores in, pairs of weights out, over scores that have been read.
template <class T>
struct RunWeights {
  static constexpr int kKeys = kTileSide;
  static constexpr int kParts = kTileParts<T>;

  const float* scores;
  int32_t *high, *low;
  const uint16_t *seen, *keep;  // a word of the rows a key, this lane vector's part of it
  float dropout_scale;

  FASTATTN_INLINE void clear() const {
    for (int i = 0; i < kKeys / 2; ++i) put(i, zero(), zero());
  }

  template <bool MASKED>
  FASTATTN_INLINE F32 max_of() const {
    F32 top[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) top[i] = score<MASKED>(i);
#pragma GCC unroll 12
    for (int j = 4; j < kKeys; ++j) top[j % 4] = max(top[j % 4], score<MASKED>(j));
    return max(max(top[0], top[1]), max(top[2], top[3]));
  }

  template <bool MASKED, bool DROPOUT, class Units>
  FASTATTN_INLINE void weigh_pair(int i, const ScoreLine<Units>& line, WeightSums* sums) const {
    F32 e0 = weight<MASKED>(2 * i, line), e1 = weight<MASKED>(2 * i + 1, line);
    sums->even = sums->even + e0;
    sums->odd = sums->odd + e1;
    sums->bits = or3(sums->bits, bits_of(e0), bits_of(e1));
    if constexpr (DROPOUT) e0 = kept(2 * i, e0), e1 = kept(2 * i + 1, e1);
    put(i, e0, e1);
  }
  template <bool MASKED, bool DROPOUT>
  FASTATTN_INLINE void weigh_pair(int i, const ScoreLine<FixedScale>& line, WeightSums* sums) const {
    store(high + i * kPass, pair_by_integers<MASKED>(i, line, sums));
  }
  template <bool MASKED, bool DROPOUT>
  FASTATTN_INLINE void weigh_pair(int i, const ScoreLine<MixedScale>& line, WeightSums* sums) const {
    const F32 e0 = weight<MASKED>(2 * i, line.in_fp32), e1 = weight<MASKED>(2 * i + 1, line.in_fp32);
    const WeightSums before = *sums;
    const I32 pair = pair_by_integers<MASKED>(i, line.by_integers, sums);
    sums->even = select(line.lost, before.even + e0, sums->even);
    sums->odd = select(line.lost, before.odd + e1, sums->odd);
    const I32 rounded = pack_pairs_loosely(e0, e1);
    store(high + i * kPass, bits_of(select(line.lost, float_of(rounded), float_of(pair))));
  }

 private:
  FASTATTN_INLINE Mask sees(int j) const { return mask_of_bits(seen[j * 2]); }

  template <bool MASKED>
  FASTATTN_INLINE F32 score(int j) const {
    const F32 x = load(scores + j * kPass);
    return MASKED ? select(sees(j), x, splat(-__builtin_inff())) : x;
  }

  template <bool MASKED, class Units>
  FASTATTN_INLINE F32 weight(int j, const ScoreLine<Units>& line) const {
    return exp2<kExpDegree<T>>(Units::exponent(score<MASKED>(j), line.scale, line.pivot));
  }

  FASTATTN_INLINE F32 kept(int j, F32 e) const {
    return select(mask_of_bits(keep[j * kVectors]), e * splat(dropout_scale), zero());
  }

  FASTATTN_INLINE void put(int pair, F32 e0, F32 e1) const {
    const I32 rounded = pack_pairs_loosely(e0, e1);
    store(high + pair * kPass, rounded);
    if constexpr (kParts > 1) {
      store(low + pair * kPass, pack_pairs_loosely(e0 - low_of_pairs(rounded), e1 - high_of_pairs(rounded)));
    }
  }

  template <bool MASKED>
  FASTATTN_INLINE I32 pair_by_integers(int i, const ScoreLine<FixedScale>& line, WeightSums* sums) const {
    const I32 x0 = line.template exponent<MASKED>(load(scores + 2 * i * kPass), sees(2 * i));
    const I32 x1 = line.template exponent<MASKED>(load(scores + (2 * i + 1) * kPass), sees(2 * i + 1));
    sums->bits = or3(sums->bits, x0, x1);
    const I32 pair = line.exp2.pairs(x0, x1);
    F32& sum = i % 2 ? sums->odd : sums->even;
    sum = line.exp2.add_pairs(pair, sum);
    return pair;
  }
};

}  // namespace
}  // namespace fastattn
