// Attention forward, vector form: one task is 64 query rows of one head against every key they see.
//
//   S^T = K Q^T, P^T = exp2(S^T - max), O^T += V^T P^T          (FlashAttention's online softmax)
//
// Everything is transposed: a lane is a query. Then the softmax needs no horizontal reduction, K and V are
// read in place as the broadcast operand of the register tile and never packed, and any Sk, D and Dv is
// served without a padded copy. Q^T is packed once a task; bf16 and fp16 keys and values are widened (or,
// where the machine has a bf16 dot, interleaved) a granule at a time.
//
// A row keeps the pivot it got from the first keys it saw, 7 over their maximum as an exponent of 2, until
// its weights of a granule sum to more than 64: then the scores are computed again and it gets a new one. So
// nothing looks for maxima and O^T is hardly ever rescaled, 5 to 7 % of a call in fp32; weights of 2^-7 are
// as exact as those of 1. With terms, which may grow from granule to granule, each granule's maxima are
// looked for.
//
// Hidden NaN: 0 * NaN in P V would reach the output, so a task whose result is not finite is computed once
// more on the exact path, which adds the rows of V that are not finite only where they are seen.
#pragma once

#include "attention_args.h"
#include "attention_operands.h"
#include "block_mask.h"
#include "score_terms.h"

namespace fastattn {
namespace {

// Degree of exp2: its error stays well below half a unit of the storage type.
template <class T>
constexpr int kExpDegree = 5;
template <>
constexpr int kExpDegree<BFloat16> = 4;
template <>
constexpr int kExpDegree<Half> = 4;

// How a score becomes an exponent of 2. Without terms the scale is folded into one multiply-add; with terms
// the maximum is subtracted in natural units, where the lowest finite bias does not overflow. The backward's
// weights are no better than lse, so that is rounded once.
struct FoldedScale {
  static constexpr float kUnit = 1;  // of an exponent of 2
  static FASTATTN_INLINE F32 exponent(F32 x, F32 scale, F32 pivot) { return fms(x, scale, pivot); }
  static FASTATTN_INLINE F32 maximum(F32 x, F32 scale) { return x * scale; }
  static FASTATTN_INLINE F32 difference(F32 a, F32 b) { return a - b; }
  static FASTATTN_INLINE F32 lse(F32 top, F32 sum) {
    const Log2 l = log2(sum);
    F32 rest;
    const F32 whole = two_sum(top, l.whole, &rest);
    rest = fma(whole, splat(kLn2Low), (l.rest + rest) * splat(kLn2));
    return fma(whole, splat(kLn2), finite_or_0(rest));
  }
};
struct NaturalScores {
  static constexpr float kUnit = kLn2;
  static FASTATTN_INLINE F32 exponent(F32 x, F32, F32 pivot) { return (x - pivot) * splat(kLog2E); }
  static FASTATTN_INLINE F32 maximum(F32 x, F32) { return x; }
  static FASTATTN_INLINE F32 difference(F32 a, F32 b) { return (a - b) * splat(kLog2E); }
  static FASTATTN_INLINE F32 lse(F32 top, F32 sum) {
    const Log2 l = log2(sum);
    const F32 high = l.whole * splat(kLn2);
    F32 rest;
    const F32 whole = two_sum(top, high, &rest);
    rest = rest + fms(l.whole, splat(kLn2), high) + fma(l.whole, splat(kLn2Low), l.rest * splat(kLn2));
    return whole + finite_or_0(rest);
  }
};

// The keys of a head that a thread has read in this call; they are in its cache.
struct ReadKeys {
  uint64_t call;
  int64_t head, lo, hi;

  void start(uint64_t of_call, int64_t of_head) {
    if (call != of_call || head != of_head) *this = {of_call, of_head, INT64_MAX, 0};
  }
  void add(int64_t key) {
    if (key < lo) lo = key;
    if (key + kGranule > hi) hi = key + kGranule;
  }
  bool has(int64_t key) const { return lo <= key && key < hi; }
};

// Scratch of one thread, carved from one allocation.
struct AttentionBuffers {
  float *q, *scores, *terms, *out, *k, *v, *pivot, *sum, *alpha;
  ReadKeys* read;

