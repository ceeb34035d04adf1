// The two 16-bit element types, as bits: kernels convert and multiply through ptx.h only, so that neither
// nvcc's nor a host compiler's own types are needed.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTATTN_HOST_DEVICE __host__ __device__
#else
#define FASTATTN_HOST_DEVICE
#endif

namespace fastattn::cuda {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace fastattn::cuda
