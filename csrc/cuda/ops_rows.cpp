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
  const int64_t rank = x.dim();
  STD_TORCH_CHECK(rank > 0 && dim >= 0 && dim < rank, "fastattn: dim must be in [0, ", rank, "), got ", dim);
  STD_TORCH_CHECK(
      !causal || (dim == rank - 1 && rank >= 2 && x.stride(dim) == 1 && out.stride(dim) == 1),
      "fastattn: a causal softmax runs along the last of two or more dimensions, whose stride is 1");
  check_device(x, out, "out"), check_device(x, mask, "mask"), check_device(x, bias, "bias");
  SoftmaxCall a{};
  a.x = operand(x, "x"), a.out = operand(out, "out");
  STD_TORCH_CHECK(a.out.storage == a.x.storage || a.out.storage == Storage::kFloat,
                  "fastattn: out must be float32 or x's dtype");
  a.width = x.size(dim), a.x.column = x.stride(dim), a.out.column = out.stride(dim);
  check_width(a.width);
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
    a.bias = operand(*bias, "bias");
    columns(*bias, "bias");
  }
  a.scale = float(scale), a.causal = causal;
  a.grid = make_grid({{&x, &a.x, "x"},
                      {&out, &a.out, "out"},
                      {mask ? &*mask : nullptr, &a.mask, "mask"},
                      {bias ? &*bias : nullptr, &a.bias, "bias"}},
                     dim, dim + 1, causal);
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

Tensor nothing(const Tensor& like, ScalarType dtype) { return new_on(like, {0}, dtype); }

// At most this many sums of the rows that share a row of bias: enough blocks where bias has few rows, and few
// enough to stay small beside what they add. The CPU's number, so that the sums are the same ones.
constexpr int64_t kParts = 64;

