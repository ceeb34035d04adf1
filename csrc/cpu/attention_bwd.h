// Attention backward: the passes over the tiles of attention_bwd_tile.h.
//
//   rows      delta = sum(dO * O) - dlse, lse as the exponents take it, the key extent of every 64 query rows
//   heads     dq, dk, dv of a kv head: its rows; then K granules, and for each the query blocks that see it;
//             five products a tile. dQ accumulates in fp32 beside the work. What the head after it reads is
//             asked for meanwhile.
//   queries   dq of a query block, and keys: dk, dv of a K granule; seven products a tile, for calls with
//             fewer kv heads than threads
//   bias      dbias of a bias with rows; slopes: of ALiBi. Both compute P and dS once more.
//
// The bias's gradient is dS summed over what the bias broadcasts over. Where it broadcasts over rows, heads
// and keys leave column sums behind; where a task of heads meets every tile that a map of it sums, heads does
// all of it.
//
// Every sum has one order: keys ascending for dq; query heads, then queries, ascending for dk and dv. So
// `heads` gives the bits of `queries` and `keys`, and no result knows of threads or of the batch.
#pragma once

#include "attention_bwd_tile.h"

namespace fastattn {
namespace {

// Per query row: what the probabilities and dS need besides scores.
template <class T, class Out>
class BackwardRows {
 public:
  static void task(const AttentionBwdArgs& a, int64_t task) {
    const int64_t n = a.q_blocks(), head = task / n, b = head / a.Hq, h = head % a.Hq;
    const int64_t first = task % n * kGranule;
    const int count = int(a.Sq - first < kGranule ? a.Sq - first : kGranule);
    const KeyExtent e = BlockMask(a, b, h, first, count).extent();
    const Operand& g = a.dout_as_out;
    const Out* gradient = (const Out*)g.data + b * g.batch + h * g.head + first * g.row;
    const Out* out = (const Out*)a.out + b * a.out_batch + h * a.out_head + first * a.out_row;
    const int64_t at = head * a.Sq + first;
    alignas(64) float lse[kGranule], delta[kGranule];
    F32 check_q = zero(), check_dout = zero();
    for (int r = 0; r < count; r += kLanes) {
      F32 products[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        products[i] = zero();
        if (r + i < count)
          products[i] = multiply(gradient + (r + i) * g.row, out + (r + i) * a.out_row, a.Dv);
      }
      const F32 sums = lane_sums(products), given = load_n(a.lse + at + r, count - r);
      store(delta + r, sums), store(lse + r, given);
      check_q = fma(given, zero(), check_q), check_dout = fma(sums, zero(), check_dout);
    }
    // A row of q or of dout that is not finite leaves no number in lse or in delta: every score, every
    // product is without bounds or NaN. Unless a softcap bounds the scores, or dout was narrowed since.
    const bool q_finite = a.softcap == 0.f && !any(is_nan(check_q));
    const bool dout_finite = __is_same(T, Out) && !any(is_nan(check_dout));
    a.blocks[task] = {e.seen_lo,
                      e.seen_hi,
                      e.all_lo,
                      e.all_hi,
                      q_finite ? 0 : bad_rows(a.q, b, h, first, count, a.D),
                      dout_finite ? 0 : bad_rows(a.dout, b, h, first, count, a.Dv),
                      0};
    if (a.sinks || a.dlse) {
      const double dsink = gate(a, h, at, count, lse, delta);
      if (a.dsinks) a.dsinks[task] = float(dsink);
    }
    const F32 nothing = splat(-__builtin_inff()), unit = splat(unit_of(a));
    for (int r = 0; r < count; r += kLanes) {
      const F32 x = load(lse + r);
      const Mask sees = x > nothing | is_nan(x);
      store_n(a.exponent + at + r, select(sees, x * unit, zero() - nothing), count - r);
      store_n(a.delta + at + r, select(sees, load(delta + r), zero()), count - r);
      store_n(a.shift + at + r, zero(), count - r);
      // Beyond this fp32 holds an lse to a thirty-second and worse.
      const Mask extreme = abs(select(sees, x, zero())) > splat(1e6f);
      a.blocks[task].extreme |= uint64_t(bits_of(extreme)) << r;
    }
  }

