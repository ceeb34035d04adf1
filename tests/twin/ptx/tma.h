// Twin of csrc/cuda/ptx/tma.h.
#pragma once

#include "mbarrier.h"

namespace fastattn::cuda {

// A matrix of 16-bit elements seen through 128-byte-swizzled boxes of 64 columns by box_y rows.
struct TensorMap {
  uint16_t* base;
  int columns, rows, row_stride, box_x, box_y;
};

}  // namespace fastattn::cuda

namespace twin {

using fastattn::cuda::TensorMap;

// Calls copy(smem address, element or null where outside the tensor) for each element of the box.
template <class Copy>
void for_each_in_box(const TensorMap& map, uint32_t address, int x, int y, Copy copy) {
  for (int row = 0; row < map.box_y; ++row) {
    for (int col = 0; col < map.box_x; ++col) {
      const bool inside = x + col >= 0 && x + col < map.columns && y + row >= 0 && y + row < map.rows;
      const uint32_t linear = address + uint32_t(row * map.box_x + col) * 2;
      const uint32_t swizzled = linear ^ (linear >> 7 & 7) << 4;
      copy(swizzled, inside ? map.base + std::ptrdiff_t(y + row) * map.row_stride + (x + col) : nullptr);
    }
  }
}
inline uint32_t tma_address(const TensorMap& map, const void* smem) {
  if (map.box_x != 64 || map.box_y > 256 || map.row_stride % 8 != 0) fail("TMA: invalid tensor map");
  return block->smem.address(smem, size_t(map.box_x * map.box_y) * 2, 128);
}

}  // namespace twin

namespace fastattn::cuda {

inline void tma_load_2d(void* smem, const TensorMap& map, uint64_t* bar, int x, int y) {
  const sanitizer::Unobserved unobserved;
  const uint32_t address = twin::tma_address(map, smem);
  twin::read(bar);
  sanitizer::release(bar);  // orders the copy after what its issuer has seen
  twin::block->in_flight.push_back([=] {
    sanitizer::acquire(bar);
    twin::for_each_in_box(map, address, x, y, [](uint32_t to, const uint16_t* from) {
      const uint16_t value = from ? *from : uint16_t(0);
      std::memcpy(twin::block->smem.async(to, 2), &value, 2);
      const sanitizer::Observed observed;
      std::memcpy(twin::block->smem.generic(to, 2), &value, 2);
    });
    twin::update(bar, 0, -map.box_x * map.box_y * 2);
  });
}
inline void tma_store_2d(const TensorMap& map, const void* smem, int x, int y) {
  const sanitizer::Unobserved unobserved;
  const uint32_t address = twin::tma_address(map, smem);
  twin::self->bulk_store.issue([=] {
    twin::for_each_in_box(map, address, x, y, [](uint32_t from, uint16_t* to) {
      const unsigned char* element = twin::block->smem.async(from, 2);
      const sanitizer::Observed observed;
      if (to) std::memcpy(to, element, 2);
    });
  });
}
inline void bulk_commit() {
  const sanitizer::Unobserved unobserved;
  twin::self->bulk_store.commit();
}
template <int kGroupsInFlight>
void bulk_wait() {
  const sanitizer::Unobserved unobserved;
  twin::self->bulk_store.wait(kGroupsInFlight);
}

}  // namespace fastattn::cuda
