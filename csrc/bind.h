// What every binding needs: storage types, strides and the checks of a direct call of an op.
//
// The checks keep an op from reading past a tensor; the messages for people are in fastattn/problem.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/simd/types.h"

namespace fastattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Storage storage_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::kFloat;
    case ScalarType::BFloat16: return Storage::kBFloat16;
    case ScalarType::Half: return Storage::kHalf;
    default: STD_TORCH_CHECK(false, "fastattn: ", name, " must be float32, bfloat16 or float16");
  }
}

// The stride of a dimension that may broadcast.
inline int64_t broadcast_stride(const Tensor& t, int dim, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.size(dim) == size || t.size(dim) == 1, "fastattn: dimension ", dim, " of ", name,
                  " must be ", size, " or 1, got ", t.size(dim));
  return t.size(dim) == 1 ? 0 : t.stride(dim);
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name, const char* wanted) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "fastattn: ", name, " must be ", wanted);
}

}  // namespace fastattn
