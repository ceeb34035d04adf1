// Launching a kernel, and its shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastattn::cuda {

// Starts a kernel; shared memory beyond 48 KB is asked for. Returns the launch's error.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                   Args&&... args) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem_bytes));
  if (error != cudaSuccess) return error;
  kernel<<<grid, block, smem_bytes, stream>>>(static_cast<Args&&>(args)...);
  return cudaGetLastError();
}

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// All of a kernel's shared memory, as one struct, at a multiple of 1024 bytes.
template <class T>
__device__ __forceinline__ T& shared_storage() {
  return *reinterpret_cast<T*>(dynamic_shared_memory);
}

// The 32-bit address that instructions on shared memory take.
__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace fastattn::cuda
