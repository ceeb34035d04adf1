// From tensors to the arguments of the row kernels.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "bind.h"
#include "cpu/rows_args.h"

namespace fastattn {

// Elements of a task: some microseconds of work, so that small calls stay on one thread.
constexpr int64_t kTaskElements = 32768;

// Outputs from this size on leave the caches before anyone reads them, so they are stored past them; and
// malloc maps them anew each time.
inline bool is_large(const Tensor& t) { return t.numel() * int64_t(t.element_size()) >= int64_t(32) << 20; }

inline int64_t rows_per_task(int64_t width) {
  return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(width, 1));
}

struct GridTensor {
  const Tensor* tensor;  // right-aligned with the first; null: absent
  RowTensor* row;
  const char* name;
};

// Fills in the grid of the first tensor's dimensions but [row_begin, row_end), and every tensor's strides
// over it. A dimension is merged into its outer neighbour where all strides allow it; keep_last keeps the
// last one apart.
inline RowGrid make_grid(std::initializer_list<GridTensor> tensors, int64_t row_begin, int64_t row_end,
                         bool keep_last = false) {
  const Tensor& x = *tensors.begin()->tensor;
  RowGrid grid{};
  grid.rows = 1;
  const int64_t last = row_end == x.dim() ? row_begin - 1 : x.dim() - 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d >= row_begin && d < row_end) continue;
    const int64_t size = x.size(d);
    grid.rows *= size;
    const bool apart = keep_last && d == last;
    if (size == 1 && !apart) continue;
    bool merges = grid.dims > 0 && !apart;
    int64_t strides[8], k = 0;
    for (const GridTensor& g : tensors) {
      if (!g.tensor) continue;
      const int64_t at = d - (x.dim() - g.tensor->dim());
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

// An uninitialised contiguous tensor on the CPU, without the dispatcher's six microseconds.
inline Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Memory that was never touched costs a page fault every 4 KB, which is more than the arithmetic of a row
// kernel; large pages cost one fault in 512 of them. A hint only, of no effect on what was touched before.
inline void advise_large_pages([[maybe_unused]] const Tensor& out) {
#ifdef MADV_HUGEPAGE
  if (!is_large(out)) return;
  const uintptr_t data = uintptr_t(out.mutable_data_ptr()), page = 4096;
  const uintptr_t end = (data + out.numel() * out.element_size()) / page * page;
  const uintptr_t begin = (data + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastattn
