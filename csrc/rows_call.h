// From tensors to the arguments of the row kernels.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "bind.h"
#include "cpu/rows_args.h"
#include "results.h"

namespace fastattn {

// Elements of a task: some microseconds of work, so that small calls stay on one thread.
constexpr int64_t kTaskElements = 32768;

inline int64_t bytes_of(const Tensor& t) { return t.numel() * int64_t(t.element_size()); }

inline int64_t rows_per_task(int64_t width) {
  return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(width, 1));
}

struct GridTensor {
  const Tensor* tensor;  // right-aligned with the first; null: absent
  RowTensor* row;
  const char* name;
};

// Fills in the grid of the first tensor's dimensions but [row_begin, row_end), and every tensor's strides
// over it. A dimension is merged into the one before it where all strides allow it; keep_last keeps the last
// one apart. The dimensions that `leader` does not span, if there is one, come last.
inline RowGrid make_grid(std::initializer_list<GridTensor> tensors, int64_t row_begin, int64_t row_end,
                         bool keep_last = false, const Tensor* leader = nullptr) {
  const Tensor& x = *tensors.begin()->tensor;
  RowGrid grid{};
  grid.rows = 1;
  const int64_t rank = x.dim(), last = row_end == rank ? row_begin - 1 : rank - 1;
  std::vector<int64_t> order;
  const auto spans = [&](int64_t d) {
    const int64_t at = leader ? d - (rank - leader->dim()) : -1;
    return at >= 0 && leader->size(at) > 1;
  };
  for (const bool spanned : {true, false}) {
    for (int64_t d = 0; d < rank; ++d) {
      if ((d < row_begin || d >= row_end) && spans(d) == spanned) order.push_back(d);
    }
  }
  for (const int64_t d : order) {
    const int64_t size = x.size(d);
    grid.rows *= size;
    const bool apart = keep_last && d == last;
    if (size == 1 && !apart) continue;
    bool merges = grid.dims > 0 && !apart;
    int64_t strides[8], k = 0;
    for (const GridTensor& g : tensors) {
      if (!g.tensor) continue;
      const int64_t at = d - (rank - g.tensor->dim());
      strides[k] = at < 0 ? 0 : broadcast_stride(*g.tensor, at, size, g.name);
      merges &= g.row->stride[std::max(grid.dims - 1, 0)] == strides[k++] * size;
    }
    const int to = merges ? grid.dims - 1 : grid.dims++;
    STD_TORCH_CHECK(to < kGridDims, "fastattn: more than ", kGridDims, " dimensions of rows");
    grid.size[to] = merges ? grid.size[to] * size : size;
    k = 0;
    for (const GridTensor& g : tensors) {
      if (g.tensor) g.row->stride[to] = strides[k++];
    }
  }
  if (grid.dims == 0) grid.dims = 1, grid.size[0] = 1;
  return grid;
}

inline RowTensor row_tensor(const Tensor& t, const char* name) {
  return {const_cast<void*>(t.const_data_ptr()), storage_of(t, name), {}, 1};
}

// A backend's operand may hold more than the tensor.
inline void set_row(RowTensor& to, const RowTensor& from) { to = from; }

// The stride along a row; 1 where there is one column at most.
inline int64_t column_stride(const Tensor& t, int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 1; }

constexpr int64_t kLastCache = int64_t(32) << 20;

// What an operation reads and writes, in bytes.
inline int64_t traffic_of(std::initializer_list<const Tensor*> tensors) {
  int64_t bytes = 0;
  for (const Tensor* t : tensors)
    if (t) bytes += bytes_of(*t);
  return bytes;
}

// Whether results are stored past the caches: where the traffic is half of a last cache or more, its lines
// seldom wait there for who reads them, and a line that is written in a cache is read first. 4096 x 768 in
// fp32 between other work: RMSNorm 1.4 ms, not 2.1; LayerNorm and GELU after it take no longer.
inline bool outgrow_last_cache(std::initializer_list<const Tensor*> tensors) {
  return traffic_of(tensors) >= kLastCache / 2;
}

// Whether a tensor outgrows the second-level caches, so that its lines are worth asking for ahead.
inline bool outgrows_caches(const Tensor& t) { return bytes_of(t) >= int64_t(1) << 20; }

// A weight as the kernels want it, float with its offset; null where it is absent.
class Weight {
 public:
  const float* get(const OptionalTensor& t, int64_t width, double offset, const char* name,
                   const RowKernels& table) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->numel() == width && t->is_contiguous(), "fastattn: ", name,
                    " must be contiguous and hold ", width, " numbers");
    const Storage storage = storage_of(*t, name);
    if (storage == Storage::kFloat && offset == 0) return static_cast<const float*>(t->const_data_ptr());
    converted_.resize(width);
    table.widen(storage, t->const_data_ptr(), width, float(offset), converted_.data());
    return converted_.data();
  }
  const float* ones(int64_t width) {
    converted_.assign(width, 1.f);
    return converted_.data();
  }

 private:
  std::vector<float> converted_;
};

