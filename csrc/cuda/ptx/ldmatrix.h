// ldmatrix: tiles of 8 x 8 16-bit elements from shared memory into mma's registers.
#pragma once

#include "launch.h"

namespace fastattn::cuda {

// Four tiles. Lane l points at row l % 8 of tile l / 8 (16 bytes, aligned); r[t] then holds, of tile t, row
// l / 4 and columns l % 4 * 2 and the next.
template <class T>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const T* row) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
// The same of the tiles' transposes: rows l % 4 * 2 and the next, column l / 4.
template <class T>
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const T* row) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

}  // namespace fastattn::cuda
