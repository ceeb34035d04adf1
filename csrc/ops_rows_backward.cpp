// CPU bindings of the backward of softmax and the norms.
#include <tuple>

#include "cpu/targets/targets.h"
#include "parallel.h"
#include "rows_call.h"

namespace fastattn {
namespace {

// out [rows, width] = the sum of each row's parts, [rows, parts, width].
void add_parts(const RowKernels& table, const float* sums, int64_t rows, int64_t parts, int64_t width,
               const Tensor& out) {
  constexpr int64_t kColumns = 1024;
  const int64_t blocks = (width + kColumns - 1) / kColumns;
  const RowTensor to = row_tensor(out, "gradient");
  run_tasks(rows * blocks, 0, [&](int64_t task, void*) {
    const int64_t row = task / blocks, from = task % blocks * kColumns;
    RowTensor here = to;
    here.data = static_cast<char*>(to.data) + row * width * int64_t(out.element_size());
    table.add_parts(sums + row * parts * width, parts, width, from, std::min(from + kColumns, width), here);
  });
}

constexpr auto fresh = [](torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return new_tensor(sizes, dtype);
};

// dbias comes as [rows of bias, width].
std::tuple<Tensor, Tensor> softmax_bwd(const Tensor& dy, const Tensor& y, int64_t dim, OptionalTensor bias,
                                       double scale, ScalarType x_dtype, std::vector<bool> needs) {
  SoftmaxBackwardArgs a{};
  const auto [dx, dbias, rows] = set_softmax_backward(a, dy, y, dim, bias, scale, x_dtype, needs, fresh);
  if (a.width == 0 || a.grid.rows == 0) return {dx, dbias};
  a.stream = needs[0] && outgrow_last_cache({&dy, &y, &dx}) && !a.gathers();
  a.ahead = outgrows_caches(y);
  const RowKernels& table = kernels().rows;
  const SoftmaxBackwardTask task = table.softmax_backward[int(a.dx.storage)][a.y.storage == Storage::kFloat];
  int64_t tasks;
  Tensor parts = dbias;
  if (rows > 0) {
    a.shared = a.grid.rows / rows;
    a.parts = std::clamp<int64_t>(kParts / rows, 1, a.shared);
    tasks = rows * a.parts;
    if (a.parts > 1 || bias->scalar_type() != ScalarType::Float) {
      parts = new_tensor({tasks, a.width}, ScalarType::Float);
    }
    a.dbias = static_cast<float*>(parts.mutable_data_ptr());
  } else {
    a.rows_per_task = rows_per_task(a.width);
    tasks = (a.grid.rows + a.rows_per_task - 1) / a.rows_per_task;
  }
  run_tasks(tasks, table.softmax_backward_scratch(a), [&](int64_t i, void* scratch) { task(a, i, scratch); });
  if (rows > 0 && parts.get() != dbias.get()) add_parts(table, a.dbias, rows, a.parts, a.width, dbias);
  return {dx, dbias};
}

std::tuple<Tensor, Tensor, Tensor> norm_bwd(const Tensor& dy, OptionalTensor dsum, const Tensor& h,
                                            const Tensor& stats, int64_t row_dims, OptionalTensor weight,
                                            std::optional<ScalarType> bias_dtype, double weight_offset,
                                            bool rms, std::vector<bool> needs) {
  NormBackwardArgs a{};
  const auto [dx, dweight, dbias, sums_weight, sums_bias] =
      set_norm_backward(a, dy, dsum, h, stats, row_dims, weight, bias_dtype, rms, needs, fresh);
  if (a.width == 0 || a.grid.rows == 0) return {dx, dweight, dbias};
  a.stream = needs[0] && outgrow_last_cache({&dy, &h, &dx});
  a.ahead = outgrows_caches(h);
  const RowKernels& table = kernels().rows;
  Weight converted;
  a.weight =
      weight ? converted.get(weight, a.width, weight_offset, "weight", table) : converted.ones(a.width);
  const int64_t rows = a.grid.rows, per_task = rows_per_task(a.width);
  a.tasks = (rows + per_task - 1) / per_task;
  Tensor weight_parts = new_tensor({0}, ScalarType::Float), bias_parts = weight_parts;
  if (sums_weight || sums_bias) {
    // Eight rows to a part at least, so that the parts are small beside h. Their number depends on the shape
    // only.
    a.tasks = std::min({a.tasks, kParts, (rows + 7) / 8});
    weight_parts = new_tensor({a.tasks, a.width}, ScalarType::Float);
    a.dweight = static_cast<float*>(weight_parts.mutable_data_ptr());
    if (sums_bias) {
      bias_parts = new_tensor({a.tasks, a.width}, ScalarType::Float);
      a.dbias = static_cast<float*>(bias_parts.mutable_data_ptr());
    }
  }
  if (!needs[0] && !a.dweight) return {dx, dweight, dbias};
  const NormBackwardTask task = table.norm_backward[int(a.h.storage)];
  run_tasks(a.tasks, table.norm_backward_scratch(a), [&](int64_t i, void* scratch) { task(a, i, scratch); });
  if (sums_weight) add_parts(table, a.dweight, 1, a.tasks, a.width, dweight);
  if (sums_bias) add_parts(table, a.dbias, 1, a.tasks, a.width, dbias);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("softmax_bwd", TORCH_BOX(&fastattn::softmax_bwd));
  m.impl("norm_bwd", TORCH_BOX(&fastattn::norm_bwd));
}
