// Attention forward on AMX, for bf16 and fp16: the algorithm of attention.h with its products on tiles.
//
//   S^T = K Q^T, P^T = exp2(S^T - max), O^T += V^T P^T
//
// Transposed, a lane is a query: the softmax needs no horizontal reduction, K is the left operand as it lies
// in memory, and pairs of P^T are the right operand as the softmax writes them, over the scores they were.
// A task is 64 query rows in two halves of 32. While the vectors work on the softmax of one unit (64 keys,
// one half), the tiles finish the values of the unit before and start the scores of the unit after, a tile
// product every few vectors: left idle for some 800 cycles, the matrix unit takes as long to come back.
// The halves alternate, so what the tiles write is never what the vectors read. O^T stays in L1, not in
// tiles: 64 rows share each granule of K and V, and a new maximum rescales O^T at its own pace, without
// stopping the tiles. So every new maximum is taken, as in attention.h, and the largest P is exactly 1.
//
// fp16 is split into two bf16, high + low, and takes three products for one; low * low, 2^-18 of the result,
// is left out. An infinite key or query in fp16 makes its scores NaN.
//
// What to expect, counted and not yet measured on a machine with AMX. Cycles of a unit of bf16 with D = Dv,
// each column at its best case, all of them overlapping; the largest bounds the unit:
//
//    D    products (16 each)   vectors (2 a cycle)   tile and vector loads   L2 to L1 (48 bytes a cycle)
//    32      16    256               740                    288                     90
//    64      32    512               770                    448                    340
//   128      64   1024               830                    768                   1330
//   256     128   2048               960                   1408                   2700
//
// That is 35, 66, 77 and 75 % of the peak of the products alone. A 2 x 2 block loads a tile a product, O^T
// half a load and half a store more. Beside the units a task costs 2500 cycles (packing Q, the first scores
// and last values with nothing to overlap, transposing O), and each granule of V some 800 once a head and
// thread: 53 % at D = 64 and 512 keys. Score terms and the words of partial granules come on top, with the
// tiles idle. fp16 is bound by its products from D = 64 on.
#pragma once

#include "attention.h"
#include "packed_heads.h"
#include "tile_queue.h"

namespace fastattn {
namespace {

// Scratch of one thread: what it packed, kept between tasks, then the buffers of one task.
struct AmxBuffers {
  char *head, *q, *low;  // Q^T and the low parts of P^T, in pairs
  float *scores, *terms, *out, *max, *sum;
  BFloat16* staging;

  template <class T>
  static int64_t bytes_of(const AttentionArgs& a) {
    return PackedHead<T>::bytes(a) + task_bytes(kTileParts<T>, padded_width(a.D), padded_width(a.Dv));
  }
  static int64_t bytes(const AttentionArgs& a) {
    if (a.storage == Storage::kBFloat16) return bytes_of<BFloat16>(a);
    return a.storage == Storage::kHalf ? bytes_of<Half>(a) : AttentionBuffers::bytes(a);
  }

  AmxBuffers(int parts, int64_t D, int64_t Dv, void* scratch, int64_t head_bytes) : head((char*)scratch) {
    char* p = head + head_bytes;
    const auto take = [&](int64_t rows) {
      char* at = p;
      p += rows * kLaneRowBytes;
      return at;
    };
    q = take(parts * D / 2), low = take(parts > 1 ? kGranule / 2 : 0);
    scores = (float*)take(kGranule), terms = (float*)take(kGranule), out = (float*)take(Dv);
    max = (float*)take(1), sum = (float*)take(1);
    staging = (BFloat16*)p;
  }

 private:
  static int64_t task_bytes(int parts, int64_t D, int64_t Dv) {
    return kLaneRowBytes * (parts * D / 2 + kGranule / 2 + 2 * kGranule + Dv + 2) + kGranule * parts * D * 2;
  }
};

template <class T>
class AmxForward {
  static constexpr int kParts = kTileParts<T>;
  static constexpr int kRun = kTileSide;  // keys that are masked, or skipped, together
  static constexpr int kRuns = kGranule / kRun;
  using Queue = TileQueue<kParts == 1 ? 1 : 3>;

 public:
  // False where the result is not finite although it might have to be: compute again on the exact path.
  static bool run(const AttentionArgs& a, int64_t task, void* scratch, bool exact) {
    const TaskRows t(a, task);
    AmxForward f(a, t, scratch, exact);
    f.pack_q();
    exact ? f.walk_exactly() : f.walk();
    const bool finite = finish_rows<T>(a, f.rows_, f.buf_.out, f.buf_.max, f.buf_.sum);
    return finite || !(f.hides_keys_ || a.bias || kParts > 1) || exact;
  }