 private:
  static uint64_t bad_rows(const Operand& x, int64_t b, int64_t h, int64_t first, int count, int64_t width) {
    const T* rows = (const T*)x.data + b * x.batch + h * x.head + first * x.row;
    return rows_not_finite(rows, x.row, count, width);
  }
  static float unit_of(const AttentionBwdArgs& a) { return has_score_terms(a) ? 1.f : kLog2E; }
  static float larger(float x, float y) { return x > y ? x : y; }

  // What a sink and the gradient of lse make of a row's statistics; the gradient of the sink.
  static double gate(const AttentionBwdArgs& a, int64_t h, int64_t at, int count, float* lses,
                     float* deltas) {
    const float unit = unit_of(a);
    double dsink = 0;
    for (int r = 0; r < count; ++r) {
      const float lse = lses[r];
      if (lse == -__builtin_inff()) continue;
      float gated = lse;
      if (a.sinks) {
        // out = sigmoid(lse - sink) * (P V), so P * sigmoid(lse - sink) = exp(s - gated) takes P's place.
        const float sink = a.sinks[h];
        gated = larger(lse, sink) + __builtin_log1pf(__builtin_expf(-__builtin_fabsf(lse - sink)));
        dsink -= double(deltas[r]) * __builtin_expf(sink - gated);
      }
      // The gradient of lse weighs P itself, without the gate. Below 2^-40 that no longer matters beside it,
      // and a larger exponent would only take digits from P.
      constexpr float kFarthest = 27.72588722f;  // log(2^40)
      if (a.dlse && gated > lse + kFarthest) gated = lse + kFarthest;
      if (a.dlse) {
        // Of the exponent as it is rounded.
        const float exponent = gated * unit;
        const double ungated = a.sinks ? __builtin_exp((exponent - double(lse) * unit) / unit) : 1;
        deltas[r] -= float(a.dlse[at + r] * ungated);
      }
      lses[r] = gated;
    }
    return dsink;
  }

  // How many numbers of two rows it multiplied as pairs of bf16.
  template <class X>
  static int64_t multiply_pairs(const X*, const X*, int64_t, F32*) {
    return 0;
  }
#ifdef FASTATTN_HAS_DOT2
  static int64_t multiply_pairs(const BFloat16* x, const BFloat16* y, int64_t width, F32* sum) {
    int64_t d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes)
      *sum = dot2(load((const int32_t*)(x + d)), load((const int32_t*)(y + d)), *sum);
    return d;
  }
#endif

  // The products of two rows, to be added up.
  static F32 multiply(const Out* x, const Out* y, int64_t width) {
    F32 sum = zero();
    int64_t d = multiply_pairs(x, y, width, &sum);
    for (; d + kLanes <= width; d += kLanes) sum = fma(load(x + d), load(y + d), sum);
    if (d < width) sum = fma(load_n(x + d, width - d), load_n(y + d, width - d), sum);
    return sum;
  }
};

template <class T, class Rows>
class AttentionBackward {
  using Tile = GradientTile<T, Rows>;

 public:
  static int64_t bytes(const AttentionBwdArgs& a, bool heads) {
    return 4 * (Tile::floats(a, places(a, heads)) + dq_floats(a, heads) +
                key_rows(a, heads) * (Rows::wide(a.D) + Rows::wide(a.Dv)) + sum_rows(a, heads) * kGranule);
  }

  static void rows(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    a.out_fp32 ? BackwardRows<T, float>::task(a, task) : BackwardRows<T, T>::task(a, task);
    if (a.blocks[task].extreme) extremes(a, task, scratch);
  }

