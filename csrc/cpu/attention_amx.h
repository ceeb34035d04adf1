// Attention forward on AMX, for bf16 and fp16: the algorithm of attention.h with its products on tiles.
//
//   S^T = K Q^T, P^T = exp2(S^T - max), O^T += V^T P^T
//
// Transposed, a lane is a query: the softmax needs no horizontal reduction, K is the left operand as it lies
// in memory, and pairs of P^T are the right operand as the softmax writes them, over the scores they were.
// A task is 64 query rows in two passes of 32, which take turns at the granules of keys: the second finds K
// and V in the cache. While the vectors work on the softmax of one unit (64 keys, one pass), the tiles finish
// the values of the unit before and start the scores of the unit after, a tile product every few vectors.
//
// A row keeps the pivot it got from its first unit, 7 over the maximum as an exponent of 2, until a weight
// reaches 2: the bits of all weights are or-ed, and they tell. Then the unit is done again with new pivots.
// So nothing looks for maxima, nothing waits for them, and O^T is hardly ever rescaled. Weights of 2^-7 are
// as exact as those of 1, except that products with values under 2^-119 may become 0.
//
// Where nobody asked for lse and nothing but the scale changes a score, weights in bf16 are made by integers
// (FixedExp2) and summed as they were rounded; then the sum is no better than they are, 4e-3 of a single
// weight, so lse is left to the weights in fp32. Rows that integers cannot hold, after new pivots, are made
// in fp32 beside the others, whose bits must not change.
//
// fp16 is split into two bf16, high + low. Its scores take four products for one and are as exact as those of
// fp32: of logits in the thousands the part that low * low has decides. Its values take three; there low *
// low is 2^-18 of the result. An infinite key or query in fp16 makes its scores NaN.
//
// Measured on a Xeon, a unit of bf16 with D = Dv, K and V out of the second-level cache, without what a task
// costs beside its units; cycles of the time stamp, 2.6 GHz, where the core ran at 2.6 to 3.2:
//
//    D    products (13.4 each)   vectors alone   both, loads and stores left out   all of it
//    64      32    430             490 in fp32                 780                 some 1200
//   128      64    860             640 in fp32                1350                 some 2400
//
//   - The first-level cache is what binds. Tile loads and stores alone, all of them hits, take 86 cycles,
//     their four products 64. What should stay there (Q^T, O^T, two units of scores, 28 and 40 KB) and
//     the 16 and 32 KB a unit reads are more than its 48. So operands are loaded past it (load_past) where a
//     head's keys and values would not fit anyway: 1500 cycles became 1200, 2900 became 2400. Tried without
//     gain: prefetching, units of 32 keys, one pass after the other.
//   - Beside tile instructions the fp32 operations of 512 bits run on one port of two. A vector of weights
//     takes 8 of them, 128 a unit; by integers one and a half. That is 4 to 8 % of a call.
//   - A load that needs more than one store, as a vector of what was just written in words, waits until all
//     stores before it are done, those of the tiles too. So products are written where they are read, and
//     between tile products the compiler may keep what it has in registers (load_free): 3 to 8 % of a call.
//   - Strips of 16 rows with O^T in the registers (D = 64) were as fast as this, before load_past, and slower
//     by 8 % at D = 128; a bare loop of that kind, without masks, ran 20 % faster.
//   - Left idle for some 1500 cycles the matrix unit takes 700 to come back.
//   - A task costs some 5000 cycles beside its units: 64 rows of Q and of O transposed, the first scores and
//     last values with nothing to overlap, and a granule of V packed a head and thread.
#pragma once

#include "attention.h"
#include "attention_amx_weights.h"
#include "packed_heads.h"
#include "prefetch.h"
#include "tile_queue.h"

namespace fastattn {
namespace {

// Scratch of one thread: what it packed, kept between tasks, then the buffers of one task.
struct AmxBuffers {
  char *head, *q[kPasses], *scores[2], *low[2];  // Q^T a pass; scores and, over them, P^T of two units
  float *terms, *out, *max, *sum;                // the last three a pass
  BFloat16* staging;
  int64_t out_floats;