 private:
  // A granule of keys as the task sees it.
  struct Block {
    typename PackedHead<T>::Granule data;
    int64_t key;
    int keys;
    bool masked;
    uint64_t poisoned;     // exact path: keys whose values are not finite, 0 in `data`
    uint64_t rows[kRuns];  // of each run of keys: the rows that see any of them
    alignas(64) uint64_t words[kGranule];
    uint64_t keep[kGranule];
  };

  // A block of keys and one half of the query rows: what the softmax works on while the tiles work on the
  // units before and after it.
  struct Unit {
    const Block* block;
    int half;
    uint32_t rows[kRuns];
    bool live[2];  // the blocks of 32 keys

    int first_live() const { return live[0] ? 0 : 1; }
    int count_live() const { return live[0] + live[1]; }
  };

  AmxForward(const AttentionArgs& a, const TaskRows& t, void* scratch, bool exact)
      : a_(a),
        D_(padded_width(a.D)),
        Dv_(padded_width(a.Dv)),
        buf_(kParts, D_, Dv_, scratch, PackedHead<T>::bytes(a)),
        rows_(a, t.b, t.h, t.first, t.count),
        head_(a, t.b, t.h / (a.Hq / a.Hkv), buf_.head),
        mask_(a, t.b, t.h, t.first, t.count),
        vectors_((t.count + kLanes - 1) / kLanes),
        halves_((t.count + kBlockSide - 1) / kBlockSide),
        half_(halves_),
        terms_(has_score_terms(a)),
        exact_(exact) {
    for (int c = 0; c < vectors_; ++c) {
      store(buf_.max + c * kLanes, splat(-__builtin_inff()));
      store(buf_.sum + c * kLanes, zero());
    }
  }

  void pack_q() {
    const T* q = (const T*)a_.q.data + rows_.b * a_.q.batch + rows_.h * a_.q.head + rows_.first * a_.q.row;
    const BFloat16* rows = (const BFloat16*)q;
    int64_t stride = a_.q.row;
    if (kParts > 1 || a_.D != D_) {
      pad_rows(q, stride, rows_.count, a_.D, D_, buf_.staging);
      rows = buf_.staging, stride = kParts * D_;
    }
    const int64_t words = D_ / 2;
    for (int p = 0; p < kParts; ++p) {
      float* out = (float*)(buf_.q + p * words * kLaneRowBytes);
      pack_transposed(rows_.count, words, out, [&](int row, int64_t d) {
        return load((const float*)(rows + row * stride + p * D_) + d);
      });
      // The tiles take lane vectors in twos.
      if (vectors_ % 2) {
        for (int64_t d = 0; d < words; ++d) store(out + d * kGranule + vectors_ * kLanes, zero());
      }
    }
  }

  // Softmax of one unit, with the values of the unit before it and the scores of the next on the tiles.
  void walk() {
    Tiles tiles(whole_tiles());
    Unit now, next;
    if (next_unit(&now)) {
      TileProduct product[2] = {scores_of(now)};
      Queue(tiles, product, product + 1).drain();
      int pending = 0;  // products before the scores of the next unit: the values of the last, if any
      for (bool more = true; more; now = next) {
        more = next_unit(&next);
        // Two units of one half share their columns of the buffers: then one is done before the next.
        const bool ahead = more && next.half != now.half;
        if (ahead) product[pending] = scores_of(next);
        softmax_of(now, Queue(tiles, product, product + pending + ahead));
        product[0] = values_of(now);
        pending = 1;
        if (!ahead) {
          if (more) product[1] = scores_of(next);
          Queue(tiles, product, product + 1 + more).drain();
          pending = 0;
        }
      }
    }
    clear_unseen();
  }

  // A unit at a time, values that are not finite kept out of the products and added where they are seen.
  void walk_exactly() {
    Tiles tiles(whole_tiles());
    Unit u;
    while (next_unit(&u)) {
      const TileProduct scores = scores_of(u);
      Queue(tiles, &scores, &scores + 1).drain();
      softmax_of(u, Queue(tiles, nullptr, nullptr));
      const TileProduct values = values_of(u);
      Queue(tiles, &values, &values + 1).drain();
      for (uint64_t keys = u.block->poisoned; keys; keys &= keys - 1)
        add_where_seen(u, __builtin_ctzll(keys));
    }
    clear_unseen();
  }

