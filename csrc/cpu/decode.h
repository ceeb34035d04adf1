// Attention with few query rows: one task is a group's packed rows against one split of the keys.
//
//   m = max S, l = sum exp2(S - m), O = sum exp2(S - m) V      for each split of DecodePlan::kSplit keys
//   out = sum 2^(m_s - m) O_s / sum 2^(m_s - m) l_s            over the splits, in their order
//
// Memory is the limit, so K and V are read once for all query heads that share them and nothing is packed or
// converted in memory: a lane is an element of a row of K or V, widened in registers. A score is then a sum
// over lanes; kLanes of them are added up together while they are transposed (lane_sums), after which a lane
// is a key and the softmax of a row needs one horizontal maximum a granule.
//
// Hidden NaN: keys that no row sees are skipped. Those that only some rows see meet a probability of 0 in the
// others; if a result is not finite the split is computed again with every product of a hidden key left out.
#pragma once

#include "attention.h"
#include "decode_plan.h"
#include "packed_mask.h"
#include "row_terms.h"

namespace fastattn {
namespace {

// Keys and values as fp32 lanes.
template <class T>
struct WidenedLanes {
  using Vector = F32;
  static constexpr int kElements = 1;     // of a 32-bit lane
  static constexpr int kKeysPerUnit = 1;  // keys that one step of P V takes

  static FASTATTN_INLINE Vector load_keys(const T* p) { return load(p); }
  static FASTATTN_INLINE Vector load_keys_n(const T* p, int64_t lanes) { return load_n(p, lanes); }
  static FASTATTN_INLINE Vector load_q(const float* p) { return load(p); }
  static FASTATTN_INLINE F32 step(Vector a, Vector b, F32 acc) { return fma(a, b, acc); }
  static void pack_q(const T* q, int64_t width, float* out) {
    for (int64_t d = 0; d < width; d += kLanes) store(out + d, load_n(q + d, width - d));
  }

  // A row's probabilities from key j on, in the place of its scores.
  static FASTATTN_INLINE void put(float* row, int j, F32 p) { store(row + j, p); }
  static float probability_of(const float* row, int j) { return row[j]; }
  template <int VECTORS>
  static FASTATTN_INLINE void load_values(const T* v, const T*, Vector* out) {
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; ++c) out[c] = load(v + c * kLanes);
  }
  static FASTATTN_INLINE Vector load_values_n(const T* v, const T*, int64_t lanes) {
    return load_n(v, lanes);
  }
  static FASTATTN_INLINE Vector probability(const float* row, int unit) { return splat(row[unit]); }
};

#ifdef FASTATTN_HAS_DOT2
// Keys as bf16 pairs of adjacent elements, values as pairs of adjacent keys; D is even.
struct PairedLanes {
  using Vector = I32;
  static constexpr int kElements = 2;
  static constexpr int kKeysPerUnit = 2;

  static FASTATTN_INLINE Vector load_keys(const BFloat16* p) { return load((const int32_t*)p); }
  static FASTATTN_INLINE Vector load_keys_n(const BFloat16* p, int64_t lanes) {
    return bits_of(load_n((const float*)p, lanes));
  }
  static FASTATTN_INLINE Vector load_q(const float* p) { return load((const int32_t*)p); }
  static FASTATTN_INLINE F32 step(Vector a, Vector b, F32 acc) { return dot2(a, b, acc); }
  static void pack_q(const BFloat16* q, int64_t width, float* out) {
    for (int64_t d = 0; d < width / 2; d += kLanes)
      store(out + d, load_n((const float*)q + d, width / 2 - d));
  }

  static FASTATTN_INLINE void put(float* row, int j, F32 p) { store((BFloat16*)row + j, p); }
  static float probability_of(const float* row, int j) { return as_float(((const BFloat16*)row)[j]); }
  template <int VECTORS>
  static FASTATTN_INLINE void load_values(const BFloat16* even, const BFloat16* odd, Vector* out) {
    if constexpr (VECTORS == 1) {
      out[0] = interleave(even, odd);
    } else {
#pragma GCC unroll 4
      for (int c = 0; c < VECTORS; c += 2) {
        interleave(even + c * kLanes, odd + c * kLanes, out + c, out + c + 1);
      }
    }
  }
  static FASTATTN_INLINE Vector load_values_n(const BFloat16* even, const BFloat16* odd, int64_t lanes) {
    return pack_pairs(load_n(even, lanes), load_n(odd, lanes));
  }
  static FASTATTN_INLINE Vector probability(const float* row, int unit) {
    int32_t pair;
    memcpy(&pair, row + unit, 4);
    return splat_int(pair);
  }
};
#endif

// Scratch of one thread, carved from one allocation.
struct DecodeBuffers {
  static constexpr int64_t kRowStep = 4;  // the tallest tile: rows are padded to it
  float *q, *scores, *merged;
  int64_t q_stride, rows;

