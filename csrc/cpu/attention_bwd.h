// Attention backward: the passes over the tiles of attention_bwd_tile.h.
//
//   rows      delta = sum(dO * O) - dlse, lse in units of log2, the key extent of every 64 query rows
//   heads     dq, dk, dv of a kv head: K granules, and for each the query blocks that see it; five products
//             a tile. dQ accumulates in fp32 beside the work.
//   queries   dq of a query block, and keys: dk, dv of a K granule; seven products a tile pair, for calls
//             with fewer kv heads than threads
//   bias      dbias, dS summed over what the bias broadcasts over; slopes: the same for ALiBi
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
    const T* q = (const T*)a.q.data + b * a.q.batch + h * a.q.head + first * a.q.row;
    const T* dout = (const T*)a.dout.data + b * a.dout.batch + h * a.dout.head + first * a.dout.row;
    a.blocks[task] = {e.seen_lo,
                      e.seen_hi,
                      e.all_lo,
                      e.all_hi,
                      rows_not_finite(q, a.q.row, count, a.D),
                      rows_not_finite(dout, a.dout.row, count, a.Dv)};

    const Operand& g = a.dout_as_out;
    const Out* gradient = (const Out*)g.data + b * g.batch + h * g.head + first * g.row;
    const Out* out = (const Out*)a.out + b * a.out_batch + h * a.out_head + first * a.out_row;
    const int64_t at = head * a.Sq + first;
    double dsink = 0;
    for (int r = 0; r < count; ++r, gradient += g.row, out += a.out_row) {
      const float lse = a.lse[at + r];
      if (lse == -__builtin_inff()) {
        a.lse2[at + r] = __builtin_inff(), a.delta[at + r] = 0.f;
        continue;
      }
      float delta = dot(gradient, out, a.Dv), gate = 1.f, gated = lse;
      if (a.sinks) {
        // out = sigmoid(lse - sink) * (P V), so P * sigmoid(lse - sink) = exp(s - gated) takes P's place.
        const float sink = a.sinks[h];
        gated = larger(lse, sink) + __builtin_log1pf(__builtin_expf(-__builtin_fabsf(lse - sink)));
        gate = __builtin_expf(lse - gated);
        dsink -= double(delta) * __builtin_expf(sink - gated);
      }
      // The gradient of lse weighs P itself. Below 2^-100 the gate no longer matters, but must not be 0.
      if (a.dlse) {
        if (gate < 7.9e-31f) gate = 7.9e-31f, gated = lse + 69.3f;
        delta -= a.dlse[at + r] / gate;
      }
      a.lse2[at + r] = gated * kLog2E, a.delta[at + r] = delta;
    }
    if (a.dsinks) a.dsinks[task] = float(dsink);
  }

 private:
  static float larger(float x, float y) { return x > y ? x : y; }

  static float dot(const Out* x, const Out* y, int64_t width) {
    F32 sum = zero();
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) sum = fma(load(x + d), load(y + d), sum);
    if (d < width) sum = fma(load_n(x + d, width - d), load_n(y + d, width - d), sum);
    return reduce_add(sum);
  }
};

template <class T, class Rows>
class AttentionBackward {
  using Tile = GradientTile<T, Rows>;

 public:
  static int64_t bytes(const AttentionBwdArgs& a, bool heads) {
    const int64_t dq_rows = heads ? round_up(a.Sq) : kGranule;
    return 4 * (Tile::floats(a) + kGranule * kGranule + dq_rows * padded(a.D) +
                key_rows(a, heads) * (padded(a.D) + padded(a.Dv)));
  }

