// Softmax and the norms as the CPU kernels see them: a grid of rows, and for each tensor its strides over
// that grid. Strides are in elements. No torch, no ownership.
#pragma once

#include "simd/types.h"

namespace fastattn {

constexpr int kGridDims = 8;

// The dimensions that are not the row's own, outermost first, merged where every tensor allows it.
struct RowGrid {
  int dims;
  int64_t size[kGridDims];
  int64_t rows;

  FASTATTN_INLINE int64_t offset(const int64_t* stride, int64_t row) const {
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += row % size[d] * stride[d];
      row /= size[d];
    }
    return at + row * stride[0];
  }
};

// data is null where the tensor is absent; a stride of 0 broadcasts.
struct RowTensor {
  void* data;
  Storage storage;
  int64_t stride[kGridDims];
  int64_t column;  // stride within a row
};

// softmax(scale * x + bias) over the visible columns of each row.
struct SoftmaxArgs {
  RowGrid grid;
  int64_t width, rows_per_task;
  RowTensor x, out;  // out: x's storage, or float
  RowTensor mask;    // bytes, column 1; 0 hides
  RowTensor bias;    // column 1; -inf hides
  float scale;
  bool causal;  // row i of the grid's last dimension sees columns 0..i; column strides are 1
  bool stream;  // out goes past the caches
  bool ahead;   // x comes from memory

  FASTATTN_INLINE int64_t tasks() const { return (grid.rows + rows_per_task - 1) / rows_per_task; }
  FASTATTN_INLINE bool scores() const { return mask.data || bias.data || scale != 1.f; }
};

// y = (h - mean) / sqrt(variance + eps) * weight + bias, or h / sqrt(mean square + eps) * weight, of h = x,
// or of h = x + residual rounded to sum's storage. Rows are contiguous.
struct NormArgs {
  RowGrid grid;
  int64_t width, rows_per_task;
  RowTensor x, residual, sum, y;  // y: x's storage; residual and sum: both or neither
  const float *weight, *bias;     // [width] or null; weight has its offset
  float* stats;                   // null, or [kNormStats or 1, rows]: what the backward needs
  double eps;
  bool rms, ahead;          // ahead: x comes from memory
  bool stream, stream_sum;  // y, and the sum, go past the caches

  FASTATTN_INLINE int64_t tasks() const { return (grid.rows + rows_per_task - 1) / rows_per_task; }
};

// LayerNorm keeps 1 / sqrt(variance + eps), the mean, and what rounding to float left of the mean; RMSNorm
// the first only.
constexpr int kNormStats = 3;

// ds = y * (dy - sum(dy * y)); dx = scale * ds; dbias = the sum of ds over the rows that share a row of bias.
struct SoftmaxBackwardArgs {
  RowGrid
      grid;  // with dbias: the dimensions that bias spans come first, so that rows sharing one are neighbours
  int64_t width, rows_per_task;
  RowTensor dy, y, dx;    // dy: y's storage, dx: that or y is float; dx may be absent
  float* dbias;           // null, or [bias rows, parts, width], a sum a task
  int64_t shared, parts;  // with dbias: rows to a row of bias, and tasks
  float scale;
  bool stream, ahead;

  FASTATTN_INLINE bool gathers() const { return dy.column != 1 || y.column != 1 || dx.column != 1; }
};

// See norm_backward.h. Rows are contiguous.
struct NormBackwardArgs {
  RowGrid grid;
  int64_t width, tasks;
  RowTensor dy, h, dsum, dx;  // h, dsum and dx have one storage; dsum and dx may be absent
  const float *weight, *stats;
  float *dweight, *dbias;  // null, or [tasks, width], a sum a task; dbias only with dweight
  bool rms, stream, ahead;
};

// Runs one task; `scratch` is 64-byte aligned, belongs to the calling thread and has the bytes asked for.
using SoftmaxTask = void (*)(const SoftmaxArgs&, int64_t task, void* scratch);
using NormTask = void (*)(const NormArgs&, int64_t task, void* scratch);
using SoftmaxBackwardTask = void (*)(const SoftmaxBackwardArgs&, int64_t task, void* scratch);
using NormBackwardTask = void (*)(const NormBackwardArgs&, int64_t task, void* scratch);

// Tasks are indexed by the Storage of x.
struct RowKernels {
  SoftmaxTask softmax[3][2];  // [.][1]: a float result
  int64_t (*softmax_scratch)(const SoftmaxArgs&);
  NormTask norm[3];
  int64_t (*norm_scratch)(const NormArgs&);
  SoftmaxBackwardTask softmax_backward[3][2];  // by the storage of dx; [.][1]: y is float
  int64_t (*softmax_backward_scratch)(const SoftmaxBackwardArgs&);
  NormBackwardTask norm_backward[3];  // by the storage of h
  int64_t (*norm_backward_scratch)(const NormBackwardArgs&);
  // n numbers plus an offset, as floats.
  void (*widen)(Storage, const void*, int64_t n, float offset, float* out);
  // Columns [from, to) of the sum of `count` rows of `width` numbers, added in their order.
  void (*add_parts)(const float* parts, int64_t count, int64_t width, int64_t from, int64_t to,
                    const RowTensor& out);
};

}  // namespace fastattn