  static int64_t bytes(const AttentionArgs& a) {
    return 4 * kGranule * (a.D + 2 * kGranule + a.Dv + (a.D > a.Dv ? a.D : a.Dv) + 16 + a.Dv + 16 + 3 + 1);
  }
  AttentionBuffers(const AttentionArgs& a, void* scratch) {
    float* p = (float*)scratch;
    const auto take = [&](int64_t rows) {
      float* at = p;
      p += rows * kGranule;
      return at;
    };
    q = take(a.D), scores = take(kGranule), terms = take(kGranule), out = take(a.Dv);
    k = take((a.D > a.Dv ? a.D : a.Dv) + 16), v = take(a.Dv + 16), pivot = take(1), sum = take(1),
    alpha = take(1), read = (ReadKeys*)take(1);
  }
};

// The rows of a task.
struct TaskRows {
  int64_t b, h, first;
  int count;

  TaskRows(const AttentionArgs& a, int64_t task) {
    // Late blocks first: under a causal mask they are the long ones.
    const int64_t blocks = a.q_blocks(), head = task / blocks;
    b = head / a.Hq, h = head % a.Hq, first = (blocks - 1 - task % blocks) * kGranule;
    count = int(a.Sq - first < kGranule ? a.Sq - first : kGranule);
  }
};

// Asks for a granule of keys and its values; `keys` is the use of the keys, the next one that of the values.
template <class T>
void ask_for_keys(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t key, Prefetch::Use keys,
                  Prefetch* prefetch) {
  const int64_t count = a.Sk - key < kGranule ? a.Sk - key : kGranule;
  prefetch->ask(keys, a.k, sizeof(T), b, kv_head, key, count, a.D);
  prefetch->ask(Prefetch::Use(keys + 1), a.v, sizeof(T), b, kv_head, key, count, a.Dv);
}

// Before a task: asks for the rows of its result, and for what the task after it reads first, but not for
// keys of the same head that `has` says the thread has read.
template <class T, class Has>
void look_past(const AttentionArgs& a, int64_t task, const TaskRows& t, const Has& has, Prefetch* prefetch) {
  const int64_t group = a.Hq / a.Hkv;
  prefetch->ask(Prefetch::kOut, {a.out, a.out_batch, a.out_head, a.out_row}, a.out_fp32 ? 4 : sizeof(T), t.b,
                t.h, t.first, t.count, a.Dv);
  if (task + 1 == a.tasks()) return;
  const TaskRows n(a, task + 1);
  prefetch->ask(Prefetch::kNextQueries, a.q, sizeof(T), n.b, n.h, n.first, n.count, a.D);
  const int64_t key = BlockMask::first_key(a, n.b, n.h, n.first);
  if (key >= a.Sk || (n.b == t.b && n.h / group == t.h / group && has(key))) return;
  ask_for_keys<T>(a, n.b, n.h / group, key, Prefetch::kNextKeys, prefetch);
}

// O^T, ROW floats a row, times a factor a lane, transposed back and stored; false where a number of it is not
// finite.
template <int64_t ROW, class Out>
bool store_rows(const AttentionArgs& a, int count, const float* o, const float* factors, Out* out) {
  F32 check = zero();
  for (int c = 0; c * kLanes < count; ++c) {
    const F32 factor = load(factors + c * kLanes);
    const int lanes = count - c * kLanes < kLanes ? count - c * kLanes : kLanes;
    int64_t d = 0;
#ifdef FASTATTN_HAS_DOT2
    if constexpr (__is_same(Out, BFloat16)) {
      // Rounded to pairs first, which halves what there is to transpose.
      for (; d + 2 * kLanes <= a.Dv; d += 2 * kLanes) {
        F32 r[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const float* at = o + (d + 2 * i) * ROW + c * kLanes;
          const F32 x = load(at) * factor, y = load(at + ROW) * factor;
          check = fma(y, zero(), fma(x, zero(), check));
          r[i] = float_of(pack_pairs(x, y));
        }
        transpose(r);
        for (int i = 0; i < lanes; ++i) store((float*)(out + (c * kLanes + i) * a.out_row + d), r[i]);
      }
    }
#endif
    for (; d < a.Dv; d += kLanes) {
      F32 r[kLanes];
      const int64_t n = a.Dv - d < kLanes ? a.Dv - d : kLanes;
      for (int i = 0; i < kLanes; ++i) {
        r[i] = i < n ? load(o + (d + i) * ROW + c * kLanes) * factor : zero();
        check = fma(r[i], zero(), check);
      }
      transpose(r);
      for (int i = 0; i < lanes; ++i) store_n(out + (c * kLanes + i) * a.out_row + d, r[i], n);
    }
  }
  return !any(is_nan(check));
}

// Writes out and lse from O^T and each row's maximum and sum, as the softmax left them; false where out is
// not finite.
template <class T, int64_t ROW = kGranule>
bool finish_rows(const AttentionArgs& a, const QueryRows& rows, const float* o, const float* max,
                 const float* sum) {
  alignas(64) float inverse[kGranule], lse[kGranule];
  const bool terms = has_score_terms(a);
  for (int c = 0; c * kLanes < rows.count; ++c) {
    const F32 s = load(sum + c * kLanes), top = load(max + c * kLanes);
    if (a.lse || a.sinks)
      store(lse + c * kLanes, terms ? NaturalScores::lse(top, s) : FoldedScale::lse(top, s));
    store(inverse + c * kLanes, select(s > zero(), splat(1.f) / s, s));
  }
  if (a.sinks) {
    for (int r = 0; r < rows.count; ++r) {
      inverse[r] *= 1.f / (1.f + __builtin_expf(a.sinks[rows.h] - lse[r]));
      if (sum[r] == 0.f) inverse[r] = 0.f;
    }
  }
  if (a.lse) memcpy(a.lse + (rows.b * a.Hq + rows.h) * a.Sq + rows.first, lse, rows.count * 4);
  const int64_t offset = rows.b * a.out_batch + rows.h * a.out_head + rows.first * a.out_row;
  return a.out_fp32 ? store_rows<ROW>(a, rows.count, o, inverse, (float*)a.out + offset)
                    : store_rows<ROW>(a, rows.count, o, inverse, (T*)a.out + offset);
}

template <class T, class Operands>
class AttentionForward {
  using Product = typename Operands::Product;
  static constexpr int kKeysPerStep = Operands::kKeysPerStep;
  static constexpr int kWeighed = kTileVectors / 2;  // lane vectors whose weights are made side by side
  static constexpr int kFewKeys = 16;
  // Of a pivot over the maximum it was taken from, as an exponent of 2, and what a row's weights of a granule
  // may add up to before it takes another. Exponents that count then lie between -8 and 8, where rounding
  // takes 2^-22 at most.
  static constexpr float kMargin = 1, kMostWeights = 256;

