// TMA: boxes of a tensor between global and shared memory, by one thread and the copy engine.
#pragma once

#include <cuda.h>

#include "launch.h"

namespace fastattn::cuda {

using TensorMap = CUtensorMap;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Loads the map's box at column x, row y; what lies outside the tensor becomes zeros. Counts its bytes on
// `bar`.
__device__ __forceinline__ void tma_load_2d(void* smem, const TensorMap& map, uint64_t* bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(smem_address(smem)),
      "l"(&map), "r"(smem_address(bar)), "r"(x), "r"(y)
      : "memory");
}
// Stores the box; what lies outside the tensor is left out. Waited for by bulk groups.
__device__ __forceinline__ void tma_store_2d(const TensorMap& map, const void* smem, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(smem_address(smem)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kGroupsInFlight>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroupsInFlight) : "memory");
}

#endif

}  // namespace fastattn::cuda