  // The rows; then, head by head of a group, the K granules; for each the batches of the task, for each its
  // query blocks.
  static void heads(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    const int64_t b = task / a.Hkv * a.batches, kv_head = task % a.Hkv, group = a.Hq / a.Hkv;
    for (int64_t i = 0; i < a.batches; ++i) {
      const int64_t first = ((b + i) * a.Hq + kv_head * group) * a.q_blocks();
      for (int64_t n = 0; n < group * a.q_blocks(); ++n) rows(a, first + n, scratch);
    }
    AttentionBackward f(a, {true, a.dk.data != nullptr, a.dv.data != nullptr}, scratch, true);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = kv_head * group + g;
      f.ask_for_next(task, h);
      f.tile_.begin_queries(places(a, true), f.dq_);
      for (int64_t n = 0; n < a.k_blocks(); ++n) {
        if (a.sums_in_heads) Tile::clear(f.sum_, sum_rows(a, true) * kGranule);
        for (int64_t i = 0; i < a.batches; ++i) {
          const int64_t at = i * round_up(a.Sq);
          f.keys_of_head(b + i, h, n, {f.dq_ + at * f.wide_, i, g == 0, g == group - 1});
        }
        if (a.sums_in_heads) f.store_bias(a.bias_B > 1 ? b : 0, a.bias_H > 1 ? h : 0, 0, n, a.Sq);
      }
      f.tile_.finish_queries(places(a, true), f.dq_);
      for (int64_t i = 0; i < a.batches; ++i) {
        f.store_rows(a.dq, b + i, h, 0, a.Sq, a.D, f.dq_ + i * round_up(a.Sq) * f.wide_, f.wide_, a.scale);
      }
    }
  }

  static void queries(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    // Late blocks first: under a causal mask they are the long ones.
    const int64_t n = a.q_blocks(), block = n - 1 - task % n, head = task / n;
    const int64_t b = head / a.Hq, h = head % a.Hq, first = block * kGranule;
    const int count = int(a.Sq - first < kGranule ? a.Sq - first : kGranule);
    AttentionBackward f(a, {true, false, false}, scratch, false);
    f.tile_.begin_queries(1, f.dq_);
    BlockMask mask(a, b, h, first, count);
    BlockMask::Granule g;
    while (mask.next(&g)) {
      f.tile_.load_keys(b, h / (a.Hq / a.Hkv), g.key / kGranule);
      f.tile_.template compute<TileUse::kProducts>(b, h, block, g.tile, 0, {f.dq_, nullptr, nullptr});
    }
    f.tile_.finish_queries(1, f.dq_);
    f.store_rows(a.dq, b, h, first, count, a.D, f.dq_, f.wide_, a.scale);
  }

  static void keys(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    const int64_t n = a.k_blocks(), block = task % n, head = task / n, group = a.Hq / a.Hkv;
    const int64_t b = head / a.Hkv, kv_head = head % a.Hkv;
    AttentionBackward f(a, {false, a.dk.data != nullptr, a.dv.data != nullptr}, scratch, false);
    for (int64_t g = 0; g < group; ++g) {
      f.keys_of_head(b, kv_head * group + g, block, {nullptr, 0, g == 0, g == group - 1});
    }
  }

  static void bias(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    AttentionBackward f(a, {false, false, false}, scratch, false);
    const int64_t map = task / a.q_blocks(), m = task % a.q_blocks();
    const int64_t map_b = map / a.bias_H, map_h = map % a.bias_H, first = m * kGranule;
    const int64_t count = a.Sq - first < kGranule ? a.Sq - first : kGranule;
    const bool by_batch = a.bias_B > 1, by_head = a.bias_H > 1;
    double rows[kGranule] = {};
    for (int64_t n = 0; n < a.k_blocks(); ++n) {
      Tile::clear(f.sum_, kGranule * kGranule);
      for (int64_t b = by_batch ? map_b : 0; b < (by_batch ? map_b + 1 : a.B); ++b) {
        for (int64_t h = by_head ? map_h : 0; h < (by_head ? map_h + 1 : a.Hq); ++h) {
          f.tile_.sum_into(f.sum_, nullptr);
          f.template each<TileUse::kSums>(b, h, n, m, m + 1, {}, [](int64_t) {});
        }
      }
      if (a.bias_Sk > 1) f.store_bias(map_b, map_h, m, n, count);
      else f.add_rows(count, rows);
    }
    for (int64_t r = 0; r < count && a.bias_Sk == 1; ++r) {
      f.store_bias_at(map * a.Sq + first + r, splat(float(rows[r])), 1);
    }
  }

