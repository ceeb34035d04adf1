// CPU bindings of the backward of softmax and the norms.
#include <tuple>

#include "cpu/targets/targets.h"
#include "parallel.h"
#include "rows_call.h"

namespace fastattn {
namespace {

// At most this many partial sums of a gradient: enough for any number of threads to share the work, few
// enough to stay small beside what they sum.
constexpr int64_t kParts = 64;

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

Tensor nothing(ScalarType dtype) { return new_tensor({0}, dtype); }

// dbias comes as [rows of bias, width].
std::tuple<Tensor, Tensor> softmax_bwd(const Tensor& dy, const Tensor& y, int64_t dim, OptionalTensor bias,
                                       double scale, ScalarType x_dtype, std::vector<bool> needs) {
  const int64_t rank = y.dim();
  STD_TORCH_CHECK(
      dim >= 0 && dim < rank && dy.dim() == rank && needs.size() == 2,
      "fastattn: dy must have y's shape, dim be one of its dimensions, and needs have two entries");
  SoftmaxBackwardArgs a{};
  a.dy = row_tensor(dy, "dy"), a.y = row_tensor(y, "y");
  STD_TORCH_CHECK(dy.size(dim) == y.size(dim) && a.dy.storage == a.y.storage, "fastattn: dy must be like y");
  Tensor dx = needs[0] ? new_tensor(y.sizes(), x_dtype) : nothing(x_dtype);
  a.width = y.size(dim), a.scale = float(scale);
  a.dy.column = a.width > 1 ? dy.stride(dim) : 1, a.y.column = a.width > 1 ? y.stride(dim) : 1;
  a.dx.column = a.y.column;
  if (needs[0]) {
    a.dx = row_tensor(dx, "dx");
    a.dx.column = a.width > 1 ? dx.stride(dim) : 1;
    a.stream = is_large(dx) && !a.gathers();
  } else {
    a.dx.storage = storage_of(dx, "dx");
  }
  STD_TORCH_CHECK(a.y.storage == a.dx.storage || a.y.storage == Storage::kFloat,
                  "fastattn: y must be float32 or of x's dtype");
  const bool sums = needs[1] && bias;
  a.grid = make_grid({{&y, &a.y, "y"}, {&dy, &a.dy, "dy"}, {needs[0] ? &dx : nullptr, &a.dx, "dx"}}, dim,
                     dim + 1, false, sums ? &*bias : nullptr);
  const int64_t rows = sums && a.width > 0 ? bias->numel() / a.width : 0;
  Tensor dbias = sums ? new_tensor({rows, a.width}, bias->scalar_type()) : nothing(ScalarType::Float);
  if (a.width == 0 || a.grid.rows == 0) {
    torch::stable::zero_(dbias);
    return {dx, dbias};
  }
  a.ahead = outgrows_caches(y);
  const RowKernels& table = kernels().rows;
  const SoftmaxBackwardTask task = table.softmax_backward[int(a.dx.storage)][a.y.storage == Storage::kFloat];
  int64_t tasks;
  Tensor parts = dbias;
  if (sums) {
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
  if (sums && parts.get() != dbias.get()) add_parts(table, a.dbias, rows, a.parts, a.width, dbias);
  return {dx, dbias};
}

std::tuple<Tensor, Tensor, Tensor> norm_bwd(const Tensor& dy, OptionalTensor dsum, const Tensor& h,
                                            const Tensor& stats, int64_t row_dims, OptionalTensor weight,
                                            std::optional<ScalarType> bias_dtype, double weight_offset,
                                            bool rms, std::vector<bool> needs) {
  STD_TORCH_CHECK(row_dims >= 1 && row_dims <= h.dim() && dy.dim() == h.dim() && needs.size() == 3,
                  "fastattn: dy must have h's shape, row_dims fit it, and needs have three entries");
  NormBackwardArgs a{};
  a.dy = norm_tensor(dy, row_dims, "dy"), a.h = norm_tensor(h, row_dims, "h");
  if (dsum) {
    a.dsum = norm_tensor(*dsum, row_dims, "dsum");
    STD_TORCH_CHECK(a.dsum.storage == a.h.storage && dsum->dim() == h.dim(), "fastattn: dsum must be like h");
  }
  a.width = 1, a.rms = rms;
  for (int64_t d = h.dim() - row_dims; d < h.dim(); ++d) {
    STD_TORCH_CHECK(dy.size(d) == h.size(d) && (!dsum || dsum->size(d) == h.size(d)),
                    "fastattn: dy and dsum must have h's shape");
    a.width *= h.size(d);
  }
  const bool sums_weight = needs[1] && weight, sums_bias = needs[2] && bias_dtype && !rms;
  Tensor dx = needs[0] ? new_tensor(h.sizes(), h.scalar_type()) : nothing(h.scalar_type());
  if (needs[0]) {
    a.dx = norm_tensor(dx, row_dims, "dx");
    a.stream = is_large(dx);
  }
  const std::vector<int64_t> row_sizes(h.sizes().begin() + (h.dim() - row_dims), h.sizes().end());
  Tensor dweight = sums_weight ? new_tensor(row_sizes, weight->scalar_type()) : nothing(ScalarType::Float);
  Tensor dbias = sums_bias ? new_tensor(row_sizes, *bias_dtype) : nothing(ScalarType::Float);
  a.grid = make_grid({{&h, &a.h, "h"},
                      {&dy, &a.dy, "dy"},
                      {dsum ? &*dsum : nullptr, &a.dsum, "dsum"},
                      {needs[0] ? &dx : nullptr, &a.dx, "dx"}},
                     h.dim() - row_dims, h.dim());
  if (a.width == 0 || a.grid.rows == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dweight, dbias};
  }
  check_dtype(stats, ScalarType::Float, "stats", "float32");
  STD_TORCH_CHECK(stats.is_contiguous() && stats.numel() == (rms ? 1 : kNormStats) * a.grid.rows,
                  "fastattn: stats must be those of the forward");
  a.stats = static_cast<const float*>(stats.const_data_ptr());
  a.ahead = outgrows_caches(h);
  const RowKernels& table = kernels().rows;
  Weight converted;
  a.weight =
      weight ? converted.get(weight, a.width, weight_offset, "weight", table) : converted.ones(a.width);
  const int64_t rows = a.grid.rows, per_task = rows_per_task(a.width);
  a.tasks = (rows + per_task - 1) / per_task;
  Tensor weight_parts = nothing(ScalarType::Float), bias_parts = weight_parts;
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
