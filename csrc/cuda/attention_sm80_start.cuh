// Which form of the sm_80 forward a call runs.
#pragma once

#include "attention_launch.h"
#include "attention_sm80.cuh"

namespace fastattn::cuda {

template <class T, int kHead>
const char* start_attention_sm80(const AttentionArgs& a, void* stream) {
  const bool ranges = a.lo || a.hi || a.band_lo > -kUnbounded || a.band_hi < kUnbounded;
  const auto start = a.block_list ? launch_attention_forward_sm80<T, kHead, MaskForm::Bits>
                     : ranges     ? launch_attention_forward_sm80<T, kHead, MaskForm::Ranges>
                                  : launch_attention_forward_sm80<T, kHead, MaskForm::None>;
  const cudaError_t error = start(a, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastattn::cuda