 public:
  // False where the result is not finite although rows hide keys: compute again on the exact path.
  static bool run(const AttentionArgs& a, int64_t task, void* scratch, bool exact) {
    const TaskRows t(a, task);
    AttentionForward f{a, AttentionBuffers(a, scratch), QueryRows(a, t.b, t.h, t.first, t.count), exact};
    f.start();
    f.buf_.read->start(a.call, t.b * a.Hkv + f.kv_head_);
    look_past<T>(a, task, t, [&](int64_t key) { return f.buf_.read->has(key); }, &f.prefetch_);
    BlockMask mask(a, t.b, t.h, t.first, t.count);
    BlockMask::Granule g, next;
    for (bool more = mask.next(&next); more;) {
      g = next;
      more = mask.next(&next);
      f.look_ahead(g, more ? &next : nullptr);
      if (g.partial) {
        f.hides_keys_ = true;
        if (mask.words(g, f.words_)) f.segments_ = segments_of(f.words_, g.keys, f.segment_);
        else continue;
      } else {
        f.segment_[0] = {0, g.keys, 0, f.vectors_};
        f.segments_ = 1;
      }
      f.granule(g);
    }
    if (!f.started_) f.clear_out();
    const bool finite = finish_rows<T>(a, f.rows_, f.buf_.out, f.buf_.pivot, f.buf_.sum);
    return finite || !(f.hides_keys_ || a.bias) || exact;
  }

