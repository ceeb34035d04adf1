// Backward of LayerNorm and RMSNorm, from h and the statistics of the forward. With g = dy * weight and
// n = (h - mean) * rstd:
//
//   dh = rstd * (g - mean(g) - n * mean(g * n)) + dsum,   dweight = sum over rows of dy * n,   dbias = sum of
//   dy
//
// without mean(g) for RMSNorm; dsum is the gradient that reached the sum of add + norm by itself. Each task
// adds its rows up in a row of its own, and those rows are added in order: their number depends on the number
// of rows only.
#pragma once

#include "rows.h"

namespace fastattn {
namespace {

// Which gradients of weights a loop adds up.
enum class Sums { kNone, kWeight, kBoth };

struct TwoMeans {
  F32 first, second;
};

template <class H, bool RMS>
struct Normalised {
  F32 mean, rest, rstd;
  Normalised(const NormBackwardArgs& a, int64_t row) : mean(zero()), rest(zero()), rstd(splat(a.stats[row])) {
    if constexpr (!RMS)
      mean = splat(a.stats[a.grid.rows + row]), rest = splat(a.stats[2 * a.grid.rows + row]);
  }
  FASTATTN_INLINE F32 of(F32 h) const {
    if constexpr (!RMS) h = h - mean;
    if constexpr (!RMS && sizeof(H) == 4) h = h - rest;
    return h * rstd;
  }
};

template <class H, class D, bool RMS, Sums SUMS>
FASTATTN_INLINE void norm_backward_row(const NormBackwardArgs& a, int64_t row, const H* h, const D* dy,
                                       const H* dsum, H* dx, float* dweight, [[maybe_unused]] float* dbias) {
  const Normalised<H, RMS> normalised(a, row);
  double sum = 0, product = 0;
  for (int64_t from = 0; from < a.width; from += kChunk) {
    TwoMeans s[4] = {};
    each_of_four(smaller(kChunk, a.width - from), s, [&](int64_t k, TwoMeans acc, auto at) -> TwoMeans {
      const int64_t i = from + k;
      const F32 d = at.load(dy + i), n = at.keep(normalised.of(at.load(h + i))),
                g = d * at.load(a.weight + i);
      if constexpr (SUMS != Sums::kNone) at.store(dweight + i, fma(d, n, at.load(dweight + i)));
      if constexpr (SUMS == Sums::kBoth) at.store(dbias + i, at.load(dbias + i) + d);
      return {RMS ? acc.first : acc.first + g, fma(g, n, acc.second)};
    });
    sum += reduce_add((s[0].first + s[1].first) + (s[2].first + s[3].first));
    product += reduce_add((s[0].second + s[1].second) + (s[2].second + s[3].second));
  }
  if (!dx) return;
  const F32 mean_g = splat(float(sum / double(a.width))), mean_gn = splat(float(product / double(a.width)));
  const auto gradient = [&](int64_t i, auto at) {
    F32 g = at.load(dy + i) * at.load(a.weight + i);
    if constexpr (!RMS) g = g - mean_g;
    return (g - normalised.of(at.load(h + i)) * mean_gn) * normalised.rstd;
  };
  if (dsum) {
    each_vector_to(dx, a.width, a.stream,
                   [&](int64_t i, auto at) { at.store(dx + i, gradient(i, at) + at.load(dsum + i)); });
  } else {
    each_vector_to(dx, a.width, a.stream, [&](int64_t i, auto at) { at.store(dx + i, gradient(i, at)); });
  }
}

template <class H, bool RMS, Sums SUMS>
void norm_backward_rows(const NormBackwardArgs& a, int64_t task, float* scratch) {
  const int64_t first = task * a.grid.rows / a.tasks, last = (task + 1) * a.grid.rows / a.tasks;
  float *dweight = nullptr, *dbias = nullptr;
  if constexpr (SUMS != Sums::kNone) {
    dweight = a.dweight + task * a.width, dbias = SUMS == Sums::kBoth ? a.dbias + task * a.width : nullptr;
    each_vector(a.width, [&](int64_t i, auto at) {
      at.store(dweight + i, zero());
      if constexpr (SUMS == Sums::kBoth) at.store(dbias + i, zero());
    });
  }
  for (int64_t r = first; r < last; ++r) {
    const H* h = (const H*)a.h.data + a.grid.offset(a.h.stride, r);
    const H* dsum = a.dsum.data ? (const H*)a.dsum.data + a.grid.offset(a.dsum.stride, r) : nullptr;
    H* dx = a.dx.data ? (H*)a.dx.data + a.grid.offset(a.dx.stride, r) : nullptr;
    const int64_t at_dy = a.grid.offset(a.dy.stride, r);
    if (a.dy.storage == a.h.storage) {
      norm_backward_row<H, H, RMS, SUMS>(a, r, h, (const H*)a.dy.data + at_dy, dsum, dx, dweight, dbias);
    } else {
      with_row(a.dy, at_dy, [&](const auto* dy) {
        each_vector(a.width, [&](int64_t i, auto at) { at.store(scratch + i, at.load(dy + i)); });
      });
      norm_backward_row<H, float, RMS, SUMS>(a, r, h, (const float*)scratch, dsum, dx, dweight, dbias);
    }
  }
  if (a.stream) stream_fence();
}

template <class H>
void norm_backward_task(const NormBackwardArgs& a, int64_t task, void* scratch) {
  const auto run = [&](auto rms) {
    constexpr bool kRms = decltype(rms)::value;
    if (a.dbias) norm_backward_rows<H, kRms, Sums::kBoth>(a, task, (float*)scratch);
    else if (a.dweight) norm_backward_rows<H, kRms, Sums::kWeight>(a, task, (float*)scratch);
    else norm_backward_rows<H, kRms, Sums::kNone>(a, task, (float*)scratch);
  };
  struct Rms {
    static constexpr bool value = true;
  };
  struct Layer {
    static constexpr bool value = false;
  };
  a.rms ? run(Rms{}) : run(Layer{});
}

inline int64_t norm_backward_scratch(const NormBackwardArgs& a) { return 4 * a.width; }

// Columns [from, to) of the sum of `parts` rows of `width` numbers, in their order.
inline void add_parts(const float* parts, int64_t count, int64_t width, int64_t from, int64_t to,
                      const RowTensor& out) {
  with_row(out, from, [&](auto* sum) {
    each_vector(to - from, [&](int64_t i, auto at) {
      F32 s = at.load(parts + from + i);
      for (int64_t p = 1; p < count; ++p) s = s + at.load(parts + p * width + from + i);
      at.store(sum + i, s);
    });
  });
}

}  // namespace
}  // namespace fastattn
