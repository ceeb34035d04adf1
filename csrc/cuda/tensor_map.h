// What a tensor map says: the tensor that TMA reads or writes boxes of, and how a box lies in shared memory.
// Plain host code, the same for device and twin; ptx/tma.h makes the map of it.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fastattn::cuda {

// Dimension 0 is adjacent; strides are those of dimensions 1, 2, ... Elements have 16 bits.
struct TensorSpec {
  const void* data;
  bool bf16;  // else fp16
  int rank;
  uint64_t size[5];
  uint64_t stride_bytes[4];
  uint32_t box[5];
  Swizzle swizzle;
};

// Why TMA cannot take such a tensor, or null.
inline const char* tensor_map_refusal(const TensorSpec& spec) {
  if (spec.rank < 1 || spec.rank > 5) return "a tensor map has 1 to 5 dimensions";
  if (reinterpret_cast<uintptr_t>(spec.data) % 16 != 0) return "data is not aligned to 16 bytes";
  for (int i = 0; i < spec.rank; ++i) {
    if (spec.size[i] == 0 || spec.size[i] > (1ull << 32)) return "a size is 0 or more than 2^32";
    if (spec.box[i] == 0 || spec.box[i] > 256) return "a box has 1 to 256 elements along each dimension";
    if (i > 0 && (spec.stride_bytes[i - 1] % 16 != 0 || spec.stride_bytes[i - 1] >= (1ull << 40)))
      return "a stride is not a multiple of 16 bytes below 2^40";
  }
  if (spec.box[0] * 2 % 16 != 0) return "a row of the box is not a multiple of 16 bytes";
  if (spec.swizzle != Swizzle::None && spec.box[0] * 2 > uint32_t(spec.swizzle))
    return "a row of the box is longer than the swizzle's line";
  return nullptr;
}

}  // namespace fastattn::cuda
