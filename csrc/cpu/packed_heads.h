// Keys and values of one (batch, kv head) as the tiles read them, packed a granule at a time.
//
//   K   rows of bf16, zero-padded to a multiple of 32 columns and 64 rows: the A operand of S^T = K Q^T as it
//       is. Read in place where its rows are adjacent and need no padding.
//   V   V^T in tiles of 16 columns of V x 32 keys: the A operand of O^T = V^T P^T.
//
// A thread keeps what it packed until it meets another head or another call: tasks of a head follow each
// other, and so do the query heads that share it. fp16 is split into two bf16, x = high + low exactly, side
// by side in a row of K, tile after tile in V.
#pragma once

#include "attention_args.h"
#include "finite.h"

namespace fastattn {
namespace {

constexpr int64_t kKeptBytes = 16 << 20;  // a thread keeps at most this much; longer heads repack their end

template <class T>
constexpr int kTileParts = 1;
template <>
constexpr int kTileParts<Half> = 2;

inline int64_t padded_width(int64_t width) { return width < 1 ? 32 : (width + 31) / 32 * 32; }
inline int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// rows x width elements to 64 rows of kTileParts x `padded` bf16, zero where there are none.
template <class T>
void pad_rows(const T* x, int64_t stride, int rows, int64_t width, int64_t padded, BFloat16* out) {
  constexpr int kParts = kTileParts<T>;
  memset(out + rows * kParts * padded, 0, (kGranule - rows) * kParts * padded * 2);
  for (int r = 0; r < rows; ++r, x += stride, out += kParts * padded) {
    for (int64_t d = 0; d < padded; d += kLanes) {
      const F32 value = d < width ? load_n(x + d, width - d) : zero();
      store(out + d, value);
      if constexpr (kParts == 2) {
        const F32 low = value - load(out + d);  // NaN for an infinity, whose high part says it all
        store(out + padded + d, select(is_nan(low), zero(), low));
      }
    }
  }
}

// 32 rows of 16 columns to a tile: a row a column, pairs of rows its words.
inline void pack_columns_tile(const BFloat16* x, int64_t stride, char* tile) {
  F32 pairs[kTileSide];
  for (int r = 0; r < kTileSide; ++r, x += 2 * stride) pairs[r] = float_of(interleave(x, x + stride));
  transpose(pairs);
  for (int i = 0; i < kTileSide; ++i) store((float*)(tile + i * kTileRowBytes), pairs[i]);
}

template <class T>
class PackedHead {
  static constexpr int kParts = kTileParts<T>;
  static constexpr int kSpare = 3;  // granules that may be in flight: values before, scores now, keys ahead

 public:
  struct Granule {
    const char* k;
    int64_t k_row;  // bytes
    const char* v;
  };

  static int64_t bytes(const AttentionArgs& a) {
    const Layout l(a);
    return 64 + align64(l.kept) + l.staging + l.k + (l.kept + kSpare) * l.slot;
  }

  PackedHead(const AttentionArgs& a, int64_t b, int64_t kv_head, char* memory)
      : layout_(a),
        k_((const T*)a.k.data + b * a.k.batch + kv_head * a.k.head),
        v_((const T*)a.v.data + b * a.v.batch + kv_head * a.v.head),
        k_stride_(a.k.row),
        v_stride_(a.v.row),
        D_(a.D),
        Dv_(a.Dv) {
    State* state = (State*)memory;
    packed_ = (uint8_t*)memory + 64;
    staging_ = (BFloat16*)(packed_ + align64(layout_.kept));
    ragged_k_ = (char*)staging_ + layout_.staging;
    slots_ = ragged_k_ + layout_.k;
    const int64_t head = b * a.Hkv + kv_head;
    if (state->call != a.call || state->head != head) {
      state->call = a.call, state->head = head;
      memset(packed_, 0, layout_.kept);
    }
  }

  // The granule of keys [key, key + keys), where bit j of `without` makes the values of key j 0. Valid until
  // kSpare others have been asked for.
  FASTATTN_INLINE Granule granule(int64_t key, int keys, uint64_t without) {
    const int64_t n = key / kGranule;
    const bool keep = n < layout_.kept && !without;
    char* slot = slots_ + (keep ? n : layout_.kept + spare_++ % kSpare) * layout_.slot;
    char* k = layout_.copies_k ? slot : keys < kGranule ? ragged_k_ : nullptr;
    char* v = slot + (layout_.copies_k ? layout_.k : 0);
    if (!keep || !packed_[n]) pack(key, keys, without, k, v, keep);
    return {k ? k : (const char*)(k_ + key * k_stride_),
            k ? kParts * layout_.D * 2 : k_stride_ * int64_t(sizeof(T)), v};
  }

  // Whether a granule has been read since the thread met this head.
  bool has(int64_t key) const { return key / kGranule < layout_.kept && packed_[key / kGranule]; }

  const T* value(int64_t key) const { return v_ + key * v_stride_; }

  // Bit j: a number of the values of key + j is not finite.
  uint64_t not_finite(int64_t key, int keys) const {
    return rows_not_finite(value(key), v_stride_, keys, Dv_);
  }

 private:
  // Sizes in bytes, the widths padded.
  struct Layout {
    int64_t D, Dv, k, slot, staging, kept;
    bool copies_k;

    explicit Layout(const AttentionArgs& a) : D(padded_width(a.D)), Dv(padded_width(a.Dv)) {
      copies_k = kParts > 1 || a.D != D || a.k.row != D;
      k = kGranule * kParts * D * 2;
      staging = kGranule * kParts * Dv * 2;
      slot = staging + (copies_k ? k : 0);
      const int64_t granules = (a.Sk + kGranule - 1) / kGranule, most = kKeptBytes / slot;
      kept = granules < most ? granules : most;
    }
  };

  struct State {
    uint64_t call;
    int64_t head;
  };

  __attribute__((noinline)) void pack(int64_t key, int keys, uint64_t without, char* k, char* v, bool keep) {
    if (k) pad_rows(k_ + key * k_stride_, k_stride_, keys, D_, layout_.D, (BFloat16*)k);
    pack_values(value(key), keys, without, v);
    if (keep) packed_[key / kGranule] = 1;
  }

  void pack_values(const T* v, int keys, uint64_t without, char* out) {
    const BFloat16* rows = (const BFloat16*)v;
    int64_t stride = v_stride_, part = 0;
    if (kParts > 1 || keys < kGranule || Dv_ != layout_.Dv || without) {
      pad_rows(v, v_stride_, keys, Dv_, layout_.Dv, staging_);
      rows = staging_, stride = kParts * layout_.Dv, part = layout_.Dv;
      for (; without; without &= without - 1) {
        memset(staging_ + __builtin_ctzll(without) * stride, 0, stride * 2);
      }
    }
    for (int64_t d = 0; d < layout_.Dv; d += kTileSide) {
      for (int p = 0; p < kParts; ++p) {
        for (int key = 0; key < kGranule; key += 2 * kTileSide, out += kTileBytes) {
          pack_columns_tile(rows + key * stride + p * part + d, stride, out);
        }
      }
    }
  }

  const Layout layout_;
  const T *k_, *v_;
  const int64_t k_stride_, v_stride_, D_, Dv_;
  uint8_t* packed_;
  BFloat16* staging_;
  char *ragged_k_, *slots_;
  int spare_ = 0;
};

}  // namespace
}  // namespace fastattn