// dbias comes as [rows of bias, width].
std::tuple<Tensor, Tensor> softmax_bwd(const Tensor& dy, const Tensor& y, int64_t dim, OptionalTensor bias,
                                       double scale, ScalarType x_dtype, std::vector<bool> needs) {
  const int64_t rank = y.dim();
  STD_TORCH_CHECK(
      dim >= 0 && dim < rank && dy.dim() == rank && needs.size() == 2,
      "fastattn: dy must have y's shape, dim be one of its dimensions, and needs have two entries");
  check_device(y, dy, "dy"), check_device(y, bias, "bias");
  SoftmaxBackwardCall a{};
  a.dy = operand(dy, "dy"), a.y = operand(y, "y");
  STD_TORCH_CHECK(dy.size(dim) == y.size(dim) && a.dy.storage == a.y.storage, "fastattn: dy must be like y");
  Tensor dx = needs[0] ? new_on(y, y.sizes(), x_dtype) : nothing(y, x_dtype);
  a.width = y.size(dim), a.scale = float(scale);
  check_width(a.width);
  a.dy.column = a.width > 1 ? dy.stride(dim) : 1, a.y.column = a.width > 1 ? y.stride(dim) : 1;
  a.dx.storage = storage_of(dx, "dx");
  if (needs[0]) {
    a.dx = operand(dx, "dx");
    a.dx.column = a.width > 1 ? dx.stride(dim) : 1;
  }
  STD_TORCH_CHECK(a.y.storage == a.dx.storage || a.y.storage == Storage::kFloat,
                  "fastattn: y must be float32 or of x's dtype");
  const bool sums = needs[1] && bias;
  a.grid = make_grid({{&y, &a.y, "y"}, {&dy, &a.dy, "dy"}, {needs[0] ? &dx : nullptr, &a.dx, "dx"}}, dim,
                     dim + 1, false, sums ? &*bias : nullptr);
  const int64_t rows = sums && a.width > 0 ? bias->numel() / a.width : 0;
  Tensor dbias = sums ? new_on(y, {rows, a.width}, bias->scalar_type()) : nothing(y, ScalarType::Float);
  if (a.width == 0 || a.grid.rows == 0) {
    torch::stable::zero_(dbias);
    return {dx, dbias};
  }
  if (!needs[0] && !sums) return {dx, dbias};
  const int64_t pack = pack_of(a.y);
  align(a.y, a.grid, a.width, pack), align(a.dy, a.grid, a.width, pack), align(a.dx, a.grid, a.width, pack);
  Tensor dots = dbias, parts = dbias;
  if (sums) {
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
  check_device(x, y, "out");
  NormCall a{};
  a.x = {norm_tensor(x, o.row_dims, "x"), false}, a.y = {norm_tensor(y, o.row_dims, "y"), false};
  STD_TORCH_CHECK(a.y.storage == a.x.storage, "fastattn: y must have x's dtype");
  if (residual) {
    check_device(x, *residual, "residual"), check_device(x, *sum, "sum");
    a.residual = {norm_tensor(*residual, o.row_dims, "residual"), false};
    a.sum = {norm_tensor(*sum, o.row_dims, "sum"), false};
    for (int64_t d = 0; d < x.dim(); ++d) {
      STD_TORCH_CHECK(residual->dim() == x.dim() && residual->size(d) == x.size(d),
                      "fastattn: residual must have x's shape");
    }
  }
  a.width = 1;
  for (int64_t d = x.dim() - o.row_dims; d < x.dim(); ++d) a.width *= x.size(d);
  check_width(a.width);
  a.grid =
      make_grid({{&x, &a.x, "x"}, {residual, &a.residual, "residual"}, {sum, &a.sum, "sum"}, {&y, &a.y, "y"}},
                x.dim() - o.row_dims, x.dim());
  if (a.width == 0 || a.grid.rows == 0) return;
  const int64_t pack = pack_of(a.x);
  align(a.x, a.grid, a.width, pack), align(a.y, a.grid, a.width, pack);
  if (residual) align(a.residual, a.grid, a.width, pack), align(a.sum, a.grid, a.width, pack);
  a.weight = weight_operand(x, o.weight, a.width, pack, "weight");
  a.bias = weight_operand(x, o.bias, a.width, pack, "bias");
  a.weight_offset = float(o.weight_offset), a.eps = float(o.eps), a.rms = o.rms, a.stats = stats;
  const OnDevice device(x);
  check_launch(with_type(a.x.storage, [&](auto type) { return norm<decltype(type)>(a, device.stream()); }),
               "norm");
}

Tensor new_stats(const Tensor& x, int64_t row_dims, bool rms) {
  int64_t rows = 1;
  for (int64_t d = 0; d < x.dim() - row_dims; ++d) rows *= x.size(d);
  return new_on(x, {rms ? 1 : kNormStats, rows}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> norm_fwd(const Tensor& x, int64_t row_dims, OptionalTensor weight,
                                    OptionalTensor bias, double eps, double weight_offset, bool rms) {
  Tensor y = new_on(x, x.sizes(), x.scalar_type());
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
  Tensor y = new_on(x, x.sizes(), x.scalar_type()), sum = new_on(x, x.sizes(), sum_dtype);
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

std::tuple<Tensor, Tensor, Tensor> norm_bwd(const Tensor& dy, OptionalTensor dsum, const Tensor& h,
                                            const Tensor& stats, int64_t row_dims, OptionalTensor weight,
                                            std::optional<ScalarType> bias_dtype, double weight_offset,
                                            bool rms, std::vector<bool> needs) {
  STD_TORCH_CHECK(row_dims >= 1 && row_dims <= h.dim() && dy.dim() == h.dim() && needs.size() == 3,
                  "fastattn: dy must have h's shape, row_dims fit it, and needs have three entries");
  check_device(h, dy, "dy"), check_device(h, dsum, "dsum"), check_device(h, stats, "stats");
  NormBackwardCall a{};
  a.dy = {norm_tensor(dy, row_dims, "dy"), false}, a.h = {norm_tensor(h, row_dims, "h"), false};
  if (dsum) {
    a.dsum = {norm_tensor(*dsum, row_dims, "dsum"), false};
    STD_TORCH_CHECK(a.dsum.storage == a.h.storage && dsum->dim() == h.dim(), "fastattn: dsum must be like h");
  }
  a.width = 1, a.rms = rms, a.weight_offset = float(weight_offset);
  for (int64_t d = h.dim() - row_dims; d < h.dim(); ++d) {
    STD_TORCH_CHECK(dy.size(d) == h.size(d) && (!dsum || dsum->size(d) == h.size(d)),
                    "fastattn: dy and dsum must have h's shape");
    a.width *= h.size(d);
  }
  check_width(a.width);
  const bool sums_weight = needs[1] && weight, sums_bias = needs[2] && bias_dtype && !rms;
  Tensor dx = needs[0] ? new_on(h, h.sizes(), h.scalar_type()) : nothing(h, h.scalar_type());
  if (needs[0]) a.dx = {norm_tensor(dx, row_dims, "dx"), false};
  const std::vector<int64_t> row_sizes(h.sizes().begin() + (h.dim() - row_dims), h.sizes().end());
  Tensor dweight = sums_weight ? new_on(h, row_sizes, weight->scalar_type()) : nothing(h, ScalarType::Float);
  Tensor dbias = sums_bias ? new_on(h, row_sizes, *bias_dtype) : nothing(h, ScalarType::Float);
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
