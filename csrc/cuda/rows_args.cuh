// Softmax and the norms as the CUDA kernels see them, and the functions that launch them. The grid of rows
// and the strides over it are the CPU kernels' (csrc/cpu/rows_args.h). No torch, no CUDA headers, no
// ownership.
#pragma once

#include "../cpu/rows_args.h"
#include "types.h"

namespace fastattn::cuda {

// A tensor of rows. `aligned`: every row begins, and the width is, a multiple of what a thread reads at a
// time.
struct RowOperand : RowTensor {
  bool aligned;
};

// softmax(scale * x + bias) over the visible columns of each row.
struct SoftmaxCall {
  RowGrid grid;
  int64_t width;
  RowOperand x, out;  // out: x's storage, or float
  RowOperand mask;    // bytes, column 1; 0 hides
  RowOperand bias;    // column 1; -inf hides
  float scale;
  bool causal;  // row i of the grid's last dimension sees columns 0..i; column strides are 1
};

// ds = y * (dy - sum(dy * y)); dx = scale * ds; dbias = the sum of ds over the rows that share a row of bias.
struct SoftmaxBackwardCall {
  RowGrid
      grid;  // with dbias: the dimensions that bias spans come first, so that rows sharing one are neighbours
  int64_t width;
  RowOperand dy, y, dx;  // dy: y's storage, dx: that or y is float; dx may be absent
  float scale;
  float* dots;            // null, or [rows]: sum(dy * y), which dbias needs
  RowOperand dbias;       // absent, or contiguous [bias rows, width]
  float* parts;           // [bias rows, split, width] where split > 1
  int64_t shared, split;  // with dbias: rows to a row of bias, and into how many sums they are split
};

// y = (h - mean) / sqrt(variance + eps) * (weight + offset) + bias, or h / sqrt(mean square + eps) * (weight
// + offset), of h = x, or of h = x + residual rounded to sum's storage. Rows are contiguous.
struct NormCall {
  RowGrid grid;
  int64_t width;
  RowOperand x, residual, sum, y;  // y: x's storage; residual and sum: both or neither
  RowOperand weight, bias;         // [width]; each may be absent
  float weight_offset, eps;
  float* stats;  // null, or [kNormStats or 1, rows]: what the backward needs
  bool rms;
};

// See norm_backward.cuh. Rows are contiguous.
struct NormBackwardCall {
  RowGrid grid;
  int64_t width;
  RowOperand dy, h, dsum, dx;  // h, dsum and dx have one storage; dsum and dx may be absent
  RowOperand weight;           // [width], or absent
  RowOperand dweight, dbias;   // [width] results; each may be absent
  float weight_offset;
  const float* stats;
  float *weight_parts, *bias_parts;  // [groups, width] each, for the results that are asked for
  int64_t groups;                    // norm_groups(width)
  bool rms;
};

// Into how many sums the rows are split for the gradients of weights. Of the width only, so that no result
// depends on the card; more where rows are short, so that a few short rows a block keep the memory busy.
inline int64_t norm_groups(int64_t width) { return width <= 1024 ? 1024 : width <= 4096 ? 512 : 256; }

// Each returns 0, or the CUDA error of a launch. X is x's or h's storage type, Out that of softmax's result,
// Y of softmax's result in its backward.
template <class X, class Out>
int softmax(const SoftmaxCall& a, void* stream);
template <class Y, class X>
int softmax_backward(const SoftmaxBackwardCall& a, void* stream);
template <class X>
int norm(const NormCall& a, void* stream);
template <class H>
int norm_backward(const NormBackwardCall& a, void* stream);

}  // namespace fastattn::cuda
