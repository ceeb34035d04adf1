// Softmax of rows: y = exp(s - max s) / sum, s = scale * x + bias over the visible columns, 0 elsewhere.
//
// A row is read once, chunk by chunk: each chunk's exponentials, relative to that chunk's own maximum, go to
// scratch, and the last pass scales them to the row's (the online softmax of Milakov and Gimelshein, with the
// rescaling put off to the end). A row too long for the cache is read again and its exponentials computed
// twice instead.
#pragma once

#include "math.h"
#include "rows.h"

namespace fastattn {
namespace {

FASTATTN_INLINE int64_t chunks_of(int64_t width) { return (width + kChunk - 1) / kChunk; }

struct SoftmaxScratch {
  float *weights, *scores, *tops, *sums, *gathered;

  static int64_t bytes(const SoftmaxArgs& a) {
    const bool gathers = a.x.column != 1 || a.out.column != 1;
    return 4 * (padded(a.width) + kChunk + 2 * padded(chunks_of(a.width)) + (gathers ? kLanes * a.width : 0));
  }
  SoftmaxScratch(const SoftmaxArgs& a, void* scratch) {
    weights = (float*)scratch;
    scores = weights + padded(a.width);
    tops = scores + kChunk;
    sums = tops + padded(chunks_of(a.width));
    gathered = sums + padded(chunks_of(a.width));
  }

 private:
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
};

template <class Out>
constexpr int kWeightDegree = 5;
template <>
constexpr int kWeightDegree<BFloat16> = 3;
template <>
constexpr int kWeightDegree<Half> = 4;

// e^(x - top), to the precision that Out can hold. The difference comes first: a product of its own would
// round where x is large, and overflow where x is the lowest number, a common way to write a mask.
template <class Out>
FASTATTN_INLINE F32 weight_of(F32 x, F32 top) {
  return exp2<kWeightDegree<Out>>((x - top) * splat(kLog2E));
}

template <class T, class Out>
class SoftmaxRow {
 public:
  SoftmaxRow(const SoftmaxArgs& a, const SoftmaxScratch& scratch) : a_(a), scratch_(scratch) {}

  // `row` places the mask and the bias; the columns from `seen` on are hidden.
  void run(const T* x, int64_t row, int64_t seen, Out* out) {
    x_ = x;
    mask_ = a_.mask.data ? (const uint8_t*)a_.mask.data + a_.grid.offset(a_.mask.stride, row) : nullptr;
    bias_ = a_.bias.data ? a_.grid.offset(a_.bias.stride, row) : 0;
    weights_ = scratch_.weights;
    if constexpr (sizeof(Out) == 4) {
      if (!a_.stream) weights_ = out;
    }
    const int64_t chunks = chunks_of(seen);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t from = c * kChunk, n = smaller(kChunk, seen - from);
      if (a_.scores()) first_pass<false>(scores(from, n), n, weights_ + from, out + from, c);
      else if (a_.ahead) first_pass<true>(x + from, n, weights_ + from, out + from, c);
      else first_pass<false>(x + from, n, weights_ + from, out + from, c);
    }
    const float top = max_of(chunks, [&](int64_t i, auto at) { return at.load(scratch_.tops + i); });
    if (!(top > -__builtin_inff())) return fill(out, seen);
    // From here on tops[c] is the factor of chunk c.
    double total = scratch_.sums[0];
    if (chunks > 1) {
      each_vector(chunks, [&](int64_t i, auto at) {
        at.store(scratch_.tops + i, weight_of<float>(at.load(scratch_.tops + i), splat(top)));
      });
      total = 0;
      for (int64_t c = 0; c < chunks; ++c) total += double(scratch_.sums[c]) * scratch_.tops[c];
    } else {
      scratch_.tops[0] = 1.f;
    }
    const double inverse = 1 / total;
    for (int64_t c = chunks - 1; c >= 0; --c) {  // the last chunks are still in the caches
      const int64_t from = c * kChunk, n = smaller(kChunk, seen - from);
      const F32 factor = splat(float(scratch_.tops[c] * inverse));
      const float* weights = weights_ + from;
      each_vector_to(out + from, n, a_.stream,
                     [&](int64_t i, auto at) { at.store(out + from + i, at.load(weights + i) * factor); });
    }
    put(out, seen, 0.f);
  }