  template <class T>
  static int64_t bytes_of(const AttentionArgs& a) {
    return PackedHead<T>::bytes(a) + task_bytes(kTileParts<T>, padded_width(a.D), padded_width(a.Dv));
  }
  static int64_t bytes(const AttentionArgs& a) {
    if (a.storage == Storage::kBFloat16) return bytes_of<BFloat16>(a);
    return a.storage == Storage::kHalf ? bytes_of<Half>(a) : AttentionBuffers::bytes(a);
  }

  AmxBuffers(int parts, int64_t D, int64_t Dv, void* scratch, int64_t head_bytes)
      : head((char*)scratch), out_floats(Dv * kPass) {
    char* p = head + head_bytes;
    const auto take = [&](int64_t rows) {
      char* at = p;
      p += rows * kPassBytes;
      return at;
    };
    for (char*& pass : q) pass = take(parts * D / 2);
    for (int u = 0; u < 2; ++u) scores[u] = take(kGranule), low[u] = take(parts > 1 ? kGranule / 2 : 0);
    terms = (float*)take(kGranule), out = (float*)take(kPasses * Dv);
    max = (float*)take(kPasses), sum = (float*)take(kPasses);
    staging = (BFloat16*)p;
  }

 private:
  static int64_t task_bytes(int parts, int64_t D, int64_t Dv) {
    return kPassBytes * (4 * kGranule + kPasses * (parts * D / 2 + Dv + 2)) + kGranule * parts * D * 2;
  }
};

template <class T>
class AmxForward {
  static constexpr int kParts = kTileParts<T>;
  static constexpr int kRun = RunWeights<T>::kKeys;  // keys that are masked, or skipped, together
  static constexpr int kRuns = kGranule / kRun;
  static constexpr int64_t kHeldBytes = 32 << 10;
  static constexpr float kMargin = 7;  // of a pivot over the maximum it was taken from, as an exponent of 2

 public:
  // False where the result is not finite although it might have to be: compute again on the exact path.
  static bool run(const AttentionArgs& a, int64_t task, void* scratch, bool exact) {
    const TaskRows t(a, task);
    AmxForward f(a, t, scratch, exact);
    look_past<T>(a, task, t, [&](int64_t key) { return f.head_.has(key); }, &f.prefetch_);
    exact ? f.walk_exactly() : f.walk();
    f.clear_unseen();
    bool finite = true;
    for (int p = 0; p < f.passes_; ++p) {
      finite &=
          finish_rows<T, kPass>(a, f.rows_[p], f.out_of(p), f.buf_.max + p * kPass, f.buf_.sum + p * kPass);
      f.tiles_.keep_awake();
    }
    return finite || !(f.hides_keys_ || a.bias || kParts > 1) || exact;
  }

 private:
  // A granule of keys for the rows of a pass: what the softmax works on while the tiles work on the units
  // before and after it.
  struct Unit {
    typename PackedHead<T>::Granule data;
    int64_t key;
    int keys, pass, slot;  // the last: of the scores
    bool masked;
    uint64_t poisoned;                     // exact path: keys whose values are not finite, 0 in `data`
    uint32_t rows[kRuns];                  // of each run of keys: the rows that see any of them
    alignas(64) uint32_t words[kGranule];  // of each key: the rows that see it

    bool live(int block) const { return rows[2 * block] | rows[2 * block + 1]; }
    int first_live() const { return live(0) ? 0 : 1; }
    int count_live() const { return live(0) + live(1); }
  };

  // What the tiles do during a softmax, in this order: the values of the unit before it, the scores of the
  // next. Written where they are read, a word at a time: to copy in vectors what was just written in words
  // waits for every store before it, those of the tiles too.
  struct Products {
    TileProduct values, scores;
    bool has_values = false, has_scores = false;

    const TileProduct* begin() const { return has_values ? &values : &scores; }
    const TileProduct* end() const { return has_scores ? &scores + 1 : &scores; }
  };

