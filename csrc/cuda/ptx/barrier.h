// Named barriers among some of a block's warps, and the registers a warpgroup gives up or takes.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// Barrier `id` (1 to 15; 0 is __syncthreads') of `threads`, a multiple of 32: arrive and wait.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Arrives without waiting; counts towards `threads` all the same.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Registers a thread may use from here on, a multiple of 8 in [24, 256], by all warps of a warpgroup. The
// kernel needs __launch_bounds__(threads, 1): without the 1, ptxas ignores it with an info line C7508.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
#endif

}  // namespace fastattn::cuda
