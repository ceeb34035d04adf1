// A linear layer of inference, fp32: y = activation(x W^T + bias).
//
// A task packs its rows of x, panels of 64 as [k][64], and reads its outputs' weights in place, each number
// broadcast: so weights come from memory in order, as the hardware prefetches it, and packing costs what 8
// outputs cost. (Weights packed, for x to be read in place, ran at 147 GFLOP/s with 128 rows, not at 172: the
// weights are cold.) The sums, [output][64 rows], are transposed on their way to y, where bias and activation
// join them. An output's sum over k takes the same steps whatever the task, so no row depends on the rows
// beside it.
#pragma once

#include "attention.h"
#include "linear_args.h"
#include "math.h"
#include "rows.h"

namespace fastattn {
namespace {

static_assert(kPanelRows == kGranule, "a panel is what the register tile has as lanes");

// The steps of k that one chain of roundings has; a sum of them all would be 3 times as wrong as oneDNN's at
// 3072.
constexpr int64_t kChain = 768;
// Those of a panel: a longer one would outgrow the second-level cache, from which every six outputs read it.
constexpr int64_t kPanelSteps = 5 * kChain;
static_assert(kSumOutputs % kTileRows == 0 && kSumOutputs % kLanes == 0, "whole tiles, whole vectors");

struct LinearBuffers {
  float *panels, *sums;

  static int64_t steps(const LinearArgs& a) { return smaller(a.K, kPanelSteps); }
  // Where k comes in pieces, all sums of a task wait for the last one.
  static int64_t sums_of_panel(const LinearArgs& a) {
    return kPanelRows * (a.K > kPanelSteps ? a.outputs_per_task : kSumOutputs);
  }
  static int64_t bytes(const LinearArgs& a) {
    const int64_t count = (a.rows_per_task + kPanelRows - 1) / kPanelRows;
    return 4 * count * (kPanelRows * steps(a) + sums_of_panel(a));
  }
  LinearBuffers(const LinearArgs& a, void* scratch)
      : panels((float*)scratch),
        sums(panels + (a.rows_per_task + kPanelRows - 1) / kPanelRows * kPanelRows * steps(a)) {}
};

template <Activation ACTIVATION>
FASTATTN_INLINE F32 activate(F32 x) {
  if constexpr (ACTIVATION == Activation::kRelu) return max(zero(), x);
  if constexpr (ACTIVATION == Activation::kGelu) return gelu(x);
  return x;
}

// sums [output][row] to y [row][output].
template <Activation ACTIVATION>
void finish(const float* sums, int64_t rows, int64_t outputs, const float* bias, float* y, int64_t y_row) {
  for (int64_t j = 0; j < outputs; j += kLanes) {
    const int64_t n = smaller(kLanes, outputs - j);
    const F32 b = bias ? load_n(bias + j, n) : zero();
    for (int64_t i = 0; i < rows; i += kLanes) {
      F32 r[kLanes];
      for (int k = 0; k < kLanes; ++k) r[k] = k < n ? load(sums + (j + k) * kPanelRows + i) : zero();
      transpose(r);
      for (int k = 0; k < kLanes && i + k < rows; ++k) {
        store_n(y + (i + k) * y_row + j, activate<ACTIVATION>(r[k] + b), n);
      }
    }
  }
}

void finish(const LinearArgs& a, const float* sums, int64_t row, int64_t rows, int64_t column,
            int64_t outputs) {
  const float* bias = a.bias ? a.bias + column : nullptr;
  float* y = a.y + row * a.N + column;
  switch (a.activation) {
    case Activation::kNone: return finish<Activation::kNone>(sums, rows, outputs, bias, y, a.N);
    case Activation::kRelu: return finish<Activation::kRelu>(sums, rows, outputs, bias, y, a.N);
    case Activation::kGelu: return finish<Activation::kGelu>(sums, rows, outputs, bias, y, a.N);
  }
}

// x's numbers [first, first + steps) of some rows as [k][64].
void pack_panel(const LinearArgs& a, int64_t row, int64_t rows, int64_t first, int64_t steps, float* panel) {
  const float* x = a.x + row * a.x_row + first;
  pack_transposed(int(rows), steps, panel,
                  [&](int i, int64_t k) { return load_n(x + i * a.x_row + k, steps - k); });
}

// The sums of some outputs of a panel over `steps` of k; `fresh`: no earlier steps are in `sums`. All of k
// for some weights before the next ones, so that they are read in the order of memory.
void add_products(Broadcast weight, int64_t outputs, int64_t steps, const float* panel, bool fresh,
                  int vectors, float* sums) {
  for (int64_t j = 0; j < outputs; j += kTileRows, sums += kTileRows * kPanelRows) {
    const int64_t rows = smaller(kTileRows, outputs - j);
    const char* data = weight.data + j * weight.row_bytes;
    int64_t k = 0;
    do {
      const Broadcast at{data + k * 4, weight.row_bytes, 4};
      const int64_t n = smaller(kChain, steps - k);
      if (fresh && k == 0) {
        product<FmaProduct, Start::kZero, false>(at, rows, n, panel, sums, 0, vectors);
      } else {
        product<FmaProduct, Start::kAdd, false>(at, rows, n, panel + k * kPanelRows, sums, 0, vectors);
      }
      k += n;
    } while (k < steps);
  }
}

// Rows whose packed numbers stay in the second-level cache: a quarter of it.
inline int64_t linear_rows_per_task(const LinearArgs& a) {
  const int64_t most = (int64_t(512) << 10) / (4 * kPanelRows * (a.K < 1 ? 1 : a.K));
  return kPanelRows * (most < 1 ? 1 : most > 8 ? 8 : most);
}

inline void linear_task(const LinearArgs& a, int64_t index, void* scratch) {
  const LinearBuffers buffers(a, scratch);
  const int64_t row = index / a.groups() * a.rows_per_task, begin = index % a.groups() * a.outputs_per_task;
  const int64_t last_row = smaller(a.M, row + a.rows_per_task),
                end = smaller(a.N, begin + a.outputs_per_task);
  const int64_t panel_floats = kPanelRows * LinearBuffers::steps(a);
  const int64_t sums_floats = LinearBuffers::sums_of_panel(a);
  int64_t first = 0;
  do {
    const int64_t steps = smaller(kPanelSteps, a.K - first), next = first + steps;
    float* panel = buffers.panels;
    for (int64_t r = row; r < last_row; r += kPanelRows, panel += panel_floats) {
      pack_panel(a, r, smaller(kPanelRows, last_row - r), first, steps, panel);
    }
    for (int64_t column = begin; column < end; column += kSumOutputs) {
      const int64_t outputs = smaller(kSumOutputs, end - column);
      const Broadcast weight{(const char*)(a.weight + column * a.weight_row + first), 4 * a.weight_row, 4};
      panel = buffers.panels;
      float* sums = buffers.sums + (a.K > kPanelSteps ? (column - begin) * kPanelRows : 0);
      for (int64_t r = row; r < last_row; r += kPanelRows, panel += panel_floats, sums += sums_floats) {
        const int64_t rows = smaller(kPanelRows, last_row - r);
        const int vectors = int((rows + kLanes - 1) / kLanes);
        add_products(weight, outputs, steps, panel, first == 0, vectors, sums);
        if (next >= a.K) finish(a, sums, r, rows, column, outputs);
      }
    }
    first = next;
  } while (first < a.K);
}

}  // namespace
}  // namespace fastattn