inline RowTensor norm_tensor(const Tensor& t, int64_t row_dims, const char* name) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= t.dim() - row_dims; --d) {
    STD_TORCH_CHECK(t.stride(d) == expected || t.size(d) <= 1 || t.numel() == 0,
                    "fastattn: the normalized dimensions of ", name, " must be contiguous");
    expected *= t.size(d);
  }
  return row_tensor(t, name);
}

// The arguments of a softmax that every backend has, checked; Args is a backend's own. Rows of `out` may be
// those of x.
template <class Args>
void set_softmax(Args& a, const Tensor& x, int64_t dim, const OptionalTensor& mask,
                 const OptionalTensor& bias, double scale, bool causal, const Tensor& out) {
  const int64_t rank = x.dim();
  STD_TORCH_CHECK(rank > 0 && dim >= 0 && dim < rank, "fastattn: dim must be in [0, ", rank, "), got ", dim);
  STD_TORCH_CHECK(
      !causal || (dim == rank - 1 && rank >= 2 && x.stride(dim) == 1 && out.stride(dim) == 1),
      "fastattn: a causal softmax runs along the last of two or more dimensions, whose stride is 1");
  set_row(a.x, row_tensor(x, "x")), set_row(a.out, row_tensor(out, "out"));
  STD_TORCH_CHECK(a.out.storage == a.x.storage || a.out.storage == Storage::kFloat,
                  "fastattn: out must be float32 or x's dtype");
  a.width = x.size(dim);
  a.x.column = column_stride(x, dim), a.out.column = column_stride(out, dim);
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
    set_row(a.bias, row_tensor(*bias, "bias"));
    columns(*bias, "bias");
  }
  a.scale = float(scale), a.causal = causal;
  a.grid = make_grid({{&x, &a.x, "x"},
                      {&out, &a.out, "out"},
                      {mask ? &*mask : nullptr, &a.mask, "mask"},
                      {bias ? &*bias : nullptr, &a.bias, "bias"}},
                     dim, dim + 1, causal);
}

// At most this many partial sums of a gradient, where rows share it: enough for any number of threads or
// multiprocessors, few enough to stay small beside what they sum.
constexpr int64_t kParts = 64;

// What softmax's backward gives; dbias as [bias_rows, width]. Each may be of no elements: not asked for.
struct SoftmaxGradients {
  Tensor dx, dbias;
  int64_t bias_rows;  // 0: no dbias
};

// The same of softmax's backward, with fresh results by make(sizes, dtype). Where there is nothing to sum,
// they are finished.
template <class Args, class Make>
SoftmaxGradients set_softmax_backward(Args& a, const Tensor& dy, const Tensor& y, int64_t dim,
                                      const OptionalTensor& bias, double scale, ScalarType x_dtype,
                                      const std::vector<bool>& needs, const Make& make) {
  const int64_t rank = y.dim();
  STD_TORCH_CHECK(
      dim >= 0 && dim < rank && dy.dim() == rank && needs.size() == 2,
      "fastattn: dy must have y's shape, dim be one of its dimensions, and needs have two entries");
  set_row(a.dy, row_tensor(dy, "dy")), set_row(a.y, row_tensor(y, "y"));
  STD_TORCH_CHECK(dy.size(dim) == y.size(dim) && a.dy.storage == a.y.storage, "fastattn: dy must be like y");
  Tensor dx = needs[0] ? make(y.sizes(), x_dtype) : make({0}, x_dtype);
  a.width = y.size(dim), a.scale = float(scale);
  a.dy.column = column_stride(dy, dim), a.y.column = a.dx.column = column_stride(y, dim);
  a.dx.storage = storage_of(dx, "dx");
  if (needs[0]) {
    set_row(a.dx, row_tensor(dx, "dx"));
    a.dx.column = column_stride(dx, dim);
  }
  STD_TORCH_CHECK(a.y.storage == a.dx.storage || a.y.storage == Storage::kFloat,
                  "fastattn: y must be float32 or of x's dtype");
  const bool sums = needs[1] && bias;
  a.grid = make_grid({{&y, &a.y, "y"}, {&dy, &a.dy, "dy"}, {needs[0] ? &dx : nullptr, &a.dx, "dx"}}, dim,
                     dim + 1, false, sums ? &*bias : nullptr);
  const int64_t rows = sums && a.width > 0 ? bias->numel() / a.width : 0;
  Tensor dbias = sums ? make({rows, a.width}, bias->scalar_type()) : make({0}, ScalarType::Float);
  if (a.width == 0 || a.grid.rows == 0) torch::stable::zero_(dbias);
  return {dx, dbias, rows};
}

// The arguments of a norm that every backend has but its weights.
struct NormOptions {
  int64_t row_dims;
  const OptionalTensor &weight, &bias;
  double eps, weight_offset;
  bool rms;
};

inline int64_t row_width(const Tensor& x, int64_t row_dims) {
  int64_t width = 1;
  for (int64_t d = x.dim() - row_dims; d < x.dim(); ++d) width *= x.size(d);
  return width;
}