  static void slopes(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    AttentionBackward f(a, {false, false, false}, scratch, false);
    const int64_t b = task / a.Hq, h = task % a.Hq;
    double sum = 0;
    Tile::clear(f.sum_, kGranule * kGranule);
    f.tile_.sum_into(f.sum_, nullptr);
    for (int64_t n = 0; n < a.k_blocks(); ++n) {
      f.template each<TileUse::kSums>(b, h, n, 0, a.q_blocks(), {}, [&](int64_t) {
        sum -= f.distances();
        Tile::clear(f.sum_, kGranule * kGranule);
      });
    }
    a.dslopes[task] = float(sum);
  }

 private:
  // The probabilities of a row add up to 1, or to less where the call is one chunk of many. Where the lowest
  // finite bias took the place of -inf, the lse has lost the logarithm of their number.
  static void extremes(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    const int64_t n = a.q_blocks(), block = task % n, b = task / n / a.Hq, h = task / n % a.Hq;
    const int64_t first = block * kGranule;
    const int count = int(a.Sq - first < kGranule ? a.Sq - first : kGranule);
    AttentionBackward f(a, {false, false, false}, scratch, false);
    double sums[kGranule] = {};
    BlockMask mask(a, b, h, first, count);
    BlockMask::Granule g;
    while (mask.next(&g)) {
      f.tile_.load_keys(b, h / (a.Hq / a.Hkv), g.key / kGranule);
      f.tile_.add_extremes(b, h, block, g.tile, sums);
    }
    float* shift = a.shift + (b * a.Hq + h) * a.Sq + first;
    for (int r = 0; r < count; ++r) {
      if (sums[r] > 1.5) shift[r] = float(__builtin_log2(sums[r]));
    }
  }

  AttentionBackward(const AttentionBwdArgs& a, typename Tile::Wanted wanted, void* scratch, bool heads)
      : a_(a),
        wanted_(wanted),
        wide_(Rows::wide(a.D)),
        wide_v_(Rows::wide(a.Dv)),
        sums_(heads && a.sums_in_heads),
        all_keys_(heads && a.Hq != a.Hkv),
        tile_(a, wanted, places(a, heads), (float*)scratch) {
    dq_ = (float*)scratch + Tile::floats(a, places(a, heads));
    dk_ = dq_ + dq_floats(a, heads);
    dv_ = dk_ + key_rows(a, heads) * wide_;
    sum_ = dv_ + key_rows(a, heads) * wide_v_;
  }

  static int64_t round_up(int64_t rows) { return (rows + kGranule - 1) / kGranule * kGranule; }
  // Query blocks that every K granule of a task asks for.
  static int64_t places(const AttentionBwdArgs& a, bool heads) {
    return heads ? a.batches * a.q_blocks() : 0;
  }
  static int64_t dq_floats(const AttentionBwdArgs& a, bool heads) {
    return (heads ? a.batches * round_up(a.Sq) : kGranule) * Rows::wide(a.D);
  }
  // A group's heads come one after the other, so their sums wait for the last in all rows of dk and dv.
  static int64_t key_rows(const AttentionBwdArgs& a, bool heads) {
    return heads && a.Hq != a.Hkv ? a.batches * round_up(a.Sk) : kGranule;
  }
  static int64_t sum_rows(const AttentionBwdArgs& a, bool heads) {
    return heads && a.sums_in_heads ? round_up(a.Sq) : kGranule;
  }

