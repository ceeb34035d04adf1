// Starts Hopper's forward for the binding.
#pragma once

#include "attention_launch.h"
#include "attention_sm90_launch.h"

namespace fastattn::cuda {

template <class T, int kD>
const char* start_attention_sm90(const AttentionArgs& a, unsigned* next_tile, int multiprocessors,
                                 void* stream) {
  return launch_attention_sm90<T, kD>(a, next_tile, multiprocessors, static_cast<cudaStream_t>(stream));
}

}  // namespace fastattn::cuda
