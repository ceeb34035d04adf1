// Which form of the sm_80 backward a call runs.
#pragma once

#include "attention_bwd_bias.cuh"
#include "attention_launch.h"

namespace fastattn::cuda {

template <class T, int kHead>
const char* start_attention_bwd_sm80(const AttentionBwdArgs& a, void* stream) {
  const cudaError_t error = with_mask_form(a, [&](auto form) {
    return launch_attention_backward_sm80<T, kHead, form()>(a, static_cast<cudaStream_t>(stream));
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastattn::cuda