  static void heads(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    const int64_t b = task / a.Hkv, kv_head = task % a.Hkv, group = a.Hq / a.Hkv;
    AttentionBackward f(a, {true, a.dk.data != nullptr, a.dv.data != nullptr}, scratch, true);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = kv_head * group + g;
      clear(f.dq_, round_up(a.Sq) * f.wide_);
      for (int64_t n = 0; n < a.k_blocks(); ++n) f.keys_of_head(b, h, n, g == 0, g == group - 1);
      f.store_rows(a.dq, b, h, 0, a.Sq, a.D, f.dq_, a.scale);
    }
  }

  static void queries(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    // Late blocks first: under a causal mask they are the long ones.
    const int64_t n = a.q_blocks(), block = n - 1 - task % n, head = task / n;
    const int64_t b = head / a.Hq, h = head % a.Hq, first = block * kGranule;
    const int count = int(a.Sq - first < kGranule ? a.Sq - first : kGranule);
    AttentionBackward f(a, {true, false, false}, scratch, false);
    clear(f.dq_, kGranule * f.wide_);
    BlockMask mask(a, b, h, first, count);
    BlockMask::Granule g;
    while (mask.next(&g)) {
      f.tile_.load_keys(b, h / (a.Hq / a.Hkv), g.key / kGranule);
      if (f.tile_.template compute<false>(b, h, block, g.tile)) f.tile_.add_dq(f.dq_);
    }
    f.store_rows(a.dq, b, h, first, count, a.D, f.dq_, a.scale);
  }

  static void keys(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    const int64_t n = a.k_blocks(), block = task % n, head = task / n, group = a.Hq / a.Hkv;
    const int64_t b = head / a.Hkv, kv_head = head % a.Hkv;
    AttentionBackward f(a, {false, a.dk.data != nullptr, a.dv.data != nullptr}, scratch, false);
    for (int64_t g = 0; g < group; ++g) {
      f.keys_of_head(b, kv_head * group + g, block, g == 0, g == group - 1);
    }
  }

  static void bias(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    AttentionBackward f(a, {false, false, false}, scratch, false);
    const int64_t blocks = bias_tasks(a) / (a.bias_B * a.bias_H);
    const int64_t map = task / blocks, block = task % blocks;
    if (a.bias_Sq > 1 && a.bias_Sk > 1) f.bias_tiles(map, block);
    else f.bias_sums(map, block);
  }

  static void slopes(const AttentionBwdArgs& a, int64_t task, void* scratch) {
    AttentionBackward f(a, {false, false, false}, scratch, false);
    const int64_t b = task / a.Hq, h = task % a.Hq;
    double sum = 0;
    for (int64_t n = 0; n < a.k_blocks(); ++n) {
      f.each<true>(b, h, n, f.all_queries(), [&](int64_t) {
        const QueryRows& rows = f.tile_.rows();
        for (int j = 0; j < f.tile_.keys(); ++j) {
          const int64_t k_pos = key_position(a, b, f.tile_.key() + j);
          float column = 0.f;
          for (int r = 0; r < rows.count; ++r) {
            column -= f.tile_.ds()[r * kGranule + j] * float(__builtin_llabs(rows.position[r] - k_pos));
          }
          sum += column;
        }
      });
    }
    a.dslopes[task] = float(sum);
  }

 private:
  AttentionBackward(const AttentionBwdArgs& a, typename Tile::Wanted wanted, void* scratch, bool heads)
      : a_(a),
        wanted_(wanted),
        wide_(padded(a.D)),
        wide_v_(padded(a.Dv)),
        all_keys_(key_rows(a, heads) > kGranule),
        tile_(a, wanted, (float*)scratch) {
    sum_ = (float*)scratch + Tile::floats(a);
    dq_ = sum_ + kGranule * kGranule;
    dk_ = dq_ + (heads ? round_up(a.Sq) : kGranule) * wide_;
    dv_ = dk_ + key_rows(a, heads) * wide_;
  }

  static int64_t round_up(int64_t rows) { return (rows + kGranule - 1) / kGranule * kGranule; }
  // A group's heads come one after the other, so their sums wait for the last in all rows of dk and dv.
  static int64_t key_rows(const AttentionBwdArgs& a, bool heads) {
    return heads && a.Hq != a.Hkv ? round_up(a.Sk) : kGranule;
  }
  static void clear(float* x, int64_t floats) { memset(x, 0, size_t(floats) * 4); }

  struct Blocks {
    int64_t first, last;
  };
  Blocks all_queries() const { return {0, a_.q_blocks()}; }

  // visit(m) for those blocks of the head's queries that see K granule n, with the tile computed.
  template <bool PLAIN, class Visit>
  void each(int64_t b, int64_t h, int64_t n, Blocks of, const Visit& visit) {
    tile_.load_keys(b, h / (a_.Hq / a_.Hkv), n);
    if (!a_.block_list_t) {
      for (int64_t m = of.first; m < of.last; ++m) {
        if (tile_.template compute<PLAIN>(b, h, m, nullptr)) visit(m);
      }
      return;
    }
    const int32_t* offsets = a_.block_offsets_t + b * a_.map_t_batch + h * a_.map_t_head + n;
    for (int64_t e = offsets[0]; e < offsets[1]; ++e) {
      const int32_t m = a_.block_list_t[2 * e], tile = a_.block_list_t[2 * e + 1];
      if (m < of.first || m >= of.last) continue;
      const uint64_t* bits = tile < 0 ? nullptr : a_.bit_tiles + int64_t(tile) * kGranule;
      if (tile_.template compute<PLAIN>(b, h, m, bits)) visit(m);
    }
  }

  void keys_of_head(int64_t b, int64_t h, int64_t n, bool first, bool last) {
    float* dk = dk_ + (all_keys_ ? n * kGranule * wide_ : 0);
    float* dv = dv_ + (all_keys_ ? n * kGranule * wide_v_ : 0);
    if (first) clear(dk, kGranule * wide_), clear(dv, kGranule * wide_v_);
    each<false>(b, h, n, all_queries(), [&](int64_t m) {
      if (wanted_.dv) tile_.add_dv(dv);
      if (wanted_.dk) tile_.add_dk(dk);
      if (wanted_.dq) tile_.add_dq(dq_ + m * kGranule * wide_);
    });
    if (!last) return;
    const int64_t kv_head = h / (a_.Hq / a_.Hkv), key = tile_.key();
    if (wanted_.dk) store_rows(a_.dk, b, kv_head, key, tile_.keys(), a_.D, dk, a_.scale);
    if (wanted_.dv) store_rows(a_.dv, b, kv_head, key, tile_.keys(), a_.Dv, dv, 1.f);
  }

  void store_rows(const Gradient& g, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                  const float* from, float factor) const {
    const int64_t at = b * g.batch + h * g.head + first * g.row;
    if (a_.grads_fp32) store_as((float*)g.data + at, g.row, count, width, from, factor);
    else store_as((T*)g.data + at, g.row, count, width, from, factor);
  }
  template <class Out>
  static void store_as(Out* out, int64_t stride, int64_t count, int64_t width, const float* from,
                       float factor) {
    for (int64_t r = 0; r < count; ++r, out += stride) {
      for (int64_t d = 0; d < width; d += kLanes, from += kLanes) {
        store_n(out + d, load(from) * splat(factor), width - d);
      }
    }
  }

  // The batches and heads that read one map of the bias.
  struct Readers {
    int64_t b, b_end, h, h_end;
  };
  Readers readers(int64_t map) const {
    const int64_t b = map / a_.bias_H, h = map % a_.bias_H;
    return {a_.bias_B > 1 ? b : 0, a_.bias_B > 1 ? b + 1 : a_.B, a_.bias_H > 1 ? h : 0,
            a_.bias_H > 1 ? h + 1 : a_.Hq};
  }

  template <class Visit>
  void each_reader(int64_t map, Blocks of, int64_t n, const Visit& visit) {
    const Readers all = readers(map);
    for (int64_t b = all.b; b < all.b_end; ++b) {
      for (int64_t h = all.h; h < all.h_end; ++h) each<true>(b, h, n, of, [&](int64_t) { visit(); });
    }
  }

  // A bias with rows and keys: one query block, tile by tile.
  void bias_tiles(int64_t map, int64_t m) {
    const int64_t first = m * kGranule;
    const int64_t count = a_.Sq - first < kGranule ? a_.Sq - first : kGranule;
    for (int64_t n = 0; n < a_.k_blocks(); ++n) {
      const int64_t key = n * kGranule, keys = a_.Sk - key < kGranule ? a_.Sk - key : kGranule;
      clear(sum_, kGranule * kGranule);
      each_reader(map, {m, m + 1}, n, [&] {
        for (int r = 0; r < count; ++r) {
          for (int j = 0; j < kGranule; j += kLanes) {
            float* at = sum_ + r * kGranule + j;
            store(at, load(at) + load(tile_.ds() + r * kGranule + j));
          }
        }
      });
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (map * a_.Sq + first + r) * a_.Sk + key;
        for (int64_t j = 0; j < keys; j += kLanes) {
          const F32 x = load(sum_ + r * kGranule + j);
          if (a_.dbias_fp32) store_n((float*)a_.dbias + at + j, x, keys - j);
          else store_n((T*)a_.dbias + at + j, x, keys - j);
        }
      }
    }
  }

  // A bias with keys only, rows only, or one number a map: sums over a granule of them.
  void bias_sums(int64_t map, int64_t block) {
    const bool by_row = a_.bias_Sq > 1, by_key = a_.bias_Sk > 1;
    double sum[kGranule] = {};
    const int64_t from = by_key ? block : 0, to = by_key ? block + 1 : a_.k_blocks();
    for (int64_t n = from; n < to; ++n) {
      each_reader(map, by_row ? Blocks{block, block + 1} : all_queries(), n, [&] {
        float part[kGranule] = {};
        for (int r = 0; r < tile_.rows().count; ++r) {
          const float* ds = tile_.ds() + r * kGranule;
          for (int j = 0; j < tile_.keys(); ++j) part[by_row ? r : by_key ? j : 0] += ds[j];
        }
        for (int i = 0; i < kGranule; ++i) sum[i] += part[i];
      });
    }
    const int64_t width = by_row ? a_.Sq : by_key ? a_.Sk : 1, first = block * kGranule;
    for (int64_t i = 0; i < kGranule && first + i < width; ++i) {
      const int64_t at = map * width + first + i;
      if (a_.dbias_fp32) ((float*)a_.dbias)[at] = float(sum[i]);
      else from_float(float(sum[i]), (T*)a_.dbias + at);
    }
  }

  const AttentionBwdArgs& a_;
  const typename Tile::Wanted wanted_;
  const int64_t wide_, wide_v_;
  const bool all_keys_;
  Tile tile_;
  float *sum_, *dq_, *dk_, *dv_;
};

template <class X>
struct Of {
  using type = X;
};

// Calls with the pass class for the call's storage: pairs of bf16 where the machine has their dot and the
// widths allow it.
template <class T, class Call>
auto with_backward(const AttentionBwdArgs& a, const Call& call) {
#ifdef FASTATTN_HAS_DOT2
  if constexpr (kExpDegree<T> == 3) {
    if (a.D % 2 == 0 && a.Dv % 2 == 0) return call(Of<AttentionBackward<T, PairedRows>>{});
  }
#endif
  (void)a;
  return call(Of<AttentionBackward<T, WidenedRows<T>>>{});
}

template <class T>
void backward_rows(const AttentionBwdArgs& a, int64_t task, void*) {
  a.out_fp32 ? BackwardRows<T, float>::task(a, task) : BackwardRows<T, T>::task(a, task);
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
