// CUDA bindings of softmax and the norms, forward and backward.
#include <tuple>

#include "../rows_call.h"
#include "bind.h"
#include "rows_args.cuh"

namespace fastattn::cuda {
namespace {

// A column number is 32 bits in a kernel, with room for the columns of a last, partial round.
constexpr int64_t kWidest = int64_t(1) << 30;

RowOperand operand(const Tensor& t, const char* name) { return {row_tensor(t, name), false}; }

// Whether threads read the rows of `t` a pack of `pack` elements at a time.
void align(RowOperand& t, const RowGrid& grid, int64_t element, int64_t width, int64_t pack) {
  const int64_t unit = std::min<int64_t>(16, pack * element);
  t.aligned = uintptr_t(t.data) % unit == 0 && width % pack == 0;
  for (int d = 0; d < grid.dims; ++d) {
    t.aligned &= grid.size[d] == 1 || t.stride[d] * element % unit == 0;
  }
}
int64_t bytes_of(Storage storage) { return storage == Storage::kFloat ? 4 : 2; }
void align(RowOperand& t, const RowGrid& grid, int64_t width, int64_t pack) {
  align(t, grid, bytes_of(t.storage), width, pack);
}
int64_t pack_of(const RowOperand& t) { return 16 / bytes_of(t.storage); }

void check_width(int64_t width) {
  STD_TORCH_CHECK(width <= kWidest, "fastattn: a row must have at most ", kWidest, " columns, got ", width);
}

RowOperand weight_operand(const Tensor& x, const OptionalTensor& t, int64_t width, int64_t pack,
                          const char* name) {
  if (!t) return {};
  check_device(x, *t, name);
  STD_TORCH_CHECK(t->numel() == width && t->is_contiguous(), "fastattn: ", name,
                  " must be contiguous and hold ", width, " numbers");
  RowOperand weight = operand(*t, name);
  align(weight, {}, width, pack);
  return weight;
}

// f with the storage types of two dtypes where the second is the first or float.
template <class F>
int with_types(Storage one, Storage other, const F& f) {
  const auto second = [&](auto first) {
    return other == Storage::kFloat ? f(first, float{}) : f(first, first);
  };
  if (one == Storage::kFloat) return f(float{}, float{});
  return one == Storage::kBFloat16 ? second(bf16{}) : second(fp16{});
}
template <class F>
int with_type(Storage storage, const F& f) {
  if (storage == Storage::kFloat) return f(float{});
  return storage == Storage::kBFloat16 ? f(bf16{}) : f(fp16{});
}

void run_softmax(const Tensor& x, int64_t dim, const OptionalTensor& mask, const OptionalTensor& bias,
                 double scale, bool causal, const Tensor& out) {
  check_device(x, out, "out"), check_device(x, mask, "mask"), check_device(x, bias, "bias");
  SoftmaxCall a{};
  set_softmax(a, x, dim, mask, bias, scale, causal, out);
  check_width(a.width);
  if (a.width == 0 || a.grid.rows == 0) return;
  const int64_t pack = pack_of(a.x);
  align(a.x, a.grid, a.width, pack), align(a.out, a.grid, a.width, pack);
  align(a.mask, a.grid, 1, a.width, pack), align(a.bias, a.grid, a.width, pack);
  const OnDevice device(x);
  check_launch(with_types(a.x.storage, a.out.storage,
                          [&](auto from, auto to) {
                            return softmax<decltype(from), decltype(to)>(a, device.stream());
                          }),
               "softmax");
}

Tensor softmax_fwd(const Tensor& x, int64_t dim, OptionalTensor mask, OptionalTensor bias, double scale,
                   bool causal, bool out_fp32) {
  Tensor out = new_on(x, x.sizes(), out_fp32 ? ScalarType::Float : x.scalar_type());
  run_softmax(x, dim, mask, bias, scale, causal, out);
  return out;
}

void softmax_out(const Tensor& x, int64_t dim, OptionalTensor mask, OptionalTensor bias, double scale,
                 bool causal, Tensor out) {
  run_softmax(x, dim, mask, bias, scale, causal, out);
}

// dbias comes as [rows of bias, width].
std::tuple<Tensor, Tensor> softmax_bwd(const Tensor& dy, const Tensor& y, int64_t dim, OptionalTensor bias,
                                       double scale, ScalarType x_dtype, std::vector<bool> needs) {
  check_device(y, dy, "dy"), check_device(y, bias, "bias");
  SoftmaxBackwardCall a{};
  const auto make = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
    return new_on(y, sizes, dtype);
  };
  const auto [dx, dbias, rows] = set_softmax_backward(a, dy, y, dim, bias, scale, x_dtype, needs, make);
  check_width(a.width);
  if (a.width == 0 || a.grid.rows == 0 || (!needs[0] && rows == 0)) return {dx, dbias};
  const int64_t pack = pack_of(a.y);
  align(a.y, a.grid, a.width, pack), align(a.dy, a.grid, a.width, pack), align(a.dx, a.grid, a.width, pack);
  Tensor dots = dbias, parts = dbias;
  if (rows > 0) {
    a.shared = a.grid.rows / rows;
    a.split = std::clamp<int64_t>(kParts / rows, 1, a.shared);
    a.dbias = operand(dbias, "dbias");
    dots = new_on(y, {a.grid.rows}, ScalarType::Float);
    a.dots = static_cast<float*>(dots.mutable_data_ptr());
    if (a.split > 1) {
      parts = new_on(y, {rows * a.split, a.width}, ScalarType::Float);
      a.parts = static_cast<float*>(parts.mutable_data_ptr());
    }
  }
  const OnDevice device(y);
  const auto launch = [&](auto from, auto to) {
    return softmax_backward<decltype(from), decltype(to)>(a, device.stream());
  };
  // y is x's dtype or float, so the pair is (dx, y) turned round.
  check_launch(with_types(a.dx.storage, a.y.storage, [&](auto to, auto from) { return launch(from, to); }),
               "softmax_backward");
  return {dx, dbias};
}

void run_norm(const Tensor& x, const Tensor* residual, const NormOptions& o, const Tensor& y,
              const Tensor* sum, float* stats) {
  check_device(x, y, "out");
  if (residual) check_device(x, *residual, "residual"), check_device(x, *sum, "sum");
  NormCall a{};
  set_norm(a, x, residual, o, y, sum);
  check_width(a.width);
  if (a.width == 0 || a.grid.rows == 0) return;
  const int64_t pack = pack_of(a.x);
  align(a.x, a.grid, a.width, pack), align(a.y, a.grid, a.width, pack);
  if (residual) align(a.residual, a.grid, a.width, pack), align(a.sum, a.grid, a.width, pack);
  a.weight = weight_operand(x, o.weight, a.width, pack, "weight");
  a.bias = weight_operand(x, o.bias, a.width, pack, "bias");
  a.weight_offset = float(o.weight_offset), a.stats = stats;
  const OnDevice device(x);
  check_launch(with_type(a.x.storage, [&](auto type) { return norm<decltype(type)>(a, device.stream()); }),
               "norm");
}

std::tuple<Tensor, Tensor> norm_fwd(const Tensor& x, int64_t row_dims, OptionalTensor weight,
                                    OptionalTensor bias, double eps, double weight_offset, bool rms) {
  Tensor y = new_on(x, x.sizes(), x.scalar_type());
  Tensor stats = new_on(x, stats_sizes(x, row_dims, rms), ScalarType::Float);
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
  Tensor y = new_on(x, x.sizes(), x.scalar_type()), sum = new_on(x, x.sizes(), sum_dtype);
  Tensor stats = new_on(x, stats_sizes(x, row_dims, rms), ScalarType::Float);
  run_norm(x, &residual, {row_dims, weight, bias, eps, weight_offset, rms}, y, &sum,
           static_cast<float*>(stats.mutable_data_ptr()));
  return {y, sum, stats};
}

void add_norm_out(const Tensor& x, const Tensor& residual, int64_t row_dims, OptionalTensor weight,
                  OptionalTensor bias, double eps, double weight_offset, bool rms, Tensor out,
                  Tensor sum_out) {
  run_norm(x, &residual, {row_dims, weight, bias, eps, weight_offset, rms}, out, &sum_out, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> norm_bwd(const Tensor& dy, OptionalTensor dsum, const Tensor& h,
                                            const Tensor& stats, int64_t row_dims, OptionalTensor weight,
                                            std::optional<ScalarType> bias_dtype, double weight_offset,
                                            bool rms, std::vector<bool> needs) {
  check_device(h, dy, "dy"), check_device(h, dsum, "dsum"), check_device(h, stats, "stats");
  NormBackwardCall a{};
  const auto make = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
    return new_on(h, sizes, dtype);
  };
  const auto [dx, dweight, dbias, sums_weight, sums_bias] =
      set_norm_backward(a, dy, dsum, h, stats, row_dims, weight, bias_dtype, rms, needs, make);
  check_width(a.width);
  if (a.width == 0 || a.grid.rows == 0) return {dx, dweight, dbias};
  a.weight_offset = float(weight_offset);
  const int64_t pack = pack_of(a.h);
  align(a.h, a.grid, a.width, pack), align(a.dy, a.grid, a.width, pack);
  if (dsum) align(a.dsum, a.grid, a.width, pack);
  if (needs[0]) align(a.dx, a.grid, a.width, pack);
  a.weight = weight_operand(h, weight, a.width, pack, "weight");
  a.groups = norm_groups(a.width);
  Tensor weight_parts = dweight, bias_parts = dbias;
  if (sums_weight) {
    a.dweight = operand(dweight, "dweight");
    weight_parts = new_on(h, {a.groups, a.width}, ScalarType::Float);
    a.weight_parts = static_cast<float*>(weight_parts.mutable_data_ptr());
  }
  if (sums_bias) {
    a.dbias = operand(dbias, "dbias");
    bias_parts = new_on(h, {a.groups, a.width}, ScalarType::Float);
    a.bias_parts = static_cast<float*>(bias_parts.mutable_data_ptr());
  }
  if (!needs[0] && !sums_weight && !sums_bias) return {dx, dweight, dbias};
  const OnDevice device(h);
  check_launch(
      with_type(a.h.storage, [&](auto type) { return norm_backward<decltype(type)>(a, device.stream()); }),
      "norm_backward");
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fastattn::cuda

STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FASTATTN_CUDA_KEY, m) {
  m.impl("softmax_fwd", TORCH_BOX(&fastattn::cuda::softmax_fwd));
  m.impl("softmax_out", TORCH_BOX(&fastattn::cuda::softmax_out));
  m.impl("softmax_bwd", TORCH_BOX(&fastattn::cuda::softmax_bwd));
  m.impl("norm_fwd", TORCH_BOX(&fastattn::cuda::norm_fwd));
  m.impl("norm_out", TORCH_BOX(&fastattn::cuda::norm_out));
  m.impl("add_norm_fwd", TORCH_BOX(&fastattn::cuda::add_norm_fwd));
  m.impl("add_norm_out", TORCH_BOX(&fastattn::cuda::add_norm_out));
  m.impl("norm_bwd", TORCH_BOX(&fastattn::cuda::norm_bwd));
}
