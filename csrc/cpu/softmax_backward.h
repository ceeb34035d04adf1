// Backward of softmax, from its result:
//
//   ds = y * (dy - sum(dy * y)),   dx = scale * ds
//   dbias = the sum of ds over the rows that share a row of bias
//
// A row that mask and bias emptied has y = 0, and so a gradient of 0. The rows of one bias row are summed by
// a number of tasks that depends on shapes only, and those sums are added in order.
#pragma once

#include "rows.h"

namespace fastattn {
namespace {

// Y: of y and dy. X: of dx.
template <class Y, class X>
FASTATTN_INLINE void softmax_backward_row(const SoftmaxBackwardArgs& a, const Y* dy, const Y* y, X* dx,
                                          float* sums) {
  double total = 0;
  for (int64_t from = 0; from < a.width; from += kChunk) {
    F32 s[4] = {zero(), zero(), zero(), zero()};
    each_of_four(smaller(kChunk, a.width - from), s, [&](int64_t i, F32 acc, auto at) {
      if (a.ahead) {
        __builtin_prefetch(dy + from + i + kChunk);
        __builtin_prefetch(y + from + i + kChunk);
        if (dx && !a.stream) __builtin_prefetch(dx + from + i, 1);
      }
      return fma(at.load(dy + from + i), at.load(y + from + i), acc);
    });
    total += reduce_add((s[0] + s[1]) + (s[2] + s[3]));
  }
  const F32 dot = splat(float(total)), scale = splat(a.scale);
  if (sums) {
    each_vector(a.width, [&](int64_t i, auto at) {
      at.store(sums + i, fma(at.load(y + i), at.load(dy + i) - dot, at.load(sums + i)));
    });
  }
  if (dx) {
    each_vector_to(dx, a.width, a.stream, [&](int64_t i, auto at) {
      at.store(dx + i, at.load(y + i) * (at.load(dy + i) - dot) * scale);
    });
  }
}

template <class Y, class X>
void softmax_backward_task(const SoftmaxBackwardArgs& a, int64_t task, void* scratch) {
  int64_t first, last;
  float* sums = nullptr;
  if (a.dbias) {
    const int64_t row = task / a.parts, part = task % a.parts;
    first = row * a.shared + part * a.shared / a.parts,
    last = row * a.shared + (part + 1) * a.shared / a.parts;
    sums = a.dbias + task * a.width;
    each_vector(a.width, [&](int64_t i, auto at) { at.store(sums + i, zero()); });
  } else {
    first = task * a.rows_per_task, last = smaller(first + a.rows_per_task, a.grid.rows);
  }
  const auto at = [&](const RowTensor& t, int64_t row) { return t.data ? a.grid.offset(t.stride, row) : 0; };
  if (!a.gathers()) {
    for (int64_t r = first; r < last; ++r) {
      X* dx = a.dx.data ? (X*)a.dx.data + at(a.dx, r) : nullptr;
      softmax_backward_row(a, (const Y*)a.dy.data + at(a.dy, r), (const Y*)a.y.data + at(a.y, r), dx, sums);
    }
    if (a.stream) stream_fence();
    return;
  }
  float *dys = (float*)scratch, *ys = dys + kLanes * a.width;
  for (int64_t r = first; r < last; r += kLanes) {
    const Y *dy[kLanes], *y[kLanes];
    X* dx[kLanes];
    const int count = int(smaller(kLanes, last - r));
    for (int i = 0; i < count; ++i) {
      dy[i] = (const Y*)a.dy.data + at(a.dy, r + i), y[i] = (const Y*)a.y.data + at(a.y, r + i);
      dx[i] = (X*)a.dx.data + at(a.dx, r + i);
    }
    gather_rows(dy, count, a.dy.column, a.width, dys);
    gather_rows(y, count, a.y.column, a.width, ys);
    for (int i = 0; i < count; ++i) {
      float* row = dys + i * a.width;
      softmax_backward_row(a, (const float*)row, (const float*)ys + i * a.width, a.dx.data ? row : nullptr,
                           sums);
    }
    if (a.dx.data) scatter_rows(dys, a.width, dx, count, a.dx.column);
  }
}

inline int64_t softmax_backward_scratch(const SoftmaxBackwardArgs& a) {
  return a.gathers() ? 2 * 4 * kLanes * a.width : 0;
}

}  // namespace
}  // namespace fastattn
