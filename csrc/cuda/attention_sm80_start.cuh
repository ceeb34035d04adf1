// Which form of the sm_80 forward a call runs.
#pragma once

#include "attention_launch.h"
#include "attention_sm80.cuh"

namespace fastattn::cuda {

template <class T, int kHead>
const char* start_attention_sm80(const AttentionArgs& a, void* stream) {
  const cudaError_t error = with_mask_form(a, [&](auto form) {
    return launch_attention_forward_sm80<T, kHead, form()>(a, static_cast<cudaStream_t>(stream));
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastattn::cuda
