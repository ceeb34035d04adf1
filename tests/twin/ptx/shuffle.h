// Twin of csrc/cuda/ptx/shuffle.h, and of the block's and the warp's barriers.
#pragma once

#include "../../../csrc/cuda/layout.h"
#include "../runtime.h"

inline void __syncthreads() { twin::barrier(0, int(blockDim.x * blockDim.y * blockDim.z), true); }

inline void __syncwarp(uint32_t mask = twin::kAllLanes) {
  sanitizer::release(&twin::this_warp());
  twin::warp_collective("__syncwarp", mask, 0, [](int*) {});
  sanitizer::acquire(&twin::this_warp());
}

namespace fastattn::cuda {

using twin::kAllLanes;

inline int thread_index() { return int(threadIdx.x); }

template <class T>
T shfl_xor(T value, int mask) {
  return twin::warp_collective("shfl_xor", kAllLanes, value, [](T*) {})[twin::self->lane() ^ mask];
}
template <class T>
T shfl(T value, int from) {
  return twin::warp_collective("shfl", kAllLanes, value, [](T*) {})[from % twin::kWarpSize];
}
inline uint32_t warp_ballot(bool predicate) {
  const int* all = twin::warp_collective("ballot", kAllLanes, int(predicate), [](int*) {});
  uint32_t bits = 0;
  for (int lane = 0; lane < twin::kWarpSize; ++lane) bits |= uint32_t(all[lane]) << lane;
  return bits;
}
inline bool warp_any(bool predicate) { return warp_ballot(predicate) != 0; }
inline uint32_t warp_or(uint32_t value) {
  const uint32_t* all = twin::warp_collective("warp_or", kAllLanes, value, [](uint32_t*) {});
  uint32_t bits = 0;
  for (int lane = 0; lane < twin::kWarpSize; ++lane) bits |= all[lane];
  return bits;
}
inline int warp_min(int value) {
  const int* all = twin::warp_collective("warp_min", kAllLanes, value, [](int*) {});
  return *std::min_element(all, all + twin::kWarpSize);
}
inline int warp_max(int value) {
  const int* all = twin::warp_collective("warp_max", kAllLanes, value, [](int*) {});
  return *std::max_element(all, all + twin::kWarpSize);
}

}  // namespace fastattn::cuda
