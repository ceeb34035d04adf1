// How the backward's tile takes rows of Q, K, V and dO: widened to fp32, as pairs of bf16, or on AMX tiles.
//
//   takes(call)                   whether it can multiply a call's heads, and is worth it
//   wide(width)                   numbers from row to row of what is summed up
//   Product, pack_*, steps, rows  operands of matmul.h's product, where vectors multiply
//   Matrices                      the operands and products of tiles, where they do
#pragma once

#include "attention.h"
#include "attention_bwd_args.h"
#include "finite.h"
#ifdef FASTATTN_HAS_TILES
#include "attention_bwd_amx.h"
#endif

namespace fastattn {
namespace {

inline int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// What those that multiply with vectors have in common: rows `padded(width)` apart.
struct VectorRows {
  // Nothing besides the tile's own buffers.
  struct Matrices {
    Matrices(const AttentionBwdArgs&, int64_t, float*) {}
  };
  static constexpr bool kTiles = false;
  static constexpr int kParts = 1;
  static int64_t wide(int64_t width) { return padded(width); }
};

// The products on fp32 operands, to which rows are widened.
template <class T>
struct WidenedRows : VectorRows {
  using Product = FmaProduct;
  static constexpr int kRows = 1;  // rows of an operand that one step of a product takes

  static bool takes(const AttentionBwdArgs&) { return true; }
  static void pack_lanes(const T* x, int64_t stride, int count, int64_t width, float* out) {
    WidenedOperands<T>::pack_q(x, stride, count, width, out);
  }
  static int64_t steps(int64_t width) { return width; }
  static void pack_rows(const T* x, int64_t stride, int count, int64_t width, uint64_t, float* out) {
    for (int r = 0; r < count; ++r, x += stride) {
      for (int64_t d = 0; d < width; d += kLanes, out += kLanes) store(out, load_n(x + d, width - d));
    }
  }
  static void clear_rows(uint64_t bad, int64_t width, float* packed) {
    for (int r = 0; bad; ++r, bad >>= 1) {
      if (bad & 1) memset(packed + r * padded(width), 0, padded(width) * 4);
    }
  }
  static Broadcast rows(const T*, int64_t, const float* packed, int64_t width) {
    return {(const char*)packed, padded(width) * 4, 4};
  }
};

#ifdef FASTATTN_HAS_DOT2
// The products on bf16 pairs; D and Dv are even. Q and dO are read in place and as pairs of adjacent rows.
struct PairedRows : VectorRows {
  using Product = Dot2Product;
  static constexpr int kRows = 2;

  static bool takes(const AttentionBwdArgs& a) { return a.D % 2 == 0 && a.Dv % 2 == 0; }
  static void pack_lanes(const BFloat16* x, int64_t stride, int count, int64_t width, float* out) {
    PairedOperands::pack_q(x, stride, count, width, out);
  }
  static int64_t steps(int64_t width) { return width / 2; }
  static void pack_rows(const BFloat16* x, int64_t stride, int count, int64_t width, uint64_t bad,
                        float* packed) {
    int32_t* out = (int32_t*)packed;
    const int64_t wide = padded(width);
    for (int r = 0; r < count; r += 2, x += 2 * stride, out += wide) {
      const bool low = !(bad >> r & 1), high = r + 1 < count && !(bad >> (r + 1) & 1);
      int64_t d = 0;
      if (low && high) {
        for (; d + kLanes <= width; d += kLanes) store(out + d, interleave(x + d, x + stride + d));
      }
      for (; d < width; ++d)
        out[d] = int32_t((low ? x[d].bits : 0) | (high ? uint32_t(x[stride + d].bits) << 16 : 0));
      for (; d < wide; ++d) out[d] = 0;
    }
  }
  static void clear_rows(uint64_t, int64_t, float*) {}
  static Broadcast rows(const BFloat16* x, int64_t stride, const float*, int64_t) {
    return {(const char*)x, stride * 2, 4};
  }
};
#endif

#ifdef FASTATTN_HAS_TILES
// The products on tiles, of any width; fp16 as two bf16 that add up to it.
template <class T>
struct TiledRows {
  using Product = Dot2Product;
  using Matrices = GradientMatrices<T>;
  static constexpr int kRows = 2, kParts = kTileParts<T>;
  static constexpr bool kTiles = true;

  // In parts, splitting and packing cost more than tiles gain where heads are narrow or rows are few:
  // measured with as many queries as keys, the time of vectors is 0.7 of theirs at 16 rows of 64, 0.95 at 32
  // and 1.1 at 64; 0.85 at 128 rows of 32 and 1.25 at 256; no better than 1 at a width of 16.
  static bool takes(const AttentionBwdArgs& a) {
    const int64_t rows = a.Sq < a.Sk ? a.Sq : a.Sk, width = a.D < a.Dv ? a.D : a.Dv;
    return kParts == 1 || (width > 32 ? rows >= 64 : width > 16 && rows >= 256);
  }
  static int64_t wide(int64_t width) { return padded_width(width); }

  // Two lane vectors of two rows as pairs of rows, and as rows of pairs of keys that lie 16 apart, 32 words
  // from row to row; each part of them in turn. Rounded as pack_pairs_loosely does it. NaN goes to `check`
  // where a number has no parts.
  static FASTATTN_INLINE void put_pairs(const F32 (&x)[2][2], F32* check, int32_t* pairs,
                                        int32_t* rows = nullptr) {
    F32 rest[2][2] = {{x[0][0], x[0][1]}, {x[1][0], x[1][1]}};
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      put_part(rest, pairs + part * kPartWords, rows ? rows + part * kPartWords : nullptr);
      if (kParts > 1 && part == 0) {
        *check = fma(rest[0][0] + rest[0][1], zero(), fma(rest[1][0] + rest[1][1], zero(), *check));
      }
    }
  }
  // Numbers that are not the sum of their parts: not finite, or next to infinity.
  static Mask has_no_parts(F32 x) {
    return is_nan((x - upper_half(bits_of(x) + splat_int(kHalfUnit))) * zero());
  }

 private:
  static constexpr int64_t kPartWords = Matrices::kPairBytes / 4;
  static constexpr int32_t kHalfUnit = 0x8000;  // added to a float's bits, it rounds their upper half

  static FASTATTN_INLINE F32 upper_half(I32 bits) { return float_of(bits & splat_int(-0x10000)); }

  // The next part of every number, and what it leaves of it.
  static FASTATTN_INLINE void put_part(F32 (&rest)[2][2], int32_t* pairs, int32_t* rows) {
    I32 high[2][2], low[2][2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        high[r][i] = bits_of(rest[r][i]) + splat_int(kHalfUnit);
        low[r][i] = shift_right<16>(high[r][i]);
        if constexpr (kParts > 1) rest[r][i] = rest[r][i] - upper_half(high[r][i]);
      }
    }
    store(pairs, merge_halves(high[1][0], low[0][0]));
    store(pairs + kLanes, merge_halves(high[1][1], low[0][1]));
    if (!rows) return;
    store(rows, merge_halves(high[0][1], low[0][0]));
    store(rows + kGranule / 2, merge_halves(high[1][1], low[1][0]));
  }
};
#endif

}  // namespace
}  // namespace fastattn
