// LayerNorm and RMSNorm of rows, alone or after adding a residual.
//
//   y = (h - mean) / sqrt(mean((h - mean)^2) + eps) * weight + bias       or  y = h / sqrt(mean(h^2) + eps) *
//   weight
//
// Statistics take two passes over a cached chunk, the squares of centred values, and chunks merge in double
// precision (Chan, Golub and LeVeque): a mean of a million times the deviation does not cancel. What rounding
// left of the mean is subtracted too. A row whose squares leave the range of float is scaled by a power of
// two first.
#pragma once

#include "rows.h"

namespace fastattn {
namespace {

struct RowStats {
  float mean, rest, rstd;
};

struct Moments {
  double mean, variance;
};

struct TwoSums {
  F32 first, second;
};

// What is asked of memory while it would stand still, for the hardware's own prefetch ends with each 4 KB:
// the lines that will be read next and those that will be written. Null where nothing is.
struct Wanted {
  const char *x, *residual;
  char* y;

  FASTATTN_INLINE void fetch(int64_t byte) const {
    __builtin_prefetch(x + byte);
    if (residual) __builtin_prefetch(residual + byte);
    if (y) __builtin_prefetch(y + byte, 1);
  }
};

// Sums of a chunk around a pivot near its mean.
template <bool AHEAD, class T>
FASTATTN_INLINE void centred_sums(const T* x, int64_t n, float pivot, [[maybe_unused]] const Wanted& wanted,
                                  [[maybe_unused]] int64_t first, double* sum, double* squares) {
  TwoSums s[4] = {};
  each_of_four(n, s, [&](int64_t i, TwoSums acc, auto at) -> TwoSums {
    const F32 d = at.keep(at.load(x + i) - splat(pivot));
    if constexpr (AHEAD) wanted.fetch((first + i) * int64_t(sizeof(T)));
    return {acc.first + d, fma(d, d, acc.second)};
  });
  *sum = reduce_add((s[0].first + s[1].first) + (s[2].first + s[3].first));
  *squares = reduce_add((s[0].second + s[1].second) + (s[2].second + s[3].second));
}

template <bool AHEAD, class T>
FASTATTN_INLINE Moments mean_and_variance(const T* h, int64_t n, const Wanted& wanted) {
  double mean = 0, squares = 0, sum, around;
  const double inverse = 1 / double(n);
  for (int64_t from = 0; from < n; from += kChunk) {
    const T* x = h + from;
    const int64_t count = smaller(kChunk, n - from);
    const double share = count == n ? inverse : 1 / double(count);
    const float pivot = sum_of(count, [&](int64_t i, auto at) { return at.load(x + i); }) * float(share);
    centred_sums<AHEAD>(x, count, pivot, wanted, from, &sum, &around);
    const double here = around - sum * sum * share, chunk_mean = pivot + sum * share;
    if (from == 0) {
      mean = chunk_mean, squares = here;
    } else {
      const double shift = chunk_mean - mean, total = double(from + count);
      mean += shift * (double(count) / total);
      squares += here + shift * shift * (double(from) * double(count) / total);
    }
  }
  return {mean, squares > 0 || squares != squares ? squares * inverse : 0};
}

template <bool AHEAD, class T>
FASTATTN_INLINE Moments mean_square(const T* h, int64_t n, [[maybe_unused]] const Wanted& wanted) {
  double squares = 0;
  for (int64_t from = 0; from < n; from += kChunk) {
    F32 s[4] = {zero(), zero(), zero(), zero()};
    each_of_four(smaller(kChunk, n - from), s, [&](int64_t i, F32 acc, auto at) {
      const F32 x = at.load(h + from + i);
      if constexpr (AHEAD) wanted.fetch((from + i) * int64_t(sizeof(T)));
      return fma(x, x, acc);
    });
    squares += reduce_add((s[0] + s[1]) + (s[2] + s[3]));
  }
  return {0, squares / double(n)};
}

template <bool RMS, class T>
Moments moments(const T* h, int64_t n, const Wanted& wanted) {
  if constexpr (RMS) return wanted.x ? mean_square<true>(h, n, wanted) : mean_square<false>(h, n, wanted);
  else return wanted.x ? mean_and_variance<true>(h, n, wanted) : mean_and_variance<false>(h, n, wanted);
}

FASTATTN_INLINE double inverse_root(double x) { return 1 / __builtin_sqrt(x); }

// Squares that overflowed, or that lost digits to underflow which eps does not hide.
FASTATTN_INLINE bool out_of_range(double variance, double eps) {
  return !(variance < 0x1p110) || (variance < 0x1p-100 && eps < 0x1p-76);
}

template <class T, class Y, bool RMS, bool WEIGHT, bool BIAS>
FASTATTN_INLINE void normalise(const NormArgs& a, const T* h, const RowStats& s, Y* y, const Wanted& next) {
  const F32 mean = splat(s.mean), rest = splat(s.rest), rstd = splat(s.rstd);
  const auto row = [&](const auto& ask) {
    each_vector_to(y, a.width, a.stream, [&](int64_t i, auto at) {
      ask(i);
      F32 v = at.load(h + i);
      if constexpr (!RMS) v = v - mean;
      if constexpr (!RMS && sizeof(T) == 4) v = v - rest;  // half precision has no digits that far down
      v = v * rstd;
      if constexpr (BIAS) v = fma(v, at.load(a.weight + i), at.load(a.bias + i));
      else if constexpr (WEIGHT) v = v * at.load(a.weight + i);
      at.store(y + i, v);
    });
  };
  next.x ? row([&](int64_t i) { next.fetch(i * int64_t(sizeof(Y))); }) : row([](int64_t) {});
}

template <class T, class Y, bool RMS>
FASTATTN_INLINE void normalise(const NormArgs& a, const T* h, const RowStats& s, Y* y, const Wanted& next) {
  if (a.bias) normalise<T, Y, RMS, true, true>(a, h, s, y, next);
  else if (a.weight) normalise<T, Y, RMS, true, false>(a, h, s, y, next);
  else normalise<T, Y, RMS, false, false>(a, h, s, y, next);
}

// The power of two that brings the row's largest magnitude to [1, 2); 0 where there is none.
template <class T>
float taming_power(const T* h, int64_t n) {
  const float peak = max_of(n, [&](int64_t i, auto at) { return abs(at.load(h + i)); });
  if (!(peak > 0) || !(peak <= __FLT_MAX__)) return 0.f;
  const int exponent = int(as_bits(peak) >> 23);  // 0 for subnormals
  return from_bits(uint32_t(exponent == 0 ? 253 : exponent > 253 ? 1 : 254 - exponent) << 23);
}

// `ahead` is asked for while the row is summed, `next` while it is written.
template <class T, class Y, bool RMS>
void norm_row(const NormArgs& a, const T* h, int64_t row, Y* y, float* tamed, const Wanted& ahead,
              const Wanted& next) {
  const auto done = [&](const RowStats& s) {
    if (!a.stats) return;
    a.stats[row] = s.rstd;
    if constexpr (!RMS) a.stats[a.grid.rows + row] = s.mean, a.stats[2 * a.grid.rows + row] = s.rest;
  };
  const auto split = [](const Moments& m, double rstd) -> RowStats {
    return {float(m.mean), float(m.mean - double(float(m.mean))), float(rstd)};
  };
  const Moments m = moments<RMS>(h, a.width, ahead);
  const float power = out_of_range(m.variance, a.eps) ? taming_power(h, a.width) : 0.f;
  if (power == 0.f) {
    const RowStats s = split(m, inverse_root(m.variance + a.eps));
    normalise<T, Y, RMS>(a, h, s, y, next);
    return done(s);
  }
  each_vector(a.width, [&](int64_t i, auto at) { at.store(tamed + i, at.load(h + i) * splat(power)); });
  const Moments t = moments<RMS>((const float*)tamed, a.width, {});
  const double floor = a.eps * power * power, rstd = inverse_root(t.variance + floor);
  // A row without variance is 0, not 0 * inf, as long as there is an eps.
  const RowStats s = split(t, floor > 0 && rstd > __FLT_MAX__ ? __FLT_MAX__ : rstd);
  normalise<float, Y, RMS>(a, tamed, s, y, next);
  done(split({t.mean / power, 0}, rstd * power));
}

// h = x + residual, rounded to sum's storage. Sums that go past the caches stay in scratch for the norm.
template <class X, class S>
FASTATTN_INLINE void add_row(const NormArgs& a, const X* x, int64_t row, S* sum) {
  with_row(a.residual, a.grid.offset(a.residual.stride, row), [&](const auto* residual) {
    each_vector(a.width,
                [&](int64_t i, auto at) { at.store(sum + i, at.load(x + i) + at.load(residual + i)); });
  });
}

template <bool RMS, class X, class S>
FASTATTN_INLINE void add_norm_row(const NormArgs& a, const X* x, int64_t row, S* sum, X* y, float* scratch,
                                  const Wanted& next) {
  S* h = a.stream_sum ? (S*)scratch : sum;
  float* tamed = scratch + a.width;
  add_row(a, x, row, h);
  if constexpr (sizeof(S) == sizeof(X) || sizeof(S) == 4) {
    norm_row<S, X, RMS>(a, h, row, y, tamed, {}, next);
  } else {
    float* wide = tamed + a.width;
    each_vector(a.width, [&](int64_t i, auto at) { at.store(wide + i, at.load(h + i)); });
    norm_row<float, X, RMS>(a, wide, row, y, tamed, {}, next);
  }
  if (a.stream_sum) {
    each_vector_to(sum, a.width, true, [&](int64_t i, auto at) { at.store(sum + i, at.load(h + i)); });
  }
}

template <class X, bool RMS>
void norm_rows(const NormArgs& a, int64_t task, float* scratch) {
  const int64_t first = task * a.rows_per_task, last = smaller(first + a.rows_per_task, a.grid.rows);
  for (int64_t r = first; r < last; ++r) {
    const X* x = (const X*)a.x.data + a.grid.offset(a.x.stride, r);
    X* y = (X*)a.y.data + a.grid.offset(a.y.stride, r);
    if (!a.residual.data) {
      Wanted ahead = {};
      if (a.ahead) ahead = {(const char*)(x + kChunk), nullptr, a.stream ? nullptr : (char*)y};
      norm_row<X, X, RMS>(a, x, r, y, scratch, ahead, {});
      continue;
    }
    Wanted next = {};
    if (a.ahead) {
      const int64_t bytes = a.residual.storage == Storage::kFloat ? 4 : 2;
      const int64_t at = a.grid.offset(a.residual.stride, r) + a.width;
      next = {(const char*)(x + a.width), (const char*)a.residual.data + at * bytes, nullptr};
    }
    with_row(a.sum, a.grid.offset(a.sum.stride, r),
             [&](auto* sum) { add_norm_row<RMS>(a, x, r, sum, y, scratch, next); });
  }
  if (a.stream) stream_fence();
}

template <class X>
void norm_task(const NormArgs& a, int64_t task, void* scratch) {
  a.rms ? norm_rows<X, true>(a, task, (float*)scratch) : norm_rows<X, false>(a, task, (float*)scratch);
}

inline int64_t norm_scratch(const NormArgs& a) { return 3 * 4 * a.width; }

// weight + offset, or bias, as fp32.
inline void widen_weight(Storage storage, const void* weight, int64_t n, float offset, float* out) {
  const RowTensor t{const_cast<void*>(weight), storage, {}, 1};
  with_row(t, 0, [&](const auto* w) {
    each_vector(n, [&](int64_t i, auto at) { at.store(out + i, at.load(w + i) + splat(offset)); });
  });
}

}  // namespace
}  // namespace fastattn