  void put(Out* out, int64_t from, float value) {
    each_vector(a_.width - from, [&](int64_t i, auto at) { at.store(out + from + i, splat(value)); });
  }

 private:
  // scale * x + bias of n columns, -inf where hidden.
  const float* scores(int64_t from, int64_t n) {
    float* s = scratch_.scores;
    const F32 scale = splat(a_.scale), hidden = splat(-__builtin_inff());
    each_vector(n, [&](int64_t i, auto at) { at.store(s + i, at.load(x_ + from + i) * scale); });
    if (a_.bias.data) {
      with_row(a_.bias, bias_ + from, [&](const auto* bias) {
        each_vector(n, [&](int64_t i, auto at) {
          const F32 b = at.load(bias + i);
          at.store(s + i, select(splat(-__FLT_MAX__) > b, hidden, at.load(s + i) + b));
        });
      });
    }
    if (mask_) {
      const uint8_t* mask = mask_ + from;
      each_vector(n, [&](int64_t i, auto at) {
        at.store(s + i, select(at.nonzero(mask + i), at.load(s + i), hidden));
      });
    }
    return s;
  }

  // A chunk's largest score, and its weights relative to that with their sum. Between chunks memory would
  // stand still while the exponentials are computed, so what lies a chunk ahead, and the lines to write, are
  // asked for here.
  template <bool AHEAD, class S>
  FASTATTN_INLINE void first_pass(const S* s, int64_t n, float* weights, [[maybe_unused]] Out* out,
                                  int64_t chunk) {
    const float top = max_of(n, [&](int64_t i, auto at) { return at.load(s + i); });
    const F32 pivot = splat(top > -__builtin_inff() ? top : 0.f);
    scratch_.tops[chunk] = top;
    scratch_.sums[chunk] = sum_of(n, [&](int64_t i, auto at) {
      const F32 e = weight_of<Out>(at.load(s + i), pivot);
      if constexpr (AHEAD) {
        __builtin_prefetch(s + i + kChunk);
        if constexpr (sizeof(Out) == 2) __builtin_prefetch(out + i, 1);
      }
      at.store(weights + i, e);
      return e;
    });
  }

  // A row without a number above -inf: 0 where mask and bias hide all of it, else NaN, as in torch.
  void fill(Out* out, int64_t seen) {
    bool visible = false;
    for (int64_t j = 0; j < seen && !visible; ++j) {
      visible = !mask_ || mask_[j];
      if (visible && a_.bias.data) {
        with_row(a_.bias, bias_ + j, [&](const auto* b) { visible = !(as_float(*b) < -__FLT_MAX__); });
      }
    }
    put(out, 0, visible ? __builtin_nanf("") : 0.f);
  }

  const SoftmaxArgs& a_;
  const SoftmaxScratch& scratch_;
  const T* x_ = nullptr;
  const uint8_t* mask_ = nullptr;
  int64_t bias_ = 0;
  float* weights_ = nullptr;
};

// Rows of at most eight vectors stay in registers from the load to the store. Each waits for its maximum,
// then for its sum, so several go side by side, as many as the registers hold. Every sum has the order of
// SoftmaxRow's.
constexpr int kShortVectors = 8;
constexpr int kHeldVectors = kLanes == 8 ? 8 : 16;  // AVX2 has 16 registers, the others 32

template <class T, class Out, int VECTORS, int ROWS>
FASTATTN_INLINE void short_rows(const SoftmaxArgs& a, SoftmaxRow<T, Out>& kernel, int64_t first) {
  constexpr int kLast = (VECTORS - 1) * kLanes;
  const Part end{a.width - kLast};
  const T* x[ROWS];
  Out* out[ROWS];
  F32 e[ROWS][VECTORS], pivot[ROWS];
  bool empty[ROWS], any_empty = false;
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    x[r] = (const T*)a.x.data + a.grid.offset(a.x.stride, first + r);
    out[r] = (Out*)a.out.data + a.grid.offset(a.out.stride, first + r);
    const F32 least = splat(-__builtin_inff());
    F32 tops[4] = {least, least, least, least};
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) {
      e[r][i] = i + 1 < VECTORS ? load(x[r] + i * kLanes) : end.keep(end.load(x[r] + kLast), least);
      tops[i % 4] = max(e[r][i], tops[i % 4]);
    }
    const float top = reduce_max(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    pivot[r] = splat(top);
    any_empty |= empty[r] = !(top > -__builtin_inff());
  }
#pragma GCC unroll 8
  for (int i = 0; i < VECTORS; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) e[r][i] = weight_of<Out>(e[r][i], pivot[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    F32 sums[4] = {zero(), zero(), zero(), zero()};
#pragma GCC unroll 8
    for (int i = 0; i + 1 < VECTORS; ++i) sums[i % 4] = sums[i % 4] + e[r][i];
    const int at = end.n < kLanes ? 3 : (VECTORS - 1) % 4;  // where each_of_four adds what is left over
    sums[at] = sums[at] + e[r][VECTORS - 1];
    const F32 factor = splat(float(1 / double(reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])))));