  static int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
  static int64_t bytes(const AttentionArgs& a) {
    const int64_t rows = padded(DecodePlan(a).rows, kRowStep);
    return 4 * (rows * (padded(a.D, 16) + DecodePlan::kSplit) + padded(a.Dv, 16));
  }
  DecodeBuffers(const AttentionArgs& a, void* scratch)
      : q_stride(padded(a.D, 16)), rows(padded(DecodePlan(a).rows, kRowStep)) {
    q = (float*)scratch, scores = q + rows * q_stride, merged = scores + rows * DecodePlan::kSplit;
  }
};

// Asks for the rows that come a few kilobytes later. The hardware does it better where a single row of q
// streams through adjacent rows; it falls behind a busier loop and does not follow rows that are far apart.
// Into the second level: the first one's few fill buffers would hold up the loads.
template <class T>
class Ahead {
 public:
  // Row j of the granule at `rows` is j * row on; those past it continue in the granule at `next`.
  void start(const T* rows, int64_t row, const T* next, int64_t next_row, int64_t width, int packed_rows) {
    bytes_ = packed_rows > 1 || row != width ? width * int64_t(sizeof(T)) : 0;
    rows_ = rows + kDistance * row, next_ = next - (kGranule - kDistance) * next_row;
    row_ = row, next_row_ = next_row;
  }
  // What follows rows [j, j + count).
  FASTATTN_INLINE void fetch(int j, int count) const {
    if (!bytes_) return;
    for (int n = j; n < j + count; ++n) {
      const char* at = (const char*)(n + kDistance < kGranule ? rows_ + n * row_ : next_ + n * next_row_);
      for (int64_t byte = 0; byte < bytes_; byte += 64) __builtin_prefetch(at + byte, 0, 2);
    }
  }

 private:
  static constexpr int kDistance = 32;  // rows: 4 to 16 KB
  int64_t bytes_, row_, next_row_;
  const T *rows_, *next_;
};

template <class T, class Lanes>
class DecodeSplit {
  static constexpr int kKeysPerUnit = Lanes::kKeysPerUnit;

 public:
  // False where the result is not finite although rows hide keys: compute again on the exact path.
  static bool run(const AttentionArgs& a, int64_t task, void* scratch, bool exact) {
    const DecodePlan plan(a);
    const int64_t split = task % plan.splits, item = task / plan.splits;
    const int64_t chunk = item % plan.chunks, kv = item / plan.chunks;
    const int64_t first = chunk * plan.heads, left = plan.group - first;
    const PackedRows rows(kv / a.Hkv, kv % a.Hkv, kv % a.Hkv * plan.group + first,
                          left < plan.heads ? left : plan.heads, a.Sq);
    DecodeSplit d(a, plan, rows, task, scratch, exact);
    d.start();
    const int64_t key = split * DecodePlan::kSplit, end = key + DecodePlan::kSplit;
    PackedMask mask(a, rows, key, end < a.Sk ? end : a.Sk);
    while (mask.next(&d.granule_[d.granules_])) {
      Granule& g = d.granule_[d.granules_];
      g.seen = g.partial ? mask.words(g, g.words) : ~0ull;
      if (a.bias) d.hide_by_bias(&g);
      d.hides_keys_ |= g.partial;
      if (g.seen) ++d.granules_;
    }
    for (int n = 0; n < d.granules_; ++n) d.scores(n);
    for (int r = 0; r < rows.count; ++r) {
      if (d.terms_)
        a.dropout ? d.template softmax<NaturalScores, true>(r) : d.template softmax<NaturalScores, false>(r);
      else a.dropout ? d.template softmax<FoldedScale, true>(r) : d.template softmax<FoldedScale, false>(r);
    }
    for (int n = 0; n < d.granules_; ++n) d.values(n, end < a.Sk ? end : 0);
    return d.finish() || exact || !d.hides_keys_;
  }

