// One linear layer as the CPU kernel sees it: pointers, shapes, strides in elements. No torch, no ownership.
#pragma once

#include <cstdint>

namespace fastattn {

// Rows of x that are packed together, and outputs whose sums are finished together, in the first-level cache.
// A task has whole ones of both, but at the ends of x and of the weight.
constexpr int64_t kPanelRows = 64, kSumOutputs = 48;

enum class Activation : int { kNone, kRelu, kGelu };

struct LinearArgs {
  uint64_t call;                   // differs from call to call, as in AttentionArgs
  const float *x, *weight, *bias;  // [M, K], [N, K], [N] or null; the columns are adjacent
  float* y;                        // [M, N], contiguous
  int64_t M, N, K, x_row, weight_row;
  Activation activation;
  int64_t rows_per_task, outputs_per_task;

  int64_t groups() const { return (N + outputs_per_task - 1) / outputs_per_task; }
  int64_t tasks() const { return groups() * ((M + rows_per_task - 1) / rows_per_task); }
};

using LinearTask = void (*)(const LinearArgs&, int64_t index, void* scratch);
using LinearScratch = int64_t (*)(const LinearArgs&);
using LinearRows = int64_t (*)(const LinearArgs&);  // to a task

}  // namespace fastattn