#pragma GCC unroll 8
    for (int i = 0; i + 1 < VECTORS; ++i) store(out[r] + i * kLanes, e[r][i] * factor);
    end.store(out[r] + kLast, e[r][VECTORS - 1] * factor);
  }
  for (int r = 0; any_empty && r < ROWS; ++r) {
    if (empty[r]) kernel.put(out[r], 0, __builtin_nanf(""));  // as SoftmaxRow leaves it
  }
}

template <class T, class Out, int VECTORS = 1>
void short_rows(const SoftmaxArgs& a, SoftmaxRow<T, Out>& kernel, int64_t first, int64_t last) {
  if constexpr (VECTORS < kShortVectors) {
    if (a.width > VECTORS * kLanes) return short_rows<T, Out, VECTORS + 1>(a, kernel, first, last);
  }
  constexpr int kFitting = kHeldVectors / VECTORS, kRows = kFitting < 4 ? kFitting : 4;
  int64_t r = first;
  for (; r + kRows <= last; r += kRows) short_rows<T, Out, VECTORS, kRows>(a, kernel, r);
  for (; r < last; ++r) short_rows<T, Out, VECTORS, 1>(a, kernel, r);
}

template <class T, class Out>
void softmax_task(const SoftmaxArgs& a, int64_t task, void* memory) {
  const SoftmaxScratch scratch(a, memory);
  const int64_t first = task * a.rows_per_task, last = smaller(first + a.rows_per_task, a.grid.rows);
  if (a.x.column == 1 && a.out.column == 1) {
    SoftmaxRow<T, Out> kernel(a, scratch);
    if (a.width <= kShortVectors * kLanes && !(a.scores() || a.causal || a.stream)) {
      return short_rows(a, kernel, first, last);
    }
    for (int64_t r = first; r < last; ++r) {
      const int64_t seen = a.causal ? smaller(r % a.grid.size[a.grid.dims - 1] + 1, a.width) : a.width;
      kernel.run((const T*)a.x.data + a.grid.offset(a.x.stride, r), r, seen,
                 (Out*)a.out.data + a.grid.offset(a.out.stride, r));
    }
    if (a.stream) stream_fence();
    return;
  }
  SoftmaxRow<float, float> kernel(a, scratch);
  for (int64_t r = first; r < last; r += kLanes) {
    const T* x[kLanes];
    Out* out[kLanes];
    const int count = int(smaller(kLanes, last - r));
    for (int i = 0; i < count; ++i) {
      x[i] = (const T*)a.x.data + a.grid.offset(a.x.stride, r + i);
      out[i] = (Out*)a.out.data + a.grid.offset(a.out.stride, r + i);
    }
    gather_rows(x, count, a.x.column, a.width, scratch.gathered);
    for (int i = 0; i < count; ++i) {
      float* row = scratch.gathered + i * a.width;
      kernel.run(row, r + i, a.width, row);
    }
    scatter_rows(scratch.gathered, a.width, out, count, a.out.column);
  }
}

}  // namespace
}  // namespace fastattn
