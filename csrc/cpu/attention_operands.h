// How the vector forward packs and reads its operands: Q^T, and K and V as the products want them.
#pragma once

#include "attention_args.h"
#include "matmul.h"

namespace fastattn {
namespace {

// rows x width elements, a row every `stride`, to fp32 rows of `width`.
template <class T>
void widen_rows(const T* x, int64_t stride, int rows, int64_t width, float* out) {
  for (int r = 0; r < rows; ++r, x += stride, out += width) {
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) store(out + d, load(x + d));
    if (d < width) store_n(out + d, load_n(x + d, width - d), width - d);
  }
}

// x[row][word] of `count` rows to out[word][lane], ROW floats a word; lanes past `count` are 0. Words are
// floats or bf16 pairs.
template <int64_t ROW = kGranule, class Load>
void pack_transposed(int count, int64_t words, float* out, const Load& load_words) {
  for (int c = 0; c < kVectors && c * kLanes < count; ++c) {
    for (int64_t d = 0; d < words; d += kLanes) {
      F32 r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int row = c * kLanes + i;
        r[i] = row < count ? load_words(row, d) : zero();
      }
      transpose(r);
      for (int i = 0; i < kLanes && d + i < words; ++i) store(out + (d + i) * ROW + c * kLanes, r[i]);
    }
  }
}

// The products on fp32 operands: in place for fp32, widened for the rest.
template <class T>
struct WidenedOperands {
  using Product = FmaProduct;
  static constexpr int kKeysPerStep = 1;

  static void pack_q(const T* q, int64_t stride, int count, int64_t width, float* out) {
    pack_transposed(count, width, out,
                    [&](int row, int64_t d) { return load_n(q + row * stride + d, width - d); });
  }
  static Broadcast keys(const T* k, int64_t stride, int n, int64_t width, float* buffer) {
    if constexpr (sizeof(T) == 4) return {(const char*)k, stride * 4, 4};
    widen_rows(k, stride, n, width, buffer);
    return {(const char*)buffer, width * 4, 4};
  }
  static Broadcast values(const T* v, int64_t stride, int n, int64_t width, float* buffer) {
    if constexpr (sizeof(T) == 4) return {(const char*)v, 4, stride * 4};
    widen_rows(v, stride, n, width, buffer);
    return {(const char*)buffer, 4, width * 4};
  }
  static int64_t steps(int64_t width) { return width; }
};

#ifdef FASTATTN_HAS_DOT2
// The products on bf16 pairs; D is even. K is read in place, V as pairs of adjacent keys.
struct PairedOperands {
  using Product = Dot2Product;
  static constexpr int kKeysPerStep = 2;

  static void pack_q(const BFloat16* q, int64_t stride, int count, int64_t width, float* out) {
    pack_transposed(count, width / 2, out, [&](int row, int64_t d) {
      return load_n((const float*)(q + row * stride) + d, width / 2 - d);
    });
  }
  static Broadcast keys(const BFloat16* k, int64_t stride, int, int64_t, float*) {
    return {(const char*)k, stride * 2, 4};
  }
  static Broadcast values(const BFloat16* v, int64_t stride, int n, int64_t width, float* buffer) {
    int32_t* out = (int32_t*)buffer;
    for (int j = 0; j < n; j += 2, v += 2 * stride, out += width) {
      int64_t d = 0;
      if (j + 1 < n) {
        for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
          I32 first, last;
          interleave(v + d, v + stride + d, &first, &last);
          store(out + d, first);
          store(out + d + kLanes, last);
        }
      }
      for (; d < width; ++d)
        out[d] = int32_t(v[d].bits | (j + 1 < n ? uint32_t(v[stride + d].bits) << 16 : 0));
    }
    return {(const char*)buffer, 4, width * 4};
  }
  static int64_t steps(int64_t width) { return width / 2; }
};
#endif

}  // namespace
}  // namespace fastattn