 private:
  struct Granule : PackedMask::Granule {
    uint64_t seen;             // keys that any row sees
    uint64_t words[kGranule];  // where partial: what each row sees, bias included
  };

  DecodeSplit(const AttentionArgs& a, const DecodePlan& plan, const PackedRows& rows, int64_t task,
              void* scratch, bool exact)
      : a_(a),
        rows_(rows),
        buf_(a, scratch),
        exact_(exact),
        terms_(has_score_terms(a)),
        out_stride_(plan.out_stride),
        max_(plan.max(a, task)),
        sum_(plan.sum(a, task)),
        out_(plan.out(a, task)) {}

  float* row(int r, int n) const { return buf_.scores + (n * buf_.rows + r) * kGranule; }

  void start() {
    k_ = (const T*)a_.k.data + rows_.b * a_.k.batch + rows_.kv_head * a_.k.head;
    v_ = (const T*)a_.v.data + rows_.b * a_.v.batch + rows_.kv_head * a_.v.head;
    for (int r = 0; r < rows_.count; ++r) {
      const T* q = (const T*)a_.q.data + rows_.b * a_.q.batch + rows_.head[r] * a_.q.head;
      Lanes::pack_q(q + rows_.row[r] * a_.q.row, a_.D, buf_.q + r * buf_.q_stride);
    }
    for (int64_t r = rows_.count; r < buf_.rows; ++r)
      memset(buf_.q + r * buf_.q_stride, 0, buf_.q_stride * 4);
    memset(out_, 0, rows_.count * out_stride_ * 4);
  }

  void hide_by_bias(Granule* g) const {
    uint64_t seen = 0, hidden = 0;
    for (int r = 0; r < rows_.count; ++r) {
      if (!g->partial) g->words[r] = ~0ull;
      g->words[r] &= a_.bias_fp32 ? row_bias_word<float>(a_, rows_, r, g->key, g->keys)
                                  : row_bias_word<T>(a_, rows_, r, g->key, g->keys);
      seen |= g->words[r], hidden |= ~g->words[r];
    }
    g->seen = seen, g->partial = hidden != 0;
  }

  void scores(int n) {
    const Granule& g = granule_[n];
    const T* k = k_ + g.key * a_.k.row;
    float* scores = row(0, n);
    const T* next = n + 1 < granules_ ? k_ + granule_[n + 1].key * a_.k.row : v_ + granule_[0].key * a_.v.row;
    ahead_.start(k, a_.k.row, next, n + 1 < granules_ ? a_.k.row : a_.v.row, a_.D, rows_.count);
    int r = 0;
    if constexpr (kTileVectors == 4) {
      for (; r + 2 < rows_.count; r += 4) score_rows<4>(k, g.keys, g.seen, r, scores);
    }
    for (; r + 1 < rows_.count; r += 2) score_rows<2>(k, g.keys, g.seen, r, scores);
    if (r < rows_.count) score_rows<1>(k, g.keys, g.seen, r, scores);
    if (terms_) apply_row_terms<T>(a_, rows_, g.key, g.keys, scores);
  }