 private:
  AttentionForward(const AttentionArgs& a, AttentionBuffers buffers, const QueryRows& rows, bool exact)
      : a_(a),
        buf_(buffers),
        rows_(rows),
        exact_(exact),
        vectors_((rows.count + kLanes - 1) / kLanes),
        terms_(has_score_terms(a)) {}

  void start() {
    const T* q = (const T*)a_.q.data + rows_.b * a_.q.batch + rows_.h * a_.q.head + rows_.first * a_.q.row;
    Operands::pack_q(q, a_.q.row, rows_.count, a_.D, buf_.q);
    kv_head_ = rows_.h / (a_.Hq / a_.Hkv);
    k_ = (const T*)a_.k.data + rows_.b * a_.k.batch + kv_head_ * a_.k.head;
    v_ = (const T*)a_.v.data + rows_.b * a_.v.batch + kv_head_ * a_.v.head;
    for (int c = 0; c < vectors_; ++c) {
      store(buf_.pivot + c * kLanes, splat(-__builtin_inff()));
      store(buf_.sum + c * kLanes, zero());
    }
    for (int r = rows_.count; r < vectors_ * kLanes; ++r) buf_.pivot[r] = 0;  // lanes of no row need none
  }

  void clear_out() {
    for (int64_t d = 0; d < a_.Dv; ++d) {
      for (int c = 0; c < vectors_; ++c) store(buf_.out + d * kGranule + c * kLanes, zero());
    }
  }

  // Before granule g: asks for the one after it.
  void look_ahead(const BlockMask::Granule& g, const BlockMask::Granule* next) {
    buf_.read->add(g.key);
    if (next && !buf_.read->has(next->key)) {
      ask_for_keys<T>(a_, rows_.b, kv_head_, next->key, Prefetch::kKeys, &prefetch_);
    }
  }

  void granule(BlockMask::Granule g) {
    if (a_.dropout) dropout_words(a_, rows_, g.key, g.keys, keep_);
    scores(g);
    rescales_ = false;
    if (terms_) {
      apply_score_terms<T>(a_, rows_, g.key, g.keys, buf_.scores, buf_.terms, 0, vectors_);
      if (exact_ && a_.bias) hide_by_bias(&g);
      take_pivots<NaturalScores>(g.partial, kGranule);
      weigh<NaturalScores>(g.partial);
    } else {
      // Where all rows see all keys the first few tell enough, unless they are -inf.
      if (lacks_pivots_ && !g.partial) take_pivots<FoldedScale>(false, kFewKeys);
      if (lacks_pivots_) take_pivots<FoldedScale>(g.partial, kGranule);
      if (!weigh<FoldedScale>(g.partial)) {
        scores(g);
        take_pivots<FoldedScale>(g.partial, kGranule);
        weigh<FoldedScale>(g.partial);
      }
    }
    add_sums();
    values(g);
  }

  // Takes the keys that the bias hides from the granule's words.
  void hide_by_bias(BlockMask::Granule* g) {
    for (int j = 0; j < g->keys; ++j) {
      uint64_t seen = 0;
      for (int c = 0; c < vectors_; ++c) {
        const F32 x = load(buf_.scores + j * kGranule + c * kLanes);
        seen |= uint64_t(bits_of(x > splat(-__builtin_inff())) | bits_of(is_nan(x))) << (c * kLanes);
      }
      words_[j] = g->partial ? words_[j] & seen : seen & low_bits(rows_.count);
    }
    g->partial = true;
  }

