// cp.async: copies from global to shared memory that a thread issues, groups and later waits for.
#pragma once

#include "launch.h"

namespace fastattn::cuda {

// Copies 16 bytes, past the first-level cache; where `valid` is false it writes zeros and reads nothing. Both
// addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(smem)), "l"(gmem),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Ends a group: the copies of this thread since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most this many of the thread's newest groups are under way.
template <int kGroupsInFlight>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsInFlight) : "memory");
}

}  // namespace fastattn::cuda