  // Rows [r, r + ROWS) against the keys of a granule. Blocks that nobody sees keep what the buffer held.
  template <int ROWS>
  __attribute__((noinline)) void score_rows(const T* k, int keys, uint64_t seen, int r, float* scores) {
    constexpr int KEYS = kLanes / ROWS > 4 ? kLanes / ROWS : 4;
    const float* q = buf_.q + r * buf_.q_stride;
    for (int j = 0; j < kGranule; j += KEYS) {
      if (!(seen >> j & low_bits(KEYS))) continue;
      F32 acc[KEYS / 4][ROWS][4];
#pragma GCC unroll 4
      for (int quad = 0; quad < KEYS / 4; ++quad) {
        const T* row[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          const int at = j + quad * 4 + n;  // a key past the end reads the last one, and is masked
          row[n] = k + (at < keys ? at : keys - 1) * a_.k.row;
        }
        dot_quad<ROWS>(row, q, acc[quad]);
        if (r == 0) ahead_.fetch(j + quad * 4, 4);
      }
      F32 dots[ROWS * KEYS];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
        for (int n = 0; n < KEYS; ++n) dots[i * KEYS + n] = acc[n / 4][i][n % 4];
      }
      alignas(64) float sums[ROWS * KEYS];
#pragma GCC unroll 16
      for (int n = 0; n < ROWS * KEYS; n += kLanes) store(sums + n, lane_sums(dots + n));
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) memcpy(scores + (r + i) * kGranule + j, sums + i * KEYS, KEYS * 4);
    }
  }

  // acc[i][n]: row i of q with key n, not yet summed over the lanes. One row of q takes the keys one after
  // the other, in the order of memory, which the hardware prefetch follows best; several share each key's
  // loads.
  template <int ROWS>
  FASTATTN_INLINE void dot_quad(const T* const* row, const float* q, F32 (*acc)[4]) const {
    constexpr int KEYS = ROWS == 1 ? 1 : 4;
    const int64_t words = a_.D / Lanes::kElements;
#pragma GCC unroll 4
    for (int first = 0; first < 4; first += KEYS) {
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
        for (int n = first; n < first + KEYS; ++n) acc[i][n] = zero();
      }
      int64_t d = 0;
      for (; d + kLanes <= words; d += kLanes) {
        typename Lanes::Vector key[KEYS];
#pragma GCC unroll 4
        for (int n = 0; n < KEYS; ++n) key[n] = Lanes::load_keys(row[first + n] + d * Lanes::kElements);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
          const typename Lanes::Vector query = Lanes::load_q(q + i * buf_.q_stride + d);
#pragma GCC unroll 4
          for (int n = 0; n < KEYS; ++n) acc[i][first + n] = Lanes::step(key[n], query, acc[i][first + n]);
        }
      }
      if (d == words) continue;