  void scores(const BlockMask::Granule& g) {
    const Broadcast keys = Operands::keys(k_ + g.key * a_.k.row, a_.k.row, g.keys, a_.D, buf_.k);
    for (int s = 0; s < segments_; ++s) {
      const Segment& seg = segment_[s];
      const Broadcast part{keys.data + seg.first * keys.row_bytes, keys.row_bytes, keys.step_bytes};
      product<Product, Start::kZero, false>(part, seg.last - seg.first, Operands::steps(a_.D), buf_.q,
                                            buf_.scores + seg.first * kGranule, seg.from, seg.to, kGranule,
                                            kGranule, &prefetch_);
    }
  }

  // New pivots for rows whose maximum of the granule's first `keys` is over theirs; alpha scales what they
  // have so far.
  template <class Units>
  void take_pivots(bool masked, int keys) {
    const F32 scale = splat(a_.scale * kLog2E), hidden = splat(-__builtin_inff());
    lacks_pivots_ = false;
    for (int c = 0; c < vectors_; ++c) {
      F32 top[4] = {hidden, hidden, hidden, hidden};
      for (int s = 0; s < segments_; ++s) {
        const Segment& seg = segment_[s];
        if (c < seg.from || c >= seg.to) continue;
        for (int j = seg.first; j < seg.last && j < keys; ++j) {
          const F32 x = load(buf_.scores + j * kGranule + c * kLanes);
          top[j % 4] = max(top[j % 4], masked ? select(visible(j, c), x, hidden) : x);
        }
      }
      const F32 before = load(buf_.pivot + c * kLanes);
      const F32 now = Units::maximum(max(max(top[0], top[1]), max(top[2], top[3])), scale);
      // Which of the others the row came with must not matter: those that have a pivot that fits keep it.
      const F32 keeps = select(outgrown(c), before, splat(__builtin_inff()));
      const Mask over = now > (terms_ ? before : select(before > hidden, keeps, before));
      const F32 pivot = select(over, now + splat(kMargin * Units::kUnit), before);
      store(buf_.pivot + c * kLanes, pivot);
      store(buf_.alpha + c * kLanes, select(over, exp2<5>(Units::difference(before, pivot)), splat(1.f)));
      rescales_ |= any(over) && any(before > hidden);
      lacks_pivots_ |= bits_of(pivot > hidden) != low_bits(kLanes);
    }
  }

  // Scores to weights; false where some have outgrown their pivots.
  template <class Units>
  bool weigh(bool masked) {
    memset(fresh_, 0, sizeof fresh_);
    for (int s = 0; s < segments_; ++s) {
      for (int c = segment_[s].from; c < segment_[s].to;) {
        const int n = segment_[s].to - c < kWeighed ? 1 : kWeighed;
        if (masked) {
          a_.dropout ? weigh<Units, true, true>(segment_[s], c, n)
                     : weigh<Units, true, false>(segment_[s], c, n);
        } else {
          a_.dropout ? weigh<Units, false, true>(segment_[s], c, n)
                     : weigh<Units, false, false>(segment_[s], c, n);
        }
        c += n;
      }
    }
    bool fit = true;
    for (int c = 0; c < vectors_; ++c) fit &= !any(outgrown(c));
    return fit;
  }

  Mask outgrown(int c) const { return load(fresh_ + c * kLanes) > splat(kMostWeights); }

  template <class Units, bool MASKED, bool DROPOUT>
  void weigh(const Segment& seg, int c, int n) {
    n == 1 ? weigh<Units, MASKED, DROPOUT, 1>(seg, c) : weigh<Units, MASKED, DROPOUT, kWeighed>(seg, c);
  }

