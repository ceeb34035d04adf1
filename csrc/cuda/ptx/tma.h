// TMA: boxes of a tensor between global and shared memory, by one thread and the copy engine.
#pragma once

#include <cuda.h>

#include "../tensor_map.h"
#include "launch.h"

namespace fastattn::cuda {

using TensorMap = CUtensorMap;

// Host: fills `map`; null, or why not. The driver's function is looked up by name, so nothing links libcuda.
inline const char* make_tensor_map(TensorMap& map, const TensorSpec& spec) {
  if (const char* reason = tensor_map_refusal(spec)) return reason;
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry)
                                                                        : nullptr;
  }();
  if (!encode) return "the driver has no cuTensorMapEncodeTiled (it needs CUDA 12)";
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
  if (spec.swizzle == Swizzle::B32) swizzle = CU_TENSOR_MAP_SWIZZLE_32B;
  if (spec.swizzle == Swizzle::B64) swizzle = CU_TENSOR_MAP_SWIZZLE_64B;
  if (spec.swizzle == Swizzle::B128) swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  cuuint64_t size[5], stride[4];
  cuuint32_t box[5];
  for (int i = 0; i < spec.rank; ++i) {
    size[i] = spec.size[i];
    box[i] = spec.box[i];
    if (i > 0) stride[i - 1] = spec.stride_bytes[i - 1];
  }
  const CUresult error =
      encode(&map, spec.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             cuuint32_t(spec.rank), const_cast<void*>(spec.data), size, stride, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the tensor";
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Asks for the map itself, which the first copy would otherwise wait for.
__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the map's box at the given coordinates, x along the adjacent dimension; what lies outside the tensor
// becomes zeros. Counts the whole box's bytes on `bar`.
__device__ __forceinline__ void tma_load_2d(void* smem, const TensorMap& map, uint64_t* bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(smem_address(smem)),
      "l"(&map), "r"(smem_address(bar)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* smem, const TensorMap& map, uint64_t* bar, int x, int y,
                                            int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(smem_address(smem)),
      "l"(&map), "r"(smem_address(bar)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void tma_load_4d(void* smem, const TensorMap& map, uint64_t* bar, int x, int y,
                                            int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_address(smem)),
      "l"(&map), "r"(smem_address(bar)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// Copies bytes, a multiple of 16 between multiples of 16, as they lie. Counts them on `bar`.
__device__ __forceinline__ void bulk_load(void* smem, const void* gmem, int bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          smem_address(smem)),
      "l"(gmem), "r"(bytes), "r"(smem_address(bar))
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