#pragma GCC unroll 4
      for (int n = first; n < first + KEYS; ++n) {
        const typename Lanes::Vector key = Lanes::load_keys_n(row[n] + d * Lanes::kElements, words - d);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
          acc[i][n] = Lanes::step(key, Lanes::load_q(q + i * buf_.q_stride + d), acc[i][n]);
        }
      }
    }
  }

  // Scores of a row to probabilities: the row's maximum over the split first, then the exponentials.
  template <class Units, bool DROPOUT>
  void softmax(int r) {
    const F32 scale = splat(a_.scale * kLog2E);
    F32 top = splat(-__builtin_inff());
    for (int n = 0; n < granules_; ++n) {
      const Granule& g = granule_[n];
      float* s = row(r, n);
      for (int c = 0; c < kVectors; ++c) {
        F32 x = load(s + c * kLanes);
        if (g.partial) {
          x = select(mask_of_bits(uint32_t(g.words[r] >> (c * kLanes))), x, splat(-__builtin_inff()));
          store(s + c * kLanes, x);
        }
        top = max(top, x);
      }
    }
    max_[r] = reduce_max(Units::maximum(top, scale));
    // A row that sees nothing has no maximum; any finite pivot gives its keys exp2(-inf) = 0.
    const F32 pivot = splat(max_[r] > -__builtin_inff() ? max_[r] : 0.f);
    F32 sum = zero();
    for (int n = 0; n < granules_; ++n) {
      float* s = row(r, n);
      const uint64_t kept = DROPOUT ? dropout_row_word(a_, rows_, r, granule_[n].key, granule_[n].keys) : 0;
      for (int c = 0; c < kVectors; ++c) {
        F32 e = exp2<kExpDegree<T>>(Units::exponent(load(s + c * kLanes), scale, pivot));
        sum = sum + e;
        if constexpr (DROPOUT) {
          e = select(mask_of_bits(uint32_t(kept >> (c * kLanes))), e * splat(a_.dropout_scale), zero());
        }
        Lanes::put(s, c * kLanes, e);
      }
    }
    sum_[r] = reduce_add(sum);
  }

  void values(int n, int64_t next_split) {
    const Granule& g = granule_[n];
    const float* p = row(0, n);
    // The rows of V to add up: units of one key, or of a pair of which any row sees either.
    const T* v = v_ + g.key * a_.v.row;
    if (n + 1 < granules_)
      ahead_.start(v, a_.v.row, v_ + granule_[n + 1].key * a_.v.row, a_.v.row, a_.Dv, rows_.count);
    else ahead_.start(v, a_.v.row, k_ + next_split * a_.k.row, a_.k.row, a_.Dv, rows_.count);
    units_ = 0;
    for (int j = 0; j < g.keys; j += kKeysPerUnit) {
      if (!(g.seen >> j & low_bits(kKeysPerUnit))) continue;
      unit_[units_] = uint8_t(j / kKeysPerUnit);
      even_[units_] = v + j * a_.v.row;
      odd_[units_++] = v + (j + 1 < g.keys ? j + 1 : j) * a_.v.row;
    }
    const uint64_t poisoned = exact_ ? take_out_poisoned(g) : 0;
    int r = 0;
    if constexpr (kTileVectors == 4) {
      for (; r + 4 <= rows_.count; r += 4) value_rows<4>(r, p);
    }
    for (; r + 2 <= rows_.count; r += 2) value_rows<2>(r, p);
    if (r < rows_.count) value_rows<1>(r, p);
    for (uint64_t left = poisoned; left; left &= left - 1) add_where_seen(g, p, __builtin_ctzll(left));
  }

  // The exact path: keys whose values are not finite become zeros; returns those keys.
  uint64_t take_out_poisoned(const Granule& g) {
    const T* v = v_ + g.key * a_.v.row;
    uint64_t poisoned = 0;
    for (int j = 0; j < g.keys; ++j) {
      float check = 0.f;
      for (int64_t d = 0; d < a_.Dv; ++d) check += as_float(v[j * a_.v.row + d]) * 0.f;
      if (check != 0.f) poisoned |= 1ull << j;
    }
    memset(buf_.merged, 0, out_stride_ * 4);
    const T* zeros = (const T*)buf_.merged;
    for (int t = 0; t < units_; ++t) {
      const int j = unit_[t] * kKeysPerUnit, next = j + 1 < g.keys ? j + 1 : j;
      if (poisoned >> j & 1) even_[t] = zeros;
      if (poisoned >> next & 1) odd_[t] = zeros;
    }
    return poisoned;
  }

  void add_where_seen(const Granule& g, const float* p, int j) {
    const T* v = v_ + (g.key + j) * a_.v.row;
    for (int r = 0; r < rows_.count; ++r) {
      if (g.partial && !(g.words[r] >> j & 1)) continue;
      const float weight = Lanes::probability_of(p + r * kGranule, j);
      for (int64_t d = 0; d < a_.Dv; ++d) out_[r * out_stride_ + d] += weight * as_float(v[d]);
    }
  }

  template <int ROWS>
  void value_rows(int r, const float* p) {
    p += r * kGranule;
    int64_t d = 0;
    if constexpr (ROWS == 1) {
      for (; d + 8 * kLanes <= a_.Dv; d += 8 * kLanes) value_tile<1, 8, false>(r, d, p);
    }
    for (; d + 4 * kLanes <= a_.Dv; d += 4 * kLanes) value_tile<ROWS, 4, false>(r, d, p);
    for (; d + 2 * kLanes <= a_.Dv; d += 2 * kLanes) value_tile<ROWS, 2, false>(r, d, p);
    for (; d + kLanes <= a_.Dv; d += kLanes) value_tile<ROWS, 1, false>(r, d, p);
    if (d < a_.Dv) value_tile<ROWS, 1, true>(r, d, p);
  }

  // O[r .. r + ROWS)[d .. d + VECTORS * kLanes) += P V
  template <int ROWS, int VECTORS, bool TAIL>
  __attribute__((noinline)) void value_tile(int r, int64_t d, const float* p) {
    float* out = out_ + r * out_stride_ + d;
    F32 acc[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
      for (int c = 0; c < VECTORS; ++c) acc[i][c] = load(out + i * out_stride_ + c * kLanes);
    }
    for (int t = 0; t < units_; ++t) {
      if (r == 0 && d == 0) ahead_.fetch(unit_[t] * kKeysPerUnit, kKeysPerUnit);
      typename Lanes::Vector value[VECTORS];
      if constexpr (TAIL) value[0] = Lanes::load_values_n(even_[t] + d, odd_[t] + d, a_.Dv - d);
      else Lanes::template load_values<VECTORS>(even_[t] + d, odd_[t] + d, value);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        const typename Lanes::Vector probability = Lanes::probability(p + i * kGranule, unit_[t]);
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; ++c) acc[i][c] = Lanes::step(value[c], probability, acc[i][c]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
      for (int c = 0; c < VECTORS; ++c) store(out + i * out_stride_ + c * kLanes, acc[i][c]);
    }
  }

  // False where a number of the output is not finite.
  bool finish() {
    F32 check = zero();
    for (int r = 0; r < rows_.count; ++r) {
      const float* out = out_ + r * out_stride_;
      for (int64_t d = 0; d < out_stride_; d += kLanes) check = fma(load(out + d), zero(), check);
    }
    return !any(is_nan(check));
  }

  const AttentionArgs& a_;
  const PackedRows& rows_;
  DecodeBuffers buf_;
  const bool exact_, terms_;
  const int64_t out_stride_;
  float *max_, *sum_, *out_;  // this split's partial result
  const T *k_ = nullptr, *v_ = nullptr;
  bool hides_keys_ = false;
  Ahead<T> ahead_;
  int granules_ = 0, units_ = 0;
  Granule granule_[DecodePlan::kSplit / kGranule + 1];  // one more: what next() fills before it says no
  uint8_t unit_[kGranule];
  const T *even_[kGranule], *odd_[kGranule];
};