  void add_where_seen(const Unit& u, int j) {
    const T* v = head_.value(u.block->key + j);
    for (int r = u.half * kBlockSide; r < (u.half + 1) * kBlockSide && r < rows_.count; ++r) {
      if (!(u.block->words[j] >> r & 1)) continue;
      const float p = probability(buf_.scores, j, r) + (kParts > 1 ? probability(buf_.low, j, r) : 0.f);
      for (int64_t d = 0; d < a_.Dv; ++d) buf_.out[d * kGranule + r] += p * as_float(v[d]);
    }
  }

  // Takes the keys that a bias of -inf hides from the words of the unit's rows.
  void hide_by_bias(const Unit& u) {
    Block& block = block_[slot_];
    for (int j = 0; j < block.keys; ++j) {
      for (int c = first_vector(u); c < end_vector(u); ++c) {
        const F32 x = load(buf_.scores + j * kGranule + c * kLanes);
        const uint64_t seen = bits_of(x > splat(-__builtin_inff())) | bits_of(is_nan(x));
        block.words[j] &= ~((~seen & low_bits(kLanes)) << (c * kLanes));
      }
    }
  }

  static float probability(const void* pairs, int j, int r) {
    const uint32_t pair = ((const uint32_t*)pairs)[j / 2 * kGranule + r];
    return from_bits(j % 2 ? pair & 0xffff0000u : pair << 16);
  }

  void clear_unseen() {
    for (int64_t h = 0; h < halves_; ++h) {
      if (started_[h]) continue;
      for (int64_t d = 0; d < a_.Dv; ++d) memset(buf_.out + d * kGranule + h * kBlockSide, 0, kBlockSide * 4);
    }
  }

  bool next_unit(Unit* u) {
    for (;;) {
      if (half_ == halves_) {
        if (!next_block()) return false;
        half_ = 0;
      }
      u->block = &block_[slot_], u->half = int(half_++);
      for (int r = 0; r < kRuns; ++r) u->rows[r] = uint32_t(u->block->rows[r] >> (u->half * kBlockSide));
      u->live[0] = u->rows[0] | u->rows[1], u->live[1] = u->rows[2] | u->rows[3];
      if (u->live[0] || u->live[1]) return true;
    }
  }

  bool next_block() {
    Block& n = block_[slot_ ^ 1];  // the other one is still in use
    BlockMask::Granule g;
    while (mask_.next(&g)) {
      n.masked = g.partial || g.keys < kGranule || exact_;
      if (g.partial) {
        hides_keys_ = true;
        if (!mask_.words(g, n.words)) continue;
      } else if (n.masked) {
        for (int j = 0; j < kGranule; ++j) n.words[j] = j < g.keys ? ~0ull : 0;
      }
      for (int r = 0; r < kRuns; ++r) {
        n.rows[r] = n.masked ? 0 : ~0ull;
        for (int j = 0; n.masked && j < kRun; ++j) n.rows[r] |= n.words[r * kRun + j];
      }
      n.key = g.key, n.keys = g.keys;
      n.poisoned = exact_ ? head_.not_finite(g.key, g.keys) : 0;
      n.data = head_.granule(g.key, g.keys, n.poisoned);
      if (a_.dropout) dropout_words(a_, rows_, g.key, g.keys, n.keep);
      slot_ ^= 1;
      return true;
    }
    return false;
  }

  TileProduct scores_of(const Unit& u) const {
    const auto& k = u.block->data;
    const int64_t first = u.first_live() * kBlockSide, strip = u.half * 2 * kStripBytes;
    TileProduct p{};
    p.a = k.k + first * k.k_row, p.a_row = k.k_row, p.a_tile = kTileSide * k.k_row;
    p.a_step = kTileRowBytes, p.a_block = kBlockSide * k.k_row, p.a_low = D_ * 2;
    p.b = buf_.q + strip, p.b_low = D_ / 2 * kLaneRowBytes;
    p.c = (char*)buf_.scores + first * kLaneRowBytes + strip;
    p.steps = int(D_ / kBlockSide), p.blocks = u.count_live();
    return p;
  }