  // N lane vectors from c on. fp32 stays in place; pairs go to `terms`.
  template <class Units, bool MASKED, bool DROPOUT, int N>
  void weigh(const Segment& seg, int c) {
    const F32 scale = splat(a_.scale * kLog2E);
    F32 pivot[N], even[N], odd[N];
    for (int i = 0; i < N; ++i) {
      const F32 x = load(buf_.pivot + (c + i) * kLanes);
      // A row that has seen nothing yet has none; any finite one gives its keys exp2(-inf) = 0.
      pivot[i] = select(x > splat(-__builtin_inff()), x, zero());
      even[i] = odd[i] = zero();
    }
    int j = seg.first;
    for (; j + 2 <= seg.last; j += 2) {
      for (int i = 0; i < N; ++i) {
        F32 e0 = weight<Units, MASKED>(j, c + i, scale, pivot[i]);
        F32 e1 = weight<Units, MASKED>(j + 1, c + i, scale, pivot[i]);
        even[i] = even[i] + e0;
        odd[i] = odd[i] + e1;
        if constexpr (DROPOUT) e0 = kept(j, c + i, e0), e1 = kept(j + 1, c + i, e1);
        put(j, c + i, e0, e1);
      }
    }
    if (j < seg.last) {
      for (int i = 0; i < N; ++i) {
        F32 e = weight<Units, MASKED>(j, c + i, scale, pivot[i]);
        even[i] = even[i] + e;
        if constexpr (DROPOUT) e = kept(j, c + i, e);
        put(j, c + i, e, zero());
      }
    }
    for (int i = 0; i < N; ++i) {
      float* at = fresh_ + (c + i) * kLanes;
      store(at, load(at) + (even[i] + odd[i]));
    }
  }

  template <class Units, bool MASKED>
  FASTATTN_INLINE F32 weight(int j, int c, F32 scale, F32 pivot) const {
    const F32 x = load(buf_.scores + j * kGranule + c * kLanes);
    return exp2<kExpDegree<T>>(
        Units::exponent(MASKED ? select(visible(j, c), x, splat(-__builtin_inff())) : x, scale, pivot));
  }

  void add_sums() {
    for (int c = 0; c < vectors_; ++c) {
      F32 sum = load(buf_.sum + c * kLanes);
      if (rescales_) sum = sum * load(buf_.alpha + c * kLanes);
      store(buf_.sum + c * kLanes, sum + load(fresh_ + c * kLanes));
    }
  }

  FASTATTN_INLINE Mask visible(int j, int c) const {
    return mask_of_bits(uint32_t(words_[j] >> (c * kLanes)));
  }
  FASTATTN_INLINE F32 kept(int j, int c, F32 e) const {
    return select(mask_of_bits(uint32_t(keep_[j] >> (c * kLanes))), e * splat(a_.dropout_scale), zero());
  }
  FASTATTN_INLINE void put(int j, int c, F32 e0, F32 e1) {
    if constexpr (kKeysPerStep == 1) {
      float* at = buf_.scores + j * kGranule + c * kLanes;
      store(at, e0);
      store(at + kGranule, e1);  // past the last key: a row of the 64 that nobody reads
    } else {
#ifdef FASTATTN_HAS_DOT2
      store((int32_t*)buf_.terms + j / 2 * kGranule + c * kLanes, pack_pairs(e0, e1));
#endif
    }
  }

  void values(const BlockMask::Granule& g) {
    const T* v = v_ + g.key * a_.v.row;
    int64_t stride = a_.v.row;
    uint64_t poisoned = 0;
    if (exact_ && g.partial) {
      poisoned = clean_values(v, g.keys);
      if (poisoned) v = (const T*)buf_.k, stride = a_.Dv;
    }
    const Broadcast values = Operands::values(v, stride, g.keys, a_.Dv, buf_.v);
    if (rescales_) {
      for (int64_t d = 0; d < a_.Dv; ++d) {
        for (int c = 0; c < vectors_; ++c) {
          float* at = buf_.out + d * kGranule + c * kLanes;
          store(at, load(at) * load(buf_.alpha + c * kLanes));
        }
      }
    }
    const bool whole = segments_ == 1 && segment_[0].from == 0 && segment_[0].to == vectors_;
    if (started_ || !whole) {
      if (!started_) clear_out();
      multiply_values<Start::kAccumulate>(values);
    } else {
      multiply_values<Start::kZero>(values);
    }
    started_ = true;
    for (int j = 0; poisoned; ++j, poisoned >>= 1) {
      if (poisoned & 1) add_where_seen(v_ + (g.key + j) * a_.v.row, j);
    }
  }

