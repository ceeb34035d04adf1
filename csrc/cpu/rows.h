// What the row kernels share: loops over a row's vectors, reductions in a fixed order, rows of other storage
// or stride brought into scratch.
//
// A row is reduced in chunks that stay in the first-level cache. Within a chunk, vector k goes to accumulator
// k % 4; chunks meet in double precision. So the order of additions depends on the row's length only.
#pragma once

#include "rows_args.h"

namespace fastattn {
namespace {

constexpr int64_t kChunk = 128 * kLanes;  // 32 additions to an accumulator

FASTATTN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Access to a whole vector, to one whose aligned stores go past the caches, and to a row's last few numbers.
struct Whole {
  template <class T>
  FASTATTN_INLINE F32 load(const T* p) const {
    return fastattn::load(p);
  }
  template <class T>
  FASTATTN_INLINE void store(T* p, F32 x) const {
    fastattn::store(p, x);
  }
  FASTATTN_INLINE Mask nonzero(const uint8_t* p) const { return nonzero_bytes(p); }
  FASTATTN_INLINE F32 keep(F32 x) const { return x; }
  FASTATTN_INLINE F32 keep(F32 x, F32) const { return x; }
};
struct Streamed : Whole {
  template <class T>
  FASTATTN_INLINE void store(T* p, F32 x) const {
    stream(p, x);
  }
};
struct Part {
  int64_t n;
  template <class T>
  FASTATTN_INLINE F32 load(const T* p) const {
    return load_n(p, n);
  }
  template <class T>
  FASTATTN_INLINE void store(T* p, F32 x) const {
    store_n(p, x, n);
  }
  FASTATTN_INLINE Mask nonzero(const uint8_t* p) const { return nonzero_bytes_n(p, n); }
  FASTATTN_INLINE F32 keep(F32 x) const { return keep(x, zero()); }
  FASTATTN_INLINE F32 keep(F32 x, F32 other) const { return select(mask_of_bits((1u << n) - 1), x, other); }
};

// f(first number, access) for each vector of n numbers.
template <class F>
FASTATTN_INLINE void each_vector(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    f(i, Whole{});
    f(i + kLanes, Whole{});
  }
  if (i + kLanes <= n) {
    f(i, Whole{});
    i += kLanes;
  }
  if (i < n) f(i, Part{n - i});
}

// The same for numbers that are stored to `out`, past the caches if asked.
template <class T, class F>
FASTATTN_INLINE void each_vector_to(T* out, int64_t n, bool past_caches, const F& f) {
  if (!past_caches || kLanes == 1) return each_vector(n, f);
  int64_t i = smaller(int64_t(-uintptr_t(out) % (kLanes * sizeof(T)) / sizeof(T)), n);
  if (i > 0) f(0, Part{i});
  for (; i + kLanes <= n; i += kLanes) f(i, Streamed{});
  if (i < n) f(i, Part{n - i});
}

// A reduction of n numbers into four accumulators: f(first number, accumulator, access) is the next
// accumulator.
template <class Acc, class F>
FASTATTN_INLINE void each_of_four(int64_t n, Acc* four, const F& f) {
  Acc a = four[0], b = four[1], c = four[2], d = four[3];
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a = f(i, a, Whole{});
    b = f(i + kLanes, b, Whole{});
    c = f(i + 2 * kLanes, c, Whole{});
    d = f(i + 3 * kLanes, d, Whole{});
  }
  if (i + kLanes <= n) a = f(i, a, Whole{}), i += kLanes;
  if (i + kLanes <= n) b = f(i, b, Whole{}), i += kLanes;
  if (i + kLanes <= n) c = f(i, c, Whole{}), i += kLanes;
  if (i < n) d = f(i, d, Part{n - i});
  four[0] = a, four[1] = b, four[2] = c, four[3] = d;
}

template <class F>
FASTATTN_INLINE float sum_of(int64_t n, const F& f) {
  F32 s[4] = {zero(), zero(), zero(), zero()};
  each_of_four(n, s, [&](int64_t i, F32 acc, auto at) { return acc + at.keep(f(i, at)); });
  return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
}

// The largest number; NaN counts as none, and of none it is -inf.
template <class F>
FASTATTN_INLINE float max_of(int64_t n, const F& f) {
  const F32 least = splat(-__builtin_inff());
  F32 s[4] = {least, least, least, least};
  each_of_four(n, s, [&](int64_t i, F32 acc, auto at) { return max(at.keep(f(i, at), least), acc); });
  return reduce_max(max(max(s[0], s[1]), max(s[2], s[3])));
}

// f(typed pointer) for a tensor's row.
template <class F>
FASTATTN_INLINE void with_row(const RowTensor& t, int64_t offset, const F& f) {
  switch (t.storage) {
    case Storage::kFloat: return f((float*)t.data + offset);
    case Storage::kBFloat16: return f((BFloat16*)t.data + offset);
    case Storage::kHalf: return f((Half*)t.data + offset);
  }
}

// Rows of a block whose columns are not adjacent, to fp32 rows of `width` and back. Where neighbouring rows
// are adjacent, as in a softmax over another dimension than the last, whole vectors of rows move at a time.
template <class T>
void gather_rows(const T* const* rows, int count, int64_t column, int64_t width, float* out) {
  bool adjacent = count == kLanes;
  for (int r = 1; r < count; ++r) adjacent &= rows[r] == rows[0] + r;
  int64_t j = 0;
  if (adjacent && kLanes > 1) {
    for (; j + kLanes <= width; j += kLanes) {
      F32 tile[kLanes];
      for (int i = 0; i < kLanes; ++i) tile[i] = load(rows[0] + (j + i) * column);
      transpose(tile);
      for (int r = 0; r < kLanes; ++r) store(out + r * width + j, tile[r]);
    }
  }
  for (; j < width; ++j) {
    for (int r = 0; r < count; ++r) out[r * width + j] = as_float(rows[r][j * column]);
  }
}

template <class T>
void scatter_rows(const float* in, int64_t width, T* const* rows, int count, int64_t column) {
  bool adjacent = count == kLanes;
  for (int r = 1; r < count; ++r) adjacent &= rows[r] == rows[0] + r;
  int64_t j = 0;
  if (adjacent && kLanes > 1) {
    for (; j + kLanes <= width; j += kLanes) {
      F32 tile[kLanes];
      for (int r = 0; r < kLanes; ++r) tile[r] = load(in + r * width + j);
      transpose(tile);
      for (int i = 0; i < kLanes; ++i) store(rows[0] + (j + i) * column, tile[i]);
    }
  }
  for (; j < width; ++j) {
    for (int r = 0; r < count; ++r) from_float(in[r * width + j], rows[r] + j * column);
  }
}

}  // namespace
}  // namespace fastattn