  AmxForward(const AttentionArgs& a, const TaskRows& t, void* scratch, bool exact)
      : a_(a),
        D_(padded_width(a.D)),
        Dv_(padded_width(a.Dv)),
        buf_(kParts, D_, Dv_, scratch, PackedHead<T>::bytes(a)),
        rows_{{a, t.b, t.h, t.first, t.count < kPass ? t.count : kPass},
              {a, t.b, t.h, t.first + (t.count > kPass ? kPass : 0),
               t.count > kPass ? t.count - kPass : t.count}},
        head_(a, t.b, t.h / (a.Hq / a.Hkv), buf_.head),
        mask_(a, t.b, t.h, t.first, t.count),
        passes_((t.count + kPass - 1) / kPass),
        pass_(passes_),
        terms_(has_score_terms(a)),
        exact_(exact),
        integers_(kParts == 1 && !(terms_ || a.dropout || a.lse)) {
    for (int i = 0; i < passes_ * kPass; i += kLanes) {
      store(buf_.max + i, splat(-__builtin_inff()));
      store(buf_.sum + i, zero());
    }
    for (int p = 0; p < passes_; ++p) tiles_.keep_awake(), pack_q(p);
    tiles_.keep_awake();
  }

  void pack_q(int pass) {
    const QueryRows& rows = rows_[pass];
    const T* q = (const T*)a_.q.data + rows.b * a_.q.batch + rows.h * a_.q.head + rows.first * a_.q.row;
    const BFloat16* from = (const BFloat16*)q;
    int64_t stride = a_.q.row;
    if (kParts > 1 || a_.D != D_) {
      pad_rows(q, stride, rows.count, a_.D, D_, buf_.staging);
      from = buf_.staging, stride = kParts * D_;
    }
    const int64_t words = D_ / 2;
    for (int p = 0; p < kParts; ++p) {
      float* out = (float*)(buf_.q[pass] + p * words * kPassBytes);
      pack_transposed<kPass>(rows.count, words, out, [&](int row, int64_t d) {
        return load((const float*)(from + row * stride + p * D_) + d);
      });
      // The tiles take lane vectors in twos.
      if (rows.count <= kLanes) {
        for (int64_t d = 0; d < words; ++d) store(out + d * kPass + kLanes, zero());
      }
    }
  }

  // Softmax of one unit, with the values of the unit before it and the scores of the next on the tiles.
  void walk() {
    Unit *now = &unit_[0], *next = &unit_[1];
    if (!next_unit(now)) return;
    compute_scores(*now);
    for (bool more = true; more;) {
      more = next_unit(next);
      if (more) set_scores(*next);
      softmax_of(*now);
      products_.has_scores = false;
      set_values(*now);
      Unit* done = now;
      now = next, next = done;
    }
    multiply();
  }

  // A unit at a time, values that are not finite kept out of the products and added where they are seen.
  void walk_exactly() {
    Unit& u = unit_[0];
    while (next_unit(&u)) {
      compute_scores(u);
      softmax_of(u);
      set_values(u);
      multiply();
      for (uint64_t keys = u.poisoned; keys; keys &= keys - 1) add_where_seen(u, __builtin_ctzll(keys));
    }
  }

  // Whether a head's keys and values are more than the first-level cache can hold beside all else: then it
  // does better without them.
  bool streams() const { return a_.Sk * kParts * (D_ + Dv_) * 2 > kHeldBytes; }

  // The scores of a unit at once, with nothing beside them.
  void compute_scores(const Unit& u) {
    products_.has_values = false;
    set_scores(u);
    multiply();
    products_.has_scores = false;
  }

  void multiply() { TileQueue(tiles_, products_.begin(), products_.end()).drain(); }

