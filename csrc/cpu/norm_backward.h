// Backward of LayerNorm and RMSNorm, from h and the statistics of the forward. With g = dy * weight and
// n = (h - mean) * rstd:
//
//   dh = rstd * (g - mean(g) - n * mean(g * n)) + dsum
//   dweight = sum over rows of dy * n,   dbias = sum over rows of dy
//
// without mean(g) for RMSNorm; dsum is the gradient that reached the sum of add + norm by itself.
//
// A block of rows is read twice: row by row for the means, then column by column through all its rows, out of
// the cache, so that the sums over rows stay in registers. Blocks are added to a sum that stays near, that
// one to the task's, and the tasks' to the result: few additions follow on each other however many rows there
// are. How rows fall into blocks and tasks depends on shape and dtypes only.
#pragma once

#include "rows.h"

namespace fastattn {
namespace {

// Which gradients of weights a loop adds up.
enum class Sums { kNone, kWeight, kBoth };

constexpr int kBlockRows = 8;
constexpr int64_t kRowBlockBytes = int64_t(256) << 10;  // of h and dy: a quarter of the second-level cache
constexpr int64_t kNearBlocks = 16;                     // blocks to a near sum
constexpr int kColumnVectors = kLanes == 16 ? 4 : 2;

template <class H, class D>
struct BlockRow {
  const H* h;
  const D* dy;
  const H* dsum;
  H* dx;
  float mean, rest, rstd, mean_g, mean_gn;
};

template <bool RMS, class H, class D>
FASTATTN_INLINE F32 normalised(F32 h, const BlockRow<H, D>& row) {
  if constexpr (!RMS) h = h - splat(row.mean);
  if constexpr (!RMS && sizeof(H) == 4) h = h - splat(row.rest);
  return h * splat(row.rstd);
}

struct TwoMeans {
  F32 first, second;
};

// mean(g) and mean(g * n). Asks for the lines that dx is written to meanwhile.
template <bool RMS, class H, class D>
FASTATTN_INLINE void row_means(const NormBackwardArgs& a, BlockRow<H, D>& row) {
  double sum = 0, product = 0;
  for (int64_t from = 0; from < a.width; from += kChunk) {
    TwoMeans s[4] = {};
    each_of_four(smaller(kChunk, a.width - from), s, [&](int64_t k, TwoMeans acc, auto at) -> TwoMeans {
      const int64_t i = from + k;
      const F32 n = at.keep(normalised<RMS>(at.load(row.h + i), row));
      const F32 g = at.load(row.dy + i) * at.load(a.weight + i);
      if (!a.stream) __builtin_prefetch(row.dx + i, 1);
      return {RMS ? acc.first : acc.first + g, fma(g, n, acc.second)};
    });
    sum += reduce_add((s[0].first + s[1].first) + (s[2].first + s[3].first));
    product += reduce_add((s[0].second + s[1].second) + (s[2].second + s[3].second));
  }
  row.mean_g = float(sum / double(a.width)), row.mean_gn = float(product / double(a.width));
}

// VECTORS vectors of columns from `i` on, through all rows of a block; `to` stores dx. Asks for the next
// block meanwhile, `count` rows on where rows are neighbours: memory would stand still else.
template <int VECTORS, bool RMS, Sums SUMS, class H, class D, class At, class To>
FASTATTN_INLINE void block_columns(const NormBackwardArgs& a, const BlockRow<H, D>* rows, int count,
                                   int64_t i, At at, To to, [[maybe_unused]] float* dweight,
                                   [[maybe_unused]] float* dbias) {
  F32 weight[VECTORS], dw[VECTORS], db[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    weight[v] = at.load(a.weight + i + v * kLanes), dw[v] = db[v] = zero();
  }
  for (int r = 0; r < count; ++r) {
    const BlockRow<H, D>& row = rows[r];
    const F32 minus_rstd = splat(-row.rstd), mean_g = splat(row.mean_g), mean_gn = splat(row.mean_gn);
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t j = i + v * kLanes;
      const F32 d = at.load(row.dy + j), n = normalised<RMS>(at.load(row.h + j), row);
      if (a.ahead) {
        __builtin_prefetch(row.h + j + count * a.width, 0, 2);
        __builtin_prefetch(row.dy + j + count * a.width, 0, 2);
      }
      if constexpr (SUMS != Sums::kNone) dw[v] = fma(d, n, dw[v]);
      if constexpr (SUMS == Sums::kBoth) db[v] = db[v] + d;
      if (!row.dx) continue;
      F32 g = d * weight[v];
      if constexpr (!RMS) g = g - mean_g;
      F32 dx = fms(n, mean_gn, g) * minus_rstd;
      if (row.dsum) dx = dx + at.load(row.dsum + j);
      to.store(row.dx + j, dx);
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t j = i + v * kLanes;
    if constexpr (SUMS != Sums::kNone) at.store(dweight + j, at.load(dweight + j) + dw[v]);
    if constexpr (SUMS == Sums::kBoth) at.store(dbias + j, at.load(dbias + j) + db[v]);
  }
}

template <bool RMS, Sums SUMS, class H, class D, class To>
void norm_backward_block(const NormBackwardArgs& a, const BlockRow<H, D>* rows, int count, To to,
                         float* dweight, float* dbias) {
  constexpr int64_t kStep = kColumnVectors * kLanes;
  int64_t i = 0;
  for (; i + kStep <= a.width; i += kStep) {
    block_columns<kColumnVectors, RMS, SUMS>(a, rows, count, i, Whole{}, to, dweight, dbias);
  }
  for (; i + kLanes <= a.width; i += kLanes) {
    block_columns<1, RMS, SUMS>(a, rows, count, i, Whole{}, to, dweight, dbias);
  }
  const Part rest{a.width - i};
  if (i < a.width) block_columns<1, RMS, SUMS>(a, rows, count, i, rest, rest, dweight, dbias);
}

// to += from, from = 0.
inline void drain(float* from, float* to, int64_t n) {
  each_vector(n, [&](int64_t i, auto at) {
    at.store(to + i, at.load(to + i) + at.load(from + i));
    at.store(from + i, zero());
  });
}

inline void clear(float* x, int64_t n) {
  each_vector(n, [&](int64_t i, auto at) { at.store(x + i, zero()); });
}

inline int64_t block_rows(const NormBackwardArgs& a) {
  const int64_t bytes = a.width * ((a.h.storage == Storage::kFloat ? 4 : 2) +
                                   (a.dy.storage == a.h.storage && a.h.storage != Storage::kFloat ? 2 : 4));
  const int64_t rows = kRowBlockBytes / bytes;
  return rows < 1 ? 1 : smaller(rows, kBlockRows);
}

// Scratch: the near sums, and the rows of dy of a block as fp32 where dy is not stored like h.
inline int64_t norm_backward_scratch(const NormBackwardArgs& a) {
  return 4 * a.width * (2 + (a.dy.storage == a.h.storage ? 0 : block_rows(a)));
}

template <class H, class D, bool RMS, Sums SUMS>
void norm_backward_rows(const NormBackwardArgs& a, int64_t task, float* scratch) {
  const int64_t first = task * a.grid.rows / a.tasks, last = (task + 1) * a.grid.rows / a.tasks;
  float *near_weight = scratch, *near_bias = scratch + a.width, *dys = scratch + 2 * a.width;
  float* dweight = SUMS != Sums::kNone ? a.dweight + task * a.width : nullptr;
  float* dbias = SUMS == Sums::kBoth ? a.dbias + task * a.width : nullptr;
  if constexpr (SUMS != Sums::kNone) clear(near_weight, a.width), clear(dweight, a.width);
  if constexpr (SUMS == Sums::kBoth) clear(near_bias, a.width), clear(dbias, a.width);
  const int64_t step = block_rows(a);
  BlockRow<H, D> rows[kBlockRows];
  int64_t blocks = 0;
  for (int64_t r = first; r < last; r += step) {
    const int count = int(smaller(step, last - r));
    bool aligned = a.stream;
    for (int k = 0; k < count; ++k) {
      BlockRow<H, D>& row = rows[k];
      row.h = (const H*)a.h.data + a.grid.offset(a.h.stride, r + k);
      row.dsum = a.dsum.data ? (const H*)a.dsum.data + a.grid.offset(a.dsum.stride, r + k) : nullptr;
      row.dx = a.dx.data ? (H*)a.dx.data + a.grid.offset(a.dx.stride, r + k) : nullptr;
      aligned &= uintptr_t(row.dx) % (kLanes * sizeof(H)) == 0;
      row.rstd = a.stats[r + k];
      if constexpr (!RMS) {
        row.mean = a.stats[a.grid.rows + r + k], row.rest = a.stats[2 * a.grid.rows + r + k];
      }
      const int64_t at_dy = a.grid.offset(a.dy.stride, r + k);
      row.dy = (const D*)a.dy.data + at_dy;
      if (a.dy.storage != a.h.storage) {
        float* wide = dys + k * a.width;
        with_row(a.dy, at_dy, [&](const auto* dy) {
          each_vector(a.width, [&](int64_t i, auto at) { at.store(wide + i, at.load(dy + i)); });
        });
        row.dy = (const D*)wide;
      }
      if (row.dx) row_means<RMS>(a, row);
    }
    if (aligned) norm_backward_block<RMS, SUMS>(a, rows, count, Streamed{}, near_weight, near_bias);
    else norm_backward_block<RMS, SUMS>(a, rows, count, Whole{}, near_weight, near_bias);
    if (SUMS == Sums::kNone || (++blocks % kNearBlocks != 0 && r + step < last)) continue;
    drain(near_weight, dweight, a.width);
    if (SUMS == Sums::kBoth) drain(near_bias, dbias, a.width);
  }
  if (a.stream) stream_fence();
}

template <class H, class D, bool RMS>
void norm_backward_rows(const NormBackwardArgs& a, int64_t task, float* scratch) {
  if (a.dbias) norm_backward_rows<H, D, RMS, Sums::kBoth>(a, task, scratch);
  else if (a.dweight) norm_backward_rows<H, D, RMS, Sums::kWeight>(a, task, scratch);
  else norm_backward_rows<H, D, RMS, Sums::kNone>(a, task, scratch);
}

template <class H>
void norm_backward_task(const NormBackwardArgs& a, int64_t task, void* memory) {
  float* scratch = (float*)memory;
  if (a.dy.storage == a.h.storage) {
    a.rms ? norm_backward_rows<H, H, true>(a, task, scratch)
          : norm_backward_rows<H, H, false>(a, task, scratch);
  } else {
    a.rms ? norm_backward_rows<H, float, true>(a, task, scratch)
          : norm_backward_rows<H, float, false>(a, task, scratch);
  }
}

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