  template <Start START>
  void multiply_values(const Broadcast& values) {
    const float* p = kKeysPerStep == 1 ? buf_.scores : buf_.terms;
    for (int s = 0; s < segments_; ++s) {
      const Segment& seg = segment_[s];
      const int from = seg.first / kKeysPerStep, to = (seg.last + kKeysPerStep - 1) / kKeysPerStep;
      const Broadcast part{values.data + from * values.step_bytes, values.row_bytes, values.step_bytes};
      product<Product, START, true>(part, a_.Dv, to - from, p + from * kGranule, buf_.out, seg.from, seg.to,
                                    kGranule, kGranule, &prefetch_);
    }
  }

  // The rows of V that are not finite and not seen by all; where there are any, buf_.k becomes a copy of the
  // granule's values with those rows 0. (The granule's keys are done with.)
  uint64_t clean_values(const T* v, int keys) {
    uint64_t poisoned = 0;
    for (int j = 0; j < keys; ++j) {
      float check = 0.f;
      for (int64_t d = 0; d < a_.Dv; ++d) check += as_float(v[j * a_.v.row + d]) * 0.f;
      if (check != 0.f && words_[j] != low_bits(rows_.count)) poisoned |= 1ull << j;
    }
    if (!poisoned) return 0;
    T* clean = (T*)buf_.k;
    for (int j = 0; j < keys; ++j) {
      for (int64_t d = 0; d < a_.Dv; ++d) {
        clean[j * a_.Dv + d] = poisoned >> j & 1 ? T{} : v[j * a_.v.row + d];
      }
    }
    return poisoned;
  }

  void add_where_seen(const T* v, int j) {
    for (int r = 0; r < rows_.count; ++r) {
      if (!(words_[j] >> r & 1)) continue;
      const float p = probability(j, r);
      for (int64_t d = 0; d < a_.Dv; ++d) buf_.out[d * kGranule + r] += p * as_float(v[d]);
    }
  }

  float probability(int j, int lane) const {
    if constexpr (kKeysPerStep == 1) return buf_.scores[j * kGranule + lane];
    const uint32_t pair = as_bits(buf_.terms[j / 2 * kGranule + lane]);
    return from_bits(j % 2 ? pair & 0xffff0000u : pair << 16);
  }

  const AttentionArgs& a_;
  AttentionBuffers buf_;
  const QueryRows rows_;
  const bool exact_;
  const int vectors_;
  const bool terms_;
  int64_t kv_head_ = 0;
  const T *k_ = nullptr, *v_ = nullptr;
  Prefetch prefetch_;
  bool started_ = false, hides_keys_ = false, lacks_pivots_ = true, rescales_ = false;
  int segments_ = 0;
  Segment segment_[4];
  alignas(64) float fresh_[kGranule] = {};  // of each row: the sum of this granule's weights
  alignas(64) uint64_t words_[kGranule];
  uint64_t keep_[kGranule];
};

template <class T, class Operands>
void run_attention(const AttentionArgs& a, int64_t task, void* scratch) {
  if (!AttentionForward<T, Operands>::run(a, task, scratch, false)) {
    AttentionForward<T, Operands>::run(a, task, scratch, true);
  }
}

template <class T>
void attention_task(const AttentionArgs& a, int64_t task, void* scratch) {
  run_attention<T, WidenedOperands<T>>(a, task, scratch);
}
#if defined(FASTATTN_HAS_DOT2) && !defined(FASTATTN_HAS_TILES)
template <>
void attention_task<BFloat16>(const AttentionArgs& a, int64_t task, void* scratch) {
  if (a.D % 2 == 0) {
    run_attention<BFloat16, PairedOperands>(a, task, scratch);
  } else {
    run_attention<BFloat16, WidenedOperands<BFloat16>>(a, task, scratch);
  }
}
#endif

}  // namespace
}  // namespace fastattn
