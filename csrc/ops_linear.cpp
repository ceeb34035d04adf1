// CPU binding of a linear layer of inference.
#include <algorithm>
#include <string>
#include <vector>

#include "cpu/targets/targets.h"
#include "parallel.h"
#include "results.h"

namespace fastattn {
namespace {

// To a task: for fewer, packing x would cost more than 4 %; more gain nothing, and sums over long rows take
// memory.
constexpr int64_t kLeastOutputs = 192, kMostOutputs = 1536;

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  STD_TORCH_CHECK(name == "gelu", "fastattn: activation must be \"none\", \"relu\" or \"gelu\", got \"", name,
                  "\"");
  return Activation::kGelu;
}

void check(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_dtype(x, ScalarType::Float, "x", "float32");
  check_dtype(weight, ScalarType::Float, "weight", "float32");
  STD_TORCH_CHECK(x.dim() >= 1, "fastattn: x must have a dimension or more, got a scalar");
  STD_TORCH_CHECK(weight.dim() == 2, "fastattn: weight must have 2 dimensions, got ", weight.dim());
  STD_TORCH_CHECK(weight.size(1) == x.size(-1), "fastattn: weight must have x's last size ", x.size(-1),
                  " as its own, got ", weight.size(1));
  if (!bias) return;
  check_dtype(*bias, ScalarType::Float, "bias", "float32");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "fastattn: bias must be of size [",
                  weight.size(0), "], got ", bias->dim(), " dimensions, ", bias->numel(), " numbers");
}

// The stride of a tensor's rows where they have one and their columns are adjacent; else -1.
int64_t row_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1) return -1;
  int64_t stride = 0, rows = 1;  // of the dimensions so far, from the last to the first
  for (int64_t d = last - 1; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (rows == 1) stride = x.stride(d);
    if (x.stride(d) != stride * rows) return -1;
    rows *= x.size(d);
  }
  return stride;
}

// The same numbers with a stride of rows.
Tensor in_rows(const Tensor& t, int64_t* stride) {
  *stride = row_stride(t);
  if (*stride >= 0) return t;
  *stride = t.size(t.dim() - 1);
  return torch::stable::contiguous(t);
}

// Outputs enough for every thread. A result depends on no size of tasks.
void set_tasks(LinearArgs& a, int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  a.rows_per_task = rows;
  const int64_t blocks = (a.M + a.rows_per_task - 1) / a.rows_per_task;
  const int64_t groups = threads > 1 ? (4 * threads + blocks - 1) / blocks : 1;
  const int64_t outputs = std::clamp((a.N + groups - 1) / groups, kLeastOutputs, kMostOutputs);
  // Whole chunks of 48 outputs for the vectors, and of 32 for the tiles.
  a.outputs_per_task = (outputs + 2 * kSumOutputs - 1) / (2 * kSumOutputs) * (2 * kSumOutputs);
}

Tensor linear_fwd(const Tensor& x, const Tensor& weight, OptionalTensor bias, std::string activation) {
  LinearArgs a{};
  a.activation = activation_of(activation);
  check(x, weight, bias);
  a.K = x.size(-1), a.N = weight.size(0);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = a.N;
  Tensor y = new_tensor(sizes, ScalarType::Float);
  if (y.numel() == 0) return y;
  a.M = y.numel() / a.N;
  const Tensor rows = in_rows(x, &a.x_row), weights = in_rows(weight, &a.weight_row);
  a.x = static_cast<const float*>(rows.const_data_ptr());
  a.weight = static_cast<const float*>(weights.const_data_ptr());
  if (bias) {
    int64_t only_row;
    bias = in_rows(*bias, &only_row);
    a.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  a.y = static_cast<float*>(y.mutable_data_ptr());
  a.call = next_call();
  const KernelTable& table = kernels();
  set_tasks(a, table.linear_rows(a));
  run_tasks(
      a.tasks(), table.linear_scratch(a), [&](int64_t i, void* scratch) { table.linear(a, i, scratch); },
      a.groups());
  return y;
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("linear_fwd", TORCH_BOX(&fastattn::linear_fwd)); }