  // Asks for what the head after h reads, of this task or the next. A task has the results behind it when its
  // heads begin (see heads), and its keys in use.
  void ask_for_next(int64_t task, int64_t h) {
    const int64_t group = a_.Hq / a_.Hkv, size = sizeof(T);
    const bool last = h % group == group - 1;
    if (last && ++task == a_.B / a_.batches * a_.Hkv) return;
    const int64_t b = task / a_.Hkv * a_.batches, kv_head = task % a_.Hkv;
    const int64_t next = last ? kv_head * group : h + 1;
    Prefetch& prefetch = tile_.prefetch();
    prefetch.ask(Prefetch::kFarQueries, a_.q, size, b, next, 0, a_.Sq, a_.D);
    prefetch.ask(Prefetch::kFarGradients, a_.dout, size, b, next, 0, a_.Sq, a_.Dv);
    if (!last) return;
    prefetch.ask(Prefetch::kFarResults, {a_.out, a_.out_batch, a_.out_head, a_.out_row},
                 a_.out_fp32 ? 4 : size, b, next, 0, a_.Sq, a_.Dv);
    prefetch.ask(Prefetch::kFarKeys, a_.k, size, b, kv_head, 0, a_.Sk, a_.D);
    prefetch.ask(Prefetch::kFarValues, a_.v, size, b, kv_head, 0, a_.Sk, a_.Dv);
  }
  // And for where the gradients of rows will be written.
  void ask_for_rows(Prefetch::Use use, const Gradient& g, int64_t b, int64_t h, int64_t first, int64_t count,
                    int64_t width) {
    const int64_t size = a_.grads_fp32 ? 4 : sizeof(T);
    if (g.data) tile_.prefetch().ask(use, {g.data, g.batch, g.head, g.row}, size, b, h, first, count, width);
  }

  // Where one head's share of a K granule goes.
  struct Share {
    float* dq;         // null: not asked for; rows of the head
    int64_t place;     // of the batch within the task
    bool first, last;  // of the group
    float *dk = nullptr, *dv = nullptr;
  };

  // visit(m) for those of the head's query blocks [from, to) that see K granule n, with the tile computed.
  template <TileUse USE, class Visit>
  void each(int64_t b, int64_t h, int64_t n, int64_t from, int64_t to, const Share& share,
            const Visit& visit) {
    tile_.load_keys(b, h / (a_.Hq / a_.Hkv), n);
    const auto compute = [&](int64_t m, const uint64_t* bits) {
      if (sums_) tile_.sum_into(sum_ + m * kGranule * kGranule, nullptr);
      float* dq = share.dq ? share.dq + m * kGranule * wide_ : nullptr;
      if (tile_.template compute<USE>(b, h, m, bits, share.place * a_.q_blocks() + m,
                                      {dq, share.dk, share.dv})) {
        visit(m);
      }
    };
    if (!a_.block_offsets_t) {
      for (int64_t m = from; m < to; ++m) compute(m, nullptr);
      return;
    }
    const int32_t* offsets = a_.block_offsets_t + b * a_.map_t_batch + h * a_.map_t_head + n;
    for (int64_t e = offsets[0]; e < offsets[1]; ++e) {
      const int32_t m = a_.block_list_t[2 * e], tile = a_.block_list_t[2 * e + 1];
      if (m >= from && m < to) compute(m, tile < 0 ? nullptr : a_.bit_tiles + int64_t(tile) * kGranule);
    }
  }

  void keys_of_head(int64_t b, int64_t h, int64_t n, Share to) {
    const int64_t row = all_keys_ ? to.place * round_up(a_.Sk) + n * kGranule : 0;
    float *dk = dk_ + row * wide_, *dv = dv_ + row * wide_v_;
    tile_.begin_keys(to.first, dk, dv);
    alignas(64) float part[kGranule];
    double columns[kGranule] = {};
    to.dk = wanted_.dk ? dk : nullptr, to.dv = wanted_.dv ? dv : nullptr;
    const int64_t kv_head = h / (a_.Hq / a_.Hkv), key = n * kGranule;
    const int64_t keys = a_.Sk - key < kGranule ? a_.Sk - key : kGranule;
    if (to.last) {
      ask_for_rows(Prefetch::kOutKeys, a_.dk, b, kv_head, key, keys, a_.D);
      ask_for_rows(Prefetch::kOutValues, a_.dv, b, kv_head, key, keys, a_.Dv);
    }
    if (to.dq && n + 1 == a_.k_blocks()) ask_for_rows(Prefetch::kOut, a_.dq, b, h, 0, a_.Sq, a_.D);
    if (a_.dbias_columns) {
      Tile::clear(part, kGranule);
      tile_.sum_into(nullptr, part);
      each<TileUse::kBoth>(b, h, n, 0, a_.q_blocks(), to, [&](int64_t) {
        for (int64_t j = 0; j < keys; ++j) columns[j] += part[j];
        Tile::clear(part, kGranule);
      });
      float* out = a_.dbias_columns + (b * a_.Hq + h) * a_.Sk + key;
      for (int64_t j = 0; j < keys; ++j) out[j] = float(columns[j]);
    } else if (sums_) {
      each<TileUse::kBoth>(b, h, n, 0, a_.q_blocks(), to, [](int64_t) {});
    } else {
      each<TileUse::kProducts>(b, h, n, 0, a_.q_blocks(), to, [](int64_t) {});
    }
    tile_.finish_keys(to.dk, to.dv);
    if (!to.last) return;
    if (wanted_.dk) store_keys(a_.dk, b, kv_head, key, keys, a_.D, dk, wide_, a_.scale);
    if (wanted_.dv) store_keys(a_.dv, b, kv_head, key, keys, a_.Dv, dv, wide_v_, 1.f);
  }