  void add_where_seen(const Unit& u, int j) {
    const T* v = head_.value(u.key + j);
    float* out = out_of(u.pass);
    for (int r = 0; r < rows_[u.pass].count; ++r) {
      if (!(u.words[j] >> r & 1)) continue;
      const float p =
          probability(buf_.scores[u.slot], j, r) + (kParts > 1 ? probability(buf_.low[u.slot], j, r) : 0.f);
      for (int64_t d = 0; d < a_.Dv; ++d) out[d * kPass + r] += p * as_float(v[d]);
    }
  }

  // Takes the keys that a bias of -inf hides from the words of the unit's rows.
  void hide_by_bias(Unit& u) {
    for (int j = 0; j < u.keys; ++j) {
      for (int c = 0; c < vectors_of(u); ++c) {
        const F32 x = load(scores_in(u) + j * kPass + c * kLanes);
        const uint64_t seen = bits_of(x > splat(-__builtin_inff())) | bits_of(is_nan(x));
        u.words[j] &= ~uint32_t((~seen & low_bits(kLanes)) << (c * kLanes));
      }
    }
  }

  static float probability(const void* pairs, int j, int r) {
    const uint32_t pair = ((const uint32_t*)pairs)[j / 2 * kPass + r];
    return from_bits(j % 2 ? pair & 0xffff0000u : pair << 16);
  }

  float* out_of(int pass) const { return buf_.out + pass * buf_.out_floats; }
  float* scores_in(const Unit& u) const { return (float*)buf_.scores[u.slot]; }
  int vectors_of(const Unit& u) const { return rows_[u.pass].count > kLanes ? 2 : 1; }

  void clear_unseen() {
    for (int p = 0; p < passes_; ++p) {
      if (!started_[p]) memset(out_of(p), 0, buf_.out_floats * 4);
    }
  }

  // The passes that see a granule one after the other: then only the first of them waits for its keys.
  bool next_unit(Unit* u) {
    for (;;) {
      if (pass_ == passes_) {
        if (!mask_.next(&granule_)) return false;
        if (granule_.partial) {
          hides_keys_ = true;
          if (!mask_.row_words(granule_, by_row_)) continue;
        }
        look_ahead();
        poisoned_ = exact_ ? head_.not_finite(granule_.key, granule_.keys) : 0;
        data_ = head_.granule(granule_.key, granule_.keys, poisoned_);
        pass_ = 0;
      }
      u->pass = pass_++;
      if (!find_live(u)) continue;
      u->key = granule_.key, u->keys = granule_.keys;
      u->slot = slot_ ^= 1;
      u->poisoned = poisoned_, u->data = data_;
      return true;
    }
  }

  // Asks for the keys after those of the granule, unless they have been read.
  void look_ahead() {
    const int64_t after = granule_.key + kGranule;
    if (after >= a_.Sk || head_.has(after)) return;
    const QueryRows& rows = rows_[0];
    ask_for_keys<T>(a_, rows.b, rows.h / (a_.Hq / a_.Hkv), after, Prefetch::kKeys, &prefetch_);
  }

  // What the pass sees of the granule; false: nothing.
  bool find_live(Unit* u) {
    u->masked = granule_.partial || granule_.keys < kGranule || exact_;
    if (!u->masked) {
      for (uint32_t& rows : u->rows) rows = ~0u;
      return true;
    }
    if (granule_.partial) {
      transpose_bits_32(by_row_ + u->pass * kPass, u->words);
    } else {
      for (int j = 0; j < kGranule; ++j) u->words[j] = j < granule_.keys ? ~0u : 0;
    }
    uint32_t seen = 0, all = ~0u;
    for (int r = 0; r < kRuns; ++r) {
      const RunWords words(u->words + r * kRun);
      seen |= u->rows[r] = words.any;
      all &= words.all;
    }
    // A granule that other rows see in part.
    if (all == ~0u && !exact_) u->masked = false;
    return seen != 0;
  }

