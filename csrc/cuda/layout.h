// Where an element of a tile lies in shared memory, and the descriptors that say so to wgmma. Plain integer
// code, the same for device, twin and tests.
#pragma once

#include "types.h"

namespace fastattn::cuda {

constexpr int kWarp = 32;
constexpr int kGranule = 64;  // side of a bit tile: 64 query rows, 64 keys

// A tile row of 64 elements of 16 bits is 128 bytes, eight 16-byte chunks. Chunk c of row r lies at c ^ (r %
// 8), so that eight rows of one column are in different banks. This is TMA's and wgmma's 128-byte swizzle for
// a tile that starts at a multiple of 1024 bytes. Returns an element index.
FASTATTN_HOST_DEVICE constexpr int swizzle_128b(int row, int col) {
  return row * 64 + (((col / 8) ^ (row % 8)) * 8) + col % 8;
}

// The same for rows of kColumns elements, a multiple of 32. Rows of an odd number of 64-byte pieces start in
// either half of the banks by turns, so there a chunk moves within its group of four, with every second row.
template <int kColumns>
FASTATTN_HOST_DEVICE constexpr int swizzle(int row, int col) {
  static_assert(kColumns % 32 == 0, "a row is whole 64-byte pieces");
  const int turn = kColumns % 64 == 0 ? row % 8 : row / 2 % 4;
  return row * kColumns + (((col / 8) ^ turn) * 8) + col % 8;
}

// How 16-byte chunks of a tile are permuted: within lines of so many bytes, which are the tile's rows.
enum class Swizzle { None = 0, B32 = 32, B64 = 64, B128 = 128 };

// wgmma matrix descriptor of a tile whose rows are the swizzle's lines. `leading` and `stride` are byte
// distances:
//   K-major    stride: between groups of 8 rows; leading: unused
//   MN-major   stride: between groups of 8 k;    leading: between lines along MN
template <Swizzle kSwizzle = Swizzle::B128>
FASTATTN_HOST_DEVICE constexpr uint64_t wgmma_descriptor(uint32_t smem_address, uint32_t leading,
                                                         uint32_t stride) {
  constexpr uint64_t kMode = kSwizzle == Swizzle::B128  ? 1
                             : kSwizzle == Swizzle::B64 ? 2
                             : kSwizzle == Swizzle::B32 ? 3
                                                        : 0;
  return uint64_t((smem_address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | kMode << 62;
}

// Which way a wgmma operand lies: rows of k, or rows of m or n.
enum class Major { K = 0, MN = 1 };

}  // namespace fastattn::cuda
