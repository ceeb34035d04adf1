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

// Outputs from this size on leave the caches before anyone reads them, so they are stored past them.
inline bool is_large(const Tensor& t) { return bytes_of(t) >= int64_t(32) << 20; }

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

// Whether what an operation reads and writes outgrows the last cache together: written past it, two outputs
// cost half of what they do when each line is read first (4096 x 768 fp32 sums and norms: 370 ns a row, not
// 580).
inline bool outgrow_last_cache(std::initializer_list<const Tensor*> tensors) {
  int64_t bytes = 0;
  for (const Tensor* t : tensors) bytes += bytes_of(*t);
  return bytes >= int64_t(32) << 20;
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
    STD_TORCH_CHECK(t.stride(d) == expected || t.size(d) <= 1, "fastattn: the normalized dimensions of ",
                    name, " must be contiguous");
    expected *= t.size(d);
  }
  return row_tensor(t, name);
}

}  // namespace fastattn