  // What any and all of a run's words have. Two words at a time, as they were written: a vector of them would
  // wait for the stores of the tiles.
  struct RunWords {
    uint32_t any, all;
    explicit RunWords(const uint32_t* words) {
      uint64_t some = 0, every = ~0ull;
      for (int j = 0; j < kRun; j += 2) {
        uint64_t two;
        memcpy(&two, words + j, 8);
        __asm__("" : "+r"(two));  // not to be joined into vectors
        some |= two, every &= two;
      }
      any = uint32_t(some | some >> 32), all = uint32_t(every & every >> 32);
    }
  };

  void set_scores(const Unit& u) {
    const auto& k = u.data;
    const int64_t first = u.first_live() * kBlockSide;
    TileProduct& p = products_.scores;
    p.a = k.k + first * k.k_row, p.a_row = k.k_row, p.a_tile = kTileSide * k.k_row;
    p.a_step = kTileRowBytes, p.a_low = D_ * 2, p.legs = kParts * kParts;
    p.b = buf_.q[u.pass], p.b_low = D_ / 2 * kPassBytes;
    p.c = buf_.scores[u.slot] + first * kPassBytes;
    p.steps = int(D_ / kBlockSide), p.tiles = 2 * u.count_live();
    p.accumulate = false, p.streams = streams();
    products_.has_scores = true;
  }

  void set_values(const Unit& u) {
    const int64_t first = u.first_live();
    TileProduct& p = products_.values;
    p.a = u.data.v + first * kTileBytes, p.a_row = kTileRowBytes, p.a_step = kTileBytes;
    p.a_low = 2 * kTileBytes, p.a_tile = kParts * p.a_low, p.legs = kParts == 1 ? 1 : 3;
    p.b = buf_.scores[u.slot] + first * kStepBytes;
    p.b_low = buf_.low[u.slot] - buf_.scores[u.slot];
    p.c = (char*)out_of(u.pass);
    p.steps = u.count_live(), p.tiles = int(Dv_ / kTileSide);
    p.accumulate = started_[u.pass], p.streams = streams();
    started_[u.pass] = true;
    products_.has_values = true;
  }

  void softmax_of(Unit& u) {
    add_terms(u);
    const bool fast = ready_[u.pass];
    if (!fast) {
      // Values of units before this one first: the sums of O^T are about to change.
      TileQueue(tiles_, products_.begin(), &products_.scores).drain();
      products_.has_values = false;
      set_pivots(u);
    }
    if (weigh(u, fast || integers_)) return;
    // A score went past its row's pivot: new pivots, and the scores once more, which the weights lie over.
    // What integers cannot hold even then is not finite.
    start_again(u);
    if (integers_) {
      if (weigh(u, true)) return;
      start_again(u);
    }
    if constexpr (kParts == 1) {
      if (integers_) {
        weigh_at_rate<MixedScale>(u, false);
        return;
      }
    }
    weigh_in_fp32(u, false);
  }

  void start_again(Unit& u) {
    compute_scores(u);
    add_terms(u);
    set_pivots(u);
  }

  void add_terms(Unit& u) {
    if (terms_) {
      apply_score_terms<T, kPass>(a_, rows_[u.pass], u.key, u.keys, scores_in(u), buf_.terms, 0,
                                  vectors_of(u));
    }
    if (exact_ && a_.bias) hide_by_bias(u);
  }

  void set_pivots(const Unit& u) {
    if (terms_) u.masked ? set_pivots<NaturalScores, true>(u) : set_pivots<NaturalScores, false>(u);
    else u.masked ? set_pivots<FoldedScale, true>(u) : set_pivots<FoldedScale, false>(u);
  }

