// Sums of gradients over the heads that share a slope or a sink.
#include "attention_launch.h"
#include "column_sums.cuh"

namespace fastattn::cuda {

int start_sums(const float* parts, int64_t groups, int64_t count, int64_t width, float* out, void* stream) {
  RowTensor to{};
  to.data = out, to.storage = Storage::kFloat;
  return add_column_sums({parts, count, width, groups, {to, false}}, stream);
}

}  // namespace fastattn::cuda
