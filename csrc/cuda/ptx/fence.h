// Fences between what threads write and what the asynchronous units see.
#pragma once

namespace fastattn::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Makes this thread's writes to shared memory visible to TMA and wgmma. Before a barrier, by every writer.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Makes mbarrier_init visible to the asynchronous units.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
#endif

}  // namespace fastattn::cuda