template <class T, class Lanes>
void decode_split(const AttentionArgs& a, int64_t task, void* scratch) {
  if (!DecodeSplit<T, Lanes>::run(a, task, scratch, false)) {
    DecodeSplit<T, Lanes>::run(a, task, scratch, true);
  }
}

template <class T>
void decode_task(const AttentionArgs& a, int64_t task, void* scratch) {
  decode_split<T, WidenedLanes<T>>(a, task, scratch);
}

#ifdef FASTATTN_HAS_DOT2
template <>
void decode_task<BFloat16>(const AttentionArgs& a, int64_t task, void* scratch) {
  if (a.D % 2 == 0) {
    decode_split<BFloat16, PairedLanes>(a, task, scratch);
  } else {
    decode_split<BFloat16, WidenedLanes<BFloat16>>(a, task, scratch);
  }
}
#endif

template <class Out>
void store_merged(Out* out, const float* row, float factor, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes) store_n(out + d, load(row + d) * splat(factor), width - d);
}

// Merges the splits of one item, in their order, and writes its rows of out and lse.
template <class T>
void decode_merge(const AttentionArgs& a, int64_t item, void* scratch) {
  const DecodePlan plan(a);
  const int64_t chunk = item % plan.chunks, kv = item / plan.chunks, b = kv / a.Hkv;
  const int64_t first = item * plan.splits, first_head = kv % a.Hkv * plan.group + chunk * plan.heads;
  const int64_t left = plan.group - chunk * plan.heads, heads = left < plan.heads ? left : plan.heads;
  const bool terms = has_score_terms(a);
  float* merged = DecodeBuffers(a, scratch).merged;
  for (int64_t r = 0; r < heads * a.Sq; ++r) {
    float top = -__builtin_inff(), sum = 0.f;
    for (int64_t s = 0; s < plan.splits; ++s) {
      const float m = plan.max(a, first + s)[r];
      top = m > top ? m : top;
    }
    memset(merged, 0, plan.out_stride * 4);
    for (int64_t s = 0; s < plan.splits; ++s) {
      const float part = plan.sum(a, first + s)[r];
      if (part == 0.f) continue;
      const F32 m = splat(plan.max(a, first + s)[r]);
      const F32 weight =
          exp2<5>(terms ? NaturalScores::difference(m, splat(top)) : FoldedScale::difference(m, splat(top)));
      const float* out = plan.out(a, first + s) + r * plan.out_stride;
      for (int64_t d = 0; d < plan.out_stride; d += kLanes) {
        store(merged + d, fma(load(out + d), weight, load(merged + d)));
      }
      sum += part * reduce_max(weight);
    }
    const int64_t h = first_head + r / a.Sq, i = r % a.Sq;
    const float lse = reduce_max(terms ? NaturalScores::lse(splat(top), splat(sum))
                                       : FoldedScale::lse(splat(top), splat(sum)));
    float factor = sum == 0.f ? 0.f : 1.f / sum;
    if (a.sinks && sum != 0.f) factor *= 1.f / (1.f + __builtin_expf(a.sinks[h] - lse));
    if (a.lse) a.lse[(b * a.Hq + h) * a.Sq + i] = lse;
    const int64_t offset = b * a.out_batch + h * a.out_head + i * a.out_row;
    if (a.out_fp32) store_merged((float*)a.out + offset, merged, factor, a.Dv);
    else store_merged((T*)a.out + offset, merged, factor, a.Dv);
  }
}

}  // namespace
}  // namespace fastattn
