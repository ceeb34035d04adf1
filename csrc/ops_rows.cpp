// CPU bindings of softmax and the norms.
#include <tuple>

#include "cpu/targets/targets.h"
#include "parallel.h"
#include "rows_call.h"

namespace fastattn {
namespace {

void run_softmax(const Tensor& x, int64_t dim, const OptionalTensor& mask, const OptionalTensor& bias,
                 double scale, bool causal, const Tensor& out) {
  const int64_t rank = x.dim();
  STD_TORCH_CHECK(rank > 0 && dim >= 0 && dim < rank, "fastattn: dim must be in [0, ", rank, "), got ", dim);
  STD_TORCH_CHECK(
      !causal || (dim == rank - 1 && rank >= 2 && x.stride(dim) == 1),
      "fastattn: a causal softmax runs along the last of two or more dimensions, whose stride is 1");
  SoftmaxArgs a{};
  a.x = row_tensor(x, "x"), a.out = row_tensor(out, "out");
  STD_TORCH_CHECK(a.out.storage == a.x.storage || a.out.storage == Storage::kFloat,
                  "fastattn: out must be float32 or x's dtype");
  a.width = x.size(dim), a.x.column = x.stride(dim), a.out.column = out.stride(dim);
  if (a.width == 1) a.x.column = a.out.column = 1;
  const auto columns = [&](const Tensor& t, const char* name) {
    const int64_t d = dim - (rank - t.dim());
    STD_TORCH_CHECK(d >= 0 && t.size(d) == a.width && (t.stride(d) == 1 || a.width <= 1), "fastattn: ", name,
                    " must have x's size along dim, with a stride of 1");
  };
  if (mask) {
    check_dtype(*mask, ScalarType::Bool, "mask", "bool");
    columns(*mask, "mask");
    a.mask.data = const_cast<void*>(mask->const_data_ptr());
  }
  if (bias) {
    a.bias = row_tensor(*bias, "bias");
    columns(*bias, "bias");
  }
  a.scale = float(scale), a.causal = causal;
  a.grid = make_grid({{&x, &a.x, "x"},
                      {&out, &a.out, "out"},
                      {mask ? &*mask : nullptr, &a.mask, "mask"},
                      {bias ? &*bias : nullptr, &a.bias, "bias"}},
                     dim, dim + 1, causal);
  if (a.width == 0) return;
  a.rows_per_task = rows_per_task(a.width);
  a.stream = is_large(out) && a.out.column == 1 && a.out.data != a.x.data;
  a.ahead = outgrows_caches(x);
  const RowKernels& table = kernels().rows;
  const SoftmaxTask task = table.softmax[int(a.x.storage)][a.out.storage == Storage::kFloat];
  run_tasks(a.tasks(), table.softmax_scratch(a), [&](int64_t i, void* scratch) { task(a, i, scratch); });
}

Tensor softmax_fwd(const Tensor& x, int64_t dim, OptionalTensor mask, OptionalTensor bias, double scale,
                   bool causal, bool out_fp32) {
  Tensor out = new_tensor(x.sizes(), out_fp32 ? ScalarType::Float : x.scalar_type());
  run_softmax(x, dim, mask, bias, scale, causal, out);
  return out;
}

void softmax_out(const Tensor& x, int64_t dim, OptionalTensor mask, OptionalTensor bias, double scale,
                 bool causal, Tensor out) {
  run_softmax(x, dim, mask, bias, scale, causal, out);
}

struct NormOptions {
  int64_t row_dims;
  const OptionalTensor &weight, &bias;
  double eps, weight_offset;
  bool rms;
};

void run_norm(const Tensor& x, const Tensor* residual, const NormOptions& o, const Tensor& y,
              const Tensor* sum, float* stats) {
  STD_TORCH_CHECK(o.row_dims >= 1 && o.row_dims <= x.dim(), "fastattn: row_dims must be in [1, ", x.dim(),
                  "], got ", o.row_dims);
  STD_TORCH_CHECK(!o.rms || !o.bias, "fastattn: an RMSNorm has no bias");
  NormArgs a{};
  a.x = norm_tensor(x, o.row_dims, "x"), a.y = norm_tensor(y, o.row_dims, "y");
  STD_TORCH_CHECK(a.y.storage == a.x.storage, "fastattn: y must have x's dtype");
  if (residual) {
    a.residual = norm_tensor(*residual, o.row_dims, "residual"), a.sum = norm_tensor(*sum, o.row_dims, "sum");
    for (int64_t d = 0; d < x.dim(); ++d) {
      STD_TORCH_CHECK(residual->dim() == x.dim() && residual->size(d) == x.size(d),
                      "fastattn: residual must have x's shape");
    }
  }
  a.width = 1;
  for (int64_t d = x.dim() - o.row_dims; d < x.dim(); ++d) a.width *= x.size(d);
  a.grid =
      make_grid({{&x, &a.x, "x"}, {residual, &a.residual, "residual"}, {sum, &a.sum, "sum"}, {&y, &a.y, "y"}},
                x.dim() - o.row_dims, x.dim());
  if (a.width == 0 || a.grid.rows == 0) return;
  a.rows_per_task = rows_per_task(a.width);
  a.eps = o.eps, a.rms = o.rms, a.stats = stats;
  const auto apart = [&](const void* out) { return out != a.x.data && out != a.residual.data; };
  a.ahead = outgrows_caches(x);
  a.stream = (is_large(y) || (sum && outgrow_last_cache({&x, residual, sum, &y}))) && apart(a.y.data) &&
             (!sum || apart(a.sum.data));
  const RowKernels& table = kernels().rows;
  Weight weight, bias;
  a.weight = weight.get(o.weight, a.width, o.weight_offset, "weight", table);
  a.bias = bias.get(o.bias, a.width, 0, "bias", table);
  if (a.bias && !a.weight) a.weight = weight.ones(a.width);
  const NormTask task = table.norm[int(a.x.storage)];
  run_tasks(a.tasks(), table.norm_scratch(a), [&](int64_t i, void* scratch) { task(a, i, scratch); });
}

Tensor new_stats(const Tensor& x, int64_t row_dims, bool rms) {
  int64_t rows = 1;
  for (int64_t d = 0; d < x.dim() - row_dims; ++d) rows *= x.size(d);
  return new_tensor({rms ? 1 : kNormStats, rows}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> norm_fwd(const Tensor& x, int64_t row_dims, OptionalTensor weight,
                                    OptionalTensor bias, double eps, double weight_offset, bool rms) {
  Tensor y = new_tensor(x.sizes(), x.scalar_type());
  Tensor stats = new_stats(x, row_dims, rms);
  run_norm(x, nullptr, {row_dims, weight, bias, eps, weight_offset, rms}, y, nullptr,
           static_cast<float*>(stats.mutable_data_ptr()));
  return {y, stats};
}

void norm_out(const Tensor& x, int64_t row_dims, OptionalTensor weight, OptionalTensor bias, double eps,
              double weight_offset, bool rms, Tensor out) {
  run_norm(x, nullptr, {row_dims, weight, bias, eps, weight_offset, rms}, out, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> add_norm_fwd(const Tensor& x, const Tensor& residual, int64_t row_dims,
                                                OptionalTensor weight, OptionalTensor bias, double eps,
                                                double weight_offset, bool rms, ScalarType sum_dtype) {
  Tensor y = new_tensor(x.sizes(), x.scalar_type()), sum = new_tensor(x.sizes(), sum_dtype);
  Tensor stats = new_stats(x, row_dims, rms);
  run_norm(x, &residual, {row_dims, weight, bias, eps, weight_offset, rms}, y, &sum,
           static_cast<float*>(stats.mutable_data_ptr()));
  return {y, sum, stats};
}

void add_norm_out(const Tensor& x, const Tensor& residual, int64_t row_dims, OptionalTensor weight,
                  OptionalTensor bias, double eps, double weight_offset, bool rms, Tensor out,
                  Tensor sum_out) {
  run_norm(x, &residual, {row_dims, weight, bias, eps, weight_offset, rms}, out, &sum_out, nullptr);
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&fastattn::softmax_fwd));
  m.impl("softmax_out", TORCH_BOX(&fastattn::softmax_out));
  m.impl("norm_fwd", TORCH_BOX(&fastattn::norm_fwd));
  m.impl("norm_out", TORCH_BOX(&fastattn::norm_out));
  m.impl("add_norm_fwd", TORCH_BOX(&fastattn::add_norm_fwd));
  m.impl("add_norm_out", TORCH_BOX(&fastattn::add_norm_out));
}