  // Pivots of rows that have none, or whose scores have grown past it. A pivot lies over the maximum, so that
  // it holds for most of what follows.
  template <class Units, bool MASKED>
  __attribute__((noinline)) void set_pivots(const Unit& u) {
    const F32 scale = splat(a_.scale * kLog2E), unit = splat(Units::kUnit);
    bool ready = true;
    for (int c = 0; c < vectors_of(u); ++c) {
      F32 top = splat(-__builtin_inff());
      for (int r = 0; r < kRuns; ++r) {
        if (uint16_t(u.rows[r] >> (c * kLanes)))
          top = max(top, weights_of(u, c, r).template max_of<MASKED>());
      }
      float *pivots = buf_.max + u.pass * kPass + c * kLanes, *sums = buf_.sum + u.pass * kPass + c * kLanes;
      const F32 before = load(pivots), maximum = Units::maximum(top, scale);
      const Mask grown = maximum > before + unit;
      if (any(grown)) {
        F32 now = fma(unit, splat(kMargin), maximum);
        if (integers_) now = now - fraction(now);  // FixedExp2 wants it whole
        now = select(grown, now, before);
        const F32 alpha = select(grown, exp2<5>(Units::difference(before, now)), splat(1.f));
        store(pivots, now);
        store(sums, load(sums) * alpha);
        if (started_[u.pass]) rescale(out_of(u.pass) + c * kLanes, alpha);
      }
      const uint32_t exist = uint32_t(low_bits(rows_[u.pass].count - c * kLanes));
      if (~bits_of(load(pivots) > splat(-__builtin_inff())) & exist & 0xffff) ready = false;
    }
    ready_[u.pass] = ready;
  }

  // A unit of softmax is 32 sites of two pairs of keys; RATE tile products go to each. `check`: false
  // where a weight is past what its pivot allows, and the sums as they were.
  bool weigh(const Unit& u, bool check) {
    if constexpr (kParts == 1) {
      if (integers_) return weigh_at_rate<FixedScale>(u, check);
    }
    return weigh_in_fp32(u, check);
  }
  bool weigh_in_fp32(const Unit& u, bool check) {
    if (a_.dropout) {
      return terms_ ? weigh_masked<NaturalScores, true, 2>(u, check)
                    : weigh_masked<FoldedScale, true, 2>(u, check);
    }
    return terms_ ? weigh_masked<NaturalScores, false, 2>(u, check) : weigh_at_rate<FoldedScale>(u, check);
  }
  template <class Units>
  bool weigh_at_rate(const Unit& u, bool check) {
    const int64_t width = kParts == 1 ? D_ + Dv_ : 4 * D_ + 3 * Dv_;
    if (width <= 128) return weigh_masked<Units, false, 1>(u, check);
    if (width <= 256) return weigh_masked<Units, false, 2>(u, check);
    return weigh_masked<Units, false, 4>(u, check);
  }
  template <class Units, bool DROPOUT, int RATE>
  bool weigh_masked(const Unit& u, bool check) {
    return u.masked ? weigh<Units, true, DROPOUT, RATE>(u, check)
                    : weigh<Units, false, DROPOUT, RATE>(u, check);
  }

  template <class Units, bool MASKED, bool DROPOUT, int RATE>
  __attribute__((noinline)) bool weigh(const Unit& u, bool check) {
    const int vectors = vectors_of(u);
    float *pivots = buf_.max + u.pass * kPass, *sums_at = buf_.sum + u.pass * kPass;
    TileQueue queue(tiles_, products_.begin(), products_.end());
    ScoreLine<Units> line(a_.scale * kLog2E);
    WeightSums sums[2];
    for (int c = 0; c < vectors; ++c) {
      const F32 pivot = load(pivots + c * kLanes);
      // A row that has seen nothing yet has none; any finite one gives its keys exp2(-inf) = 0.
      line.start(select(pivot > splat(-__builtin_inff()), pivot, zero()));
      if constexpr (__is_same(Units, MixedScale)) line.lost = lost_[c];
      WeightSums s{load(sums_at + c * kLanes), zero(), splat_int(0)};
      for (int r = 0; r < kRuns; ++r) {
        prefetch_.step();
        if (!u.live(r / 2)) continue;
        if constexpr (DROPOUT) {
          if (c == 0) draw_keep(u, r);
        }
        const RunWeights<T> w = weights_of(u, c, r);
        if (MASKED && !uint16_t(u.rows[r] >> (c * kLanes))) {
          w.clear();
          continue;
        }
        bool busy = false;
        site<Units, MASKED, DROPOUT, RATE, 0>(w, line, &s, queue, &busy);
        site<Units, MASKED, DROPOUT, RATE, 1>(w, line, &s, queue, &busy);
        site<Units, MASKED, DROPOUT, RATE, 2>(w, line, &s, queue, &busy);
        site<Units, MASKED, DROPOUT, RATE, 3>(w, line, &s, queue, &busy);
      }
      sums[c] = s;
    }
    queue.drain();
    if (check && line.exceeded(vectors > 1 ? sums[0].bits | sums[1].bits : sums[0].bits)) {
      if constexpr (__is_same(Units, FixedScale)) {
        for (int c = 0; c < vectors; ++c) lost_[c] = line.exp2.out_of_range(sums[c].bits);
      }
      return false;
    }
    for (int c = 0; c < vectors; ++c) store(sums_at + c * kLanes, sums[c].even + sums[c].odd);
    return true;
  }