  TileProduct values_of(const Unit& u) {
    const int64_t first = u.first_live(), strip = u.half * 2 * kStripBytes;
    TileProduct p{};
    p.a = u.block->data.v + first * kTileBytes, p.a_row = kTileRowBytes, p.a_step = kTileBytes;
    p.a_low = 2 * kTileBytes, p.a_tile = kParts * p.a_low, p.a_block = 2 * p.a_tile;
    p.b = (const char*)buf_.scores + first * kStepBytes + strip;
    p.b_low = buf_.low - (const char*)buf_.scores;
    p.c = (char*)buf_.out + strip;
    p.steps = u.count_live(), p.blocks = int(Dv_ / kBlockSide);
    p.accumulate = started_[u.half];
    started_[u.half] = true;
    return p;
  }

  int first_vector(const Unit& u) const { return 2 * u.half; }
  int end_vector(const Unit& u) const { return 2 * u.half + 2 < vectors_ ? 2 * u.half + 2 : vectors_; }

  void softmax_of(const Unit& u, Queue queue) {
    if (terms_) {
      apply_score_terms<T>(a_, rows_, u.block->key, u.block->keys, buf_.scores, buf_.terms, first_vector(u),
                           end_vector(u));
    }
    if (exact_ && a_.bias) hide_by_bias(u);
    u.block->masked ? softmax_for<true>(u, queue) : softmax_for<false>(u, queue);
  }

  // A unit of softmax is 32 sites of two pairs of keys; RATE tile products go to each.
  template <bool MASKED>
  void softmax_for(const Unit& u, const Queue& queue) {
    if (terms_) {
      a_.dropout ? softmax<NaturalScores, MASKED, true, 2>(u, queue)
                 : softmax<NaturalScores, MASKED, false, 2>(u, queue);
    } else if (a_.dropout) {
      softmax<FoldedScale, MASKED, true, 2>(u, queue);
    } else {
      const int64_t products = (D_ + Dv_) / kBlockSide * 8 * (kParts == 1 ? 1 : 3);
      if (products <= 32) softmax<FoldedScale, MASKED, false, 1>(u, queue);
      else if (products <= 64) softmax<FoldedScale, MASKED, false, 2>(u, queue);
      else softmax<FoldedScale, MASKED, false, 4>(u, queue);
    }
  }

  template <class Units, bool MASKED, bool DROPOUT, int RATE>
  __attribute__((noinline)) void softmax(const Unit& u, Queue queue) {
    const int from = first_vector(u), to = end_vector(u);
    for (int c = from; c < to; ++c) {
      const F32 scale = splat(a_.scale * kLog2E);
      const int shift = (c - from) * kLanes;
      F32 top = splat(-__builtin_inff());
      for (int r = 0; r < kRuns; ++r) {
        if (u.live[r / 2] && uint16_t(u.rows[r] >> shift)) {
          top = max(top, max_of<MASKED>(keys_of(u, c, r)));
        }
        if (RATE > 1 && r % 2 && queue.busy()) queue.step();
      }
      const F32 before = load(buf_.max + c * kLanes), now = max(before, Units::maximum(top, scale));
      // A row that has seen nothing yet has no maximum; any finite pivot gives its keys exp2(-inf) = 0.
      const F32 pivot = select(now > splat(-__builtin_inff()), now, zero());
      const F32 alpha = exp2<5>(Units::difference(before, pivot));
      store(buf_.max + c * kLanes, now);
      Sums sums{load(buf_.sum + c * kLanes) * alpha, zero()};
      if (started_[u.half] && any(now > before)) rescale<RATE>(c, alpha, queue);
      for (int r = 0; r < kRuns; ++r) {
        if (!u.live[r / 2]) continue;
        const Keys keys = keys_of(u, c, r);
        if (MASKED && !uint16_t(u.rows[r] >> shift)) {
          keys.clear();
          continue;
        }
        bool busy = false;
        site<Units, MASKED, DROPOUT, RATE, 0>(keys, scale, pivot, &sums, queue, &busy);
        site<Units, MASKED, DROPOUT, RATE, 1>(keys, scale, pivot, &sums, queue, &busy);
        site<Units, MASKED, DROPOUT, RATE, 2>(keys, scale, pivot, &sums, queue, &busy);
        site<Units, MASKED, DROPOUT, RATE, 3>(keys, scale, pivot, &sums, queue, &busy);
      }
      store(buf_.sum + c * kLanes, sums.even + sums.odd);
    }
    queue.drain();
  }

  struct Sums {
    F32 even, odd;
  };

  // 16 keys of one lane vector: scores in, pairs of probabilities out, over scores that have been read.
  struct Keys {
    const float* scores;
    int32_t *high, *low;
    const uint16_t *seen, *keep;  // a word of 64 rows a key, this lane vector's part of it