template <class Args>
void set_norm(Args& a, const Tensor& x, const Tensor* residual, const NormOptions& o, const Tensor& y,
              const Tensor* sum) {
  STD_TORCH_CHECK(o.row_dims >= 1 && o.row_dims <= x.dim(), "fastattn: row_dims must be in [1, ", x.dim(),
                  "], got ", o.row_dims);
  STD_TORCH_CHECK(!o.rms || !o.bias, "fastattn: an RMSNorm has no bias");
  set_row(a.x, norm_tensor(x, o.row_dims, "x")), set_row(a.y, norm_tensor(y, o.row_dims, "y"));
  STD_TORCH_CHECK(a.y.storage == a.x.storage, "fastattn: y must have x's dtype");
  if (residual) {
    set_row(a.residual, norm_tensor(*residual, o.row_dims, "residual"));
    set_row(a.sum, norm_tensor(*sum, o.row_dims, "sum"));
    for (int64_t d = 0; d < x.dim(); ++d) {
      STD_TORCH_CHECK(residual->dim() == x.dim() && residual->size(d) == x.size(d),
                      "fastattn: residual must have x's shape");
    }
  }
  a.width = row_width(x, o.row_dims), a.eps = o.eps, a.rms = o.rms;
  a.grid =
      make_grid({{&x, &a.x, "x"}, {residual, &a.residual, "residual"}, {sum, &a.sum, "sum"}, {&y, &a.y, "y"}},
                x.dim() - o.row_dims, x.dim());
}

// The sizes of what a norm's backward needs: [kNormStats or 1, rows].
inline std::vector<int64_t> stats_sizes(const Tensor& x, int64_t row_dims, bool rms) {
  int64_t rows = 1;
  for (int64_t d = 0; d < x.dim() - row_dims; ++d) rows *= x.size(d);
  return {rms ? 1 : kNormStats, rows};
}

// What a norm's backward gives. Each may be of no elements: not asked for.
struct NormGradients {
  Tensor dx, dweight, dbias;
  bool sums_weight, sums_bias;
};

// The arguments of a norm's backward that every backend has but its weights, with fresh results by
// make(sizes, dtype). Where there is nothing to sum, they are finished.
template <class Args, class Make>
NormGradients set_norm_backward(Args& a, const Tensor& dy, const OptionalTensor& dsum, const Tensor& h,
                                const Tensor& stats, int64_t row_dims, const OptionalTensor& weight,
                                std::optional<ScalarType> bias_dtype, bool rms,
                                const std::vector<bool>& needs, const Make& make) {
  STD_TORCH_CHECK(row_dims >= 1 && row_dims <= h.dim() && dy.dim() == h.dim() && needs.size() == 3,
                  "fastattn: dy must have h's shape, row_dims fit it, and needs have three entries");
  set_row(a.dy, norm_tensor(dy, row_dims, "dy")), set_row(a.h, norm_tensor(h, row_dims, "h"));
  if (dsum) {
    set_row(a.dsum, norm_tensor(*dsum, row_dims, "dsum"));
    STD_TORCH_CHECK(a.dsum.storage == a.h.storage && dsum->dim() == h.dim(), "fastattn: dsum must be like h");
  }
  for (int64_t d = h.dim() - row_dims; d < h.dim(); ++d) {
    STD_TORCH_CHECK(dy.size(d) == h.size(d) && (!dsum || dsum->size(d) == h.size(d)),
                    "fastattn: dy and dsum must have h's shape");
  }
  a.width = row_width(h, row_dims), a.rms = rms;
  const bool sums_weight = needs[1] && weight, sums_bias = needs[2] && bias_dtype && !rms;
  Tensor dx = needs[0] ? make(h.sizes(), h.scalar_type()) : make({0}, h.scalar_type());
  if (needs[0]) set_row(a.dx, norm_tensor(dx, row_dims, "dx"));
  const std::vector<int64_t> sizes(h.sizes().begin() + (h.dim() - row_dims), h.sizes().end());
  Tensor dweight = sums_weight ? make(sizes, weight->scalar_type()) : make({0}, ScalarType::Float);
  Tensor dbias = sums_bias ? make(sizes, *bias_dtype) : make({0}, ScalarType::Float);
  a.grid = make_grid({{&h, &a.h, "h"},
                      {&dy, &a.dy, "dy"},
                      {dsum ? &*dsum : nullptr, &a.dsum, "dsum"},
                      {needs[0] ? &dx : nullptr, &a.dx, "dx"}},
                     h.dim() - row_dims, h.dim());
  if (a.width == 0 || a.grid.rows == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  } else {
    check_dtype(stats, ScalarType::Float, "stats", "float32");
    STD_TORCH_CHECK(stats.is_contiguous() && stats.numel() == (rms ? 1 : kNormStats) * a.grid.rows,
                    "fastattn: stats must be those of the forward");
    a.stats = static_cast<const float*>(stats.const_data_ptr());
  }
  return {dx, dweight, dbias, sums_weight, sums_bias};
}

}  // namespace fastattn