  // A run's dropout, here and not for a whole unit at once: the matrix unit would have gone to sleep.
  void draw_keep(const Unit& u, int run) {
    const int key = run * kRun, keys = u.keys - key < kRun ? u.keys - key : kRun;
    dropout_words(a_, rows_[u.pass], u.key + key, keys, keep_ + key);
  }

  FASTATTN_INLINE RunWeights<T> weights_of(const Unit& u, int c, int run) const {
    const int key = run * kRun, at = c * kLanes;
    return {scores_in(u) + key * kPass + at,
            (int32_t*)scores_in(u) + key / 2 * kPass + at,
            (int32_t*)buf_.low[u.slot] + key / 2 * kPass + at,
            (const uint16_t*)(u.words + key) + c,
            (const uint16_t*)(keep_ + key) + c,
            a_.dropout_scale};
  }

  // Two pairs of keys and the tile products that go with them.
  template <class Units, bool MASKED, bool DROPOUT, int RATE, int SITE>
  static FASTATTN_INLINE void site(const RunWeights<T>& w, const ScoreLine<Units>& line, WeightSums* sums,
                                   TileQueue& queue, bool* busy) {
    if constexpr (SITE * RATE % 4 == 0) *busy = queue.busy();  // a step begins
    if (*busy) {
      queue.template multiply<SITE * RATE % 4>();
      if constexpr (RATE > 1) queue.template multiply<SITE * RATE % 4 + 1>();
      if constexpr (RATE > 2) queue.template multiply<2>(), queue.template multiply<3>();
    }
    w.template weigh_pair<MASKED, DROPOUT>(2 * SITE, line, sums);
    w.template weigh_pair<MASKED, DROPOUT>(2 * SITE + 1, line, sums);
  }

  // O^T of one lane vector times alpha.
  void rescale(float* column, F32 alpha) const {
    for (int64_t i = 0; i < Dv_; ++i) store(column + i * kPass, load(column + i * kPass) * alpha);
  }

  Tiles tiles_{whole_tiles()};
  const AttentionArgs& a_;
  const int64_t D_, Dv_;  // padded
  const AmxBuffers buf_;
  const QueryRows rows_[kPasses];
  PackedHead<T> head_;
  BlockMask mask_;
  const int passes_;
  int pass_;  // the next to look at the granule
  BlockMask::Granule granule_;
  typename PackedHead<T>::Granule data_;
  uint64_t poisoned_ = 0, by_row_[kGranule];
  const bool terms_, exact_, integers_;
  bool hides_keys_ = false, started_[kPasses] = {};
  bool ready_[kPasses] = {};  // all rows have pivots
  Mask lost_[2] = {};         // rows whose exponents no integers held, where they were tried last
  int slot_ = 0;
  Prefetch prefetch_;
  Unit unit_[2];
  uint64_t keep_[kGranule];
  Products products_;
};

template <class T>
void attention_amx_task(const AttentionArgs& a, int64_t task, void* scratch) {
  if (!AmxForward<T>::run(a, task, scratch, false)) AmxForward<T>::run(a, task, scratch, true);
}

}  // namespace
}  // namespace fastattn
