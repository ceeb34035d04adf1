// Values between the lanes of a warp; every lane takes part.
#pragma once

#include "../layout.h"

namespace fastattn::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// threadIdx.x, read anew at each call: what follows from it needs no register across a loop.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The value of lane `lane ^ mask`.
template <class T>
__device__ __forceinline__ T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
// The value of lane `from`.
template <class T>
__device__ __forceinline__ T shfl(T value, int from) {
  return __shfl_sync(kAllLanes, value, from);
}
// Bit l: whether lane l says so.
__device__ __forceinline__ uint32_t warp_ballot(bool predicate) {
  return __ballot_sync(kAllLanes, predicate);
}
__device__ __forceinline__ bool warp_any(bool predicate) { return __any_sync(kAllLanes, predicate); }
// All lanes' values, bit by bit or the extreme one.
__device__ __forceinline__ uint32_t warp_or(uint32_t value) { return __reduce_or_sync(kAllLanes, value); }
__device__ __forceinline__ int warp_min(int value) { return __reduce_min_sync(kAllLanes, value); }
__device__ __forceinline__ int warp_max(int value) { return __reduce_max_sync(kAllLanes, value); }

}  // namespace fastattn::cuda