  void store_keys(const Gradient& g, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                  const float* from, int64_t wide, float factor) const {
    if (!Rows::kTiles) return store_rows(g, b, h, first, count, width, from, wide, factor);
    const int64_t at = b * g.batch + h * g.head + first * g.row;
    if (a_.grads_fp32) store_turned((float*)g.data + at, g.row, count, width, from, factor);
    else store_turned((T*)g.data + at, g.row, count, width, from, factor);
  }
  // from: [width][64 rows].
  template <class Out>
  static void store_turned(Out* out, int64_t stride, int64_t count, int64_t width, const float* from,
                           float factor) {
    for (int64_t d = 0; d < width; d += kLanes) {
      for (int64_t r = 0; r < count; r += kLanes) {
        F32 x[kLanes];
        for (int i = 0; i < kLanes; ++i) x[i] = load(from + (d + i) * kGranule + r);
        transpose(x);
        for (int i = 0; i < kLanes && r + i < count; ++i)
          store_n(out + (r + i) * stride + d, x[i] * splat(factor), width - d);
      }
    }
  }
#ifdef FASTATTN_HAS_TILES
  // Rounded first: as pairs of columns they are half as many words to turn.
  static void store_turned(BFloat16* out, int64_t stride, int64_t count, int64_t width, const float* from,
                           float factor) {
    for (int64_t d = 0; d < width; d += 2 * kLanes) {
      const int64_t columns = width - d < 2 * kLanes ? width - d : 2 * kLanes;
      for (int64_t r = 0; r < count; r += kLanes) {
        F32 x[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const float* at = from + (d + 2 * i) * kGranule + r;
          x[i] = float_of(pack_pairs(load(at) * splat(factor), load(at + kGranule) * splat(factor)));
        }
        transpose(x);
        for (int i = 0; i < kLanes && r + i < count; ++i) {
          BFloat16* to = out + (r + i) * stride + d;
          if (columns == 2 * kLanes) store((float*)to, x[i]);
          else memcpy(to, &x[i], size_t(columns) * sizeof *to);
        }
      }
    }
  }
#endif

  void store_rows(const Gradient& g, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                  const float* from, int64_t wide, float factor) const {
    const int64_t at = b * g.batch + h * g.head + first * g.row;
    if (a_.grads_fp32) store_as((float*)g.data + at, g.row, count, width, from, wide, factor);
    else store_as((T*)g.data + at, g.row, count, width, from, wide, factor);
  }
  template <class Out>
  static void store_as(Out* out, int64_t stride, int64_t count, int64_t width, const float* from,
                       int64_t wide, float factor) {
    for (int64_t r = 0; r < count; ++r, out += stride, from += wide) {
      for (int64_t d = 0; d < width; d += kLanes) {
        store_n(out + d, load(from + d) * splat(factor), width - d);
      }
    }
  }