    FASTATTN_INLINE void put(int pair, F32 e0, F32 e1) const {
      const I32 rounded = pack_pairs_loosely(e0, e1);
      store(high + pair * kGranule, rounded);
      if constexpr (kParts > 1) {
        store(low + pair * kGranule,
              pack_pairs_loosely(e0 - low_of_pairs(rounded), e1 - high_of_pairs(rounded)));
      }
    }
    FASTATTN_INLINE void clear() const {
      for (int i = 0; i < kRun / 2; ++i) put(i, zero(), zero());
    }
  };

  FASTATTN_INLINE Keys keys_of(const Unit& u, int c, int run) const {
    const int key = run * kRun, pair = key / 2, lane = c * kLanes;
    return {buf_.scores + key * kGranule + lane, (int32_t*)buf_.scores + pair * kGranule + lane,
            (int32_t*)buf_.low + pair * kGranule + lane, (const uint16_t*)(u.block->words + key) + c,
            (const uint16_t*)(u.block->keep + key) + c};
  }

  template <bool MASKED>
  static FASTATTN_INLINE F32 score(const Keys& k, int j) {
    const F32 x = load(k.scores + j * kGranule);
    return MASKED ? select(mask_of_bits(k.seen[j * kVectors]), x, splat(-__builtin_inff())) : x;
  }

  template <bool MASKED>
  static FASTATTN_INLINE F32 max_of(const Keys& k) {
    F32 top[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) top[i] = score<MASKED>(k, i);
#pragma GCC unroll 12
    for (int j = 4; j < kRun; ++j) top[j % 4] = max(top[j % 4], score<MASKED>(k, j));
    return max(max(top[0], top[1]), max(top[2], top[3]));
  }

  // Two pairs of keys and the tile products that go with them.
  template <class Units, bool MASKED, bool DROPOUT, int RATE, int SITE>
  FASTATTN_INLINE void site(const Keys& k, F32 scale, F32 pivot, Sums* sums, Queue& queue, bool* busy) const {
    if constexpr (SITE * RATE % 4 == 0) *busy = queue.busy();  // a step begins
    if (*busy) {
      queue.template multiply<SITE * RATE % 4>();
      if constexpr (RATE > 1) queue.template multiply<SITE * RATE % 4 + 1>();
      if constexpr (RATE > 2) queue.template multiply<2>(), queue.template multiply<3>();
    }
#pragma GCC unroll 2
    for (int i = 2 * SITE; i < 2 * SITE + 2; ++i) {
      F32 e0 = exp2<kExpDegree<T>>(Units::exponent(score<MASKED>(k, 2 * i), scale, pivot));
      F32 e1 = exp2<kExpDegree<T>>(Units::exponent(score<MASKED>(k, 2 * i + 1), scale, pivot));
      sums->even = sums->even + e0;
      sums->odd = sums->odd + e1;
      if constexpr (DROPOUT) e0 = kept(k, 2 * i, e0), e1 = kept(k, 2 * i + 1, e1);
      k.put(i, e0, e1);
    }
  }

  FASTATTN_INLINE F32 kept(const Keys& k, int j, F32 e) const {
    return select(mask_of_bits(k.keep[j * kVectors]), e * splat(a_.dropout_scale), zero());
  }

  // O^T of one lane vector times alpha, with the tiles kept busy where they are what bounds the kernel.
  template <int RATE>
  FASTATTN_INLINE void rescale(int c, F32 alpha, Queue& queue) const {
    float* column = buf_.out + c * kLanes;
    for (int64_t d = 0; d < Dv_; d += kBlockSide) {
      if (RATE > 1 && queue.busy()) queue.step();
#pragma GCC unroll 8
      for (int64_t i = d; i < d + kBlockSide; ++i) {
        store(column + i * kGranule, load(column + i * kGranule) * alpha);
      }
    }
  }

  const AttentionArgs& a_;
  const int64_t D_, Dv_;  // padded
  const AmxBuffers buf_;
  const QueryRows rows_;
  PackedHead<T> head_;
  BlockMask mask_;
  const int vectors_;
  const int64_t halves_;
  int64_t half_;  // of the block under way, the next to look at
  const bool terms_, exact_;
  bool hides_keys_ = false, started_[kHalves] = {};
  int slot_ = 0;
  Block block_[2];
};

template <class T>
void attention_amx_task(const AttentionArgs& a, int64_t task, void* scratch) {
  if (!AmxForward<T>::run(a, task, scratch, false)) AmxForward<T>::run(a, task, scratch, true);
}

}  // namespace
}  // namespace fastattn