  // sum_ [count][64] to the rows of query block m on and the keys of granule n of a map of the bias.
  void store_bias(int64_t b, int64_t h, int64_t m, int64_t n, int64_t count) const {
    const int64_t key = n * kGranule, keys = a_.Sk - key < kGranule ? a_.Sk - key : kGranule;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = ((b * a_.bias_H + h) * a_.Sq + m * kGranule + r) * a_.Sk + key;
      for (int64_t j = 0; j < keys; j += kLanes) {
        store_bias_at(at + j, load(sum_ + r * kGranule + j), keys - j);
      }
    }
  }
  void store_bias_at(int64_t at, F32 x, int64_t n) const {
    if (a_.dbias_fp32) store_n((float*)a_.dbias + at, x, n);
    else store_n((T*)a_.dbias + at, x, n);
  }

  void add_rows(int64_t count, double* rows) const {
    for (int64_t r = 0; r < count; ++r) {
      float sum = 0.f;
      for (int j = 0; j < kGranule; ++j) sum += sum_[r * kGranule + j];
      rows[r] += sum;
    }
  }

  // The sum of dS * |q_pos - k_pos| over the tile in sum_.
  double distances() const {
    const QueryRows& rows = tile_.rows();
    double sum = 0;
    for (int j = 0; j < tile_.keys(); ++j) {
      const int64_t k_pos = key_position(a_, rows.b, tile_.key() + j);
      float column = 0.f;
      for (int r = 0; r < rows.count; ++r) {
        column += sum_[r * kGranule + j] * float(__builtin_llabs(rows.position[r] - k_pos));
      }
      sum += column;
    }
    return sum;
  }

  const AttentionBwdArgs& a_;
  const typename Tile::Wanted wanted_;
  const int64_t wide_, wide_v_;
  const bool sums_, all_keys_;
  Tile tile_;
  float *dq_, *dk_, *dv_, *sum_;
};

// Which operands a storage takes: tiles where the machine has them, else pairs of bf16 where it has their
// dot.
template <class T>
struct Operands {
  using Best = WidenedRows<T>;
};
#if defined FASTATTN_HAS_TILES
template <>
struct Operands<BFloat16> {
  using Best = TiledRows<BFloat16>;
};
template <>
struct Operands<Half> {
  using Best = TiledRows<Half>;
};
#elif defined FASTATTN_HAS_DOT2
template <>
struct Operands<BFloat16> {
  using Best = PairedRows;
};
#endif

template <class X>
struct Of {
  using type = X;
};

// Calls with the passes for the call's storage and shape.
template <class T, class Call>
auto with_backward(const AttentionBwdArgs& a, const Call& call) {
  using Best = typename Operands<T>::Best;
  if (Best::takes(a)) return call(Of<AttentionBackward<T, Best>>{});
  return call(Of<AttentionBackward<T, WidenedRows<T>>>{});
}

template <class T>
void backward_rows(const AttentionBwdArgs& a, int64_t task, void* scratch) {
  with_backward<T>(a, [&](auto of) { decltype(of)::type::rows(a, task, scratch); });
}
template <class T>
void backward_heads(const AttentionBwdArgs& a, int64_t task, void* scratch) {
  with_backward<T>(a, [&](auto of) { decltype(of)::type::heads(a, task, scratch); });
}
template <class T>
void backward_queries(const AttentionBwdArgs& a, int64_t task, void* scratch) {
  with_backward<T>(a, [&](auto of) { decltype(of)::type::queries(a, task, scratch); });
}
template <class T>
void backward_keys(const AttentionBwdArgs& a, int64_t task, void* scratch) {
  with_backward<T>(a, [&](auto of) { decltype(of)::type::keys(a, task, scratch); });
}
template <class T>
void backward_bias(const AttentionBwdArgs& a, int64_t task, void* scratch) {
  with_backward<T>(a, [&](auto of) { decltype(of)::type::bias(a, task, scratch); });
}
template <class T>
void backward_slopes(const AttentionBwdArgs& a, int64_t task, void* scratch) {
  with_backward<T>(a, [&](auto of) { decltype(of)::type::slopes(a, task, scratch); });
}
template <class T>
int64_t backward_scratch(const AttentionBwdArgs& a, bool heads) {
  return with_backward<T>(a, [&](auto of) { return decltype(of)::type::bytes(a, heads); });
}

template <class T>
constexpr AttentionBwdTasks kBackwardTasks = {backward_rows<T>,   backward_heads<T>, backward_queries<T>,
                                              backward_keys<T>,   backward_bias<T>,  backward_slopes<T>,
                                              backward_scratch<T>};

}  // namespace
}  // namespace fastattn
