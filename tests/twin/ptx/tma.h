// Twin of csrc/cuda/ptx/tma.h.
#pragma once

#include "../../../csrc/cuda/tensor_map.h"
#include "mbarrier.h"

namespace fastattn::cuda {

// The card's map is opaque; this one is what it was made of.
struct TensorMap {
  TensorSpec spec;
};

inline const char* make_tensor_map(TensorMap& map, const TensorSpec& spec) {
  map.spec = spec;
  return tensor_map_refusal(spec);
}

}  // namespace fastattn::cuda

namespace twin {

using fastattn::cuda::Swizzle;
using fastattn::cuda::TensorMap;
using fastattn::cuda::TensorSpec;

// The 16-byte chunk number, address bits 4 to 6, is XORed with the number of the 128-byte line, bits 7 to 9,
// as far as the swizzle's own line has chunks.
inline uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t chunks = swizzle == Swizzle::None ? 1 : uint32_t(swizzle) / 16;
  return address ^ (address >> 7 & (chunks - 1)) << 4;
}

struct Box {
  TensorSpec spec;
  uint32_t smem;
  int at[5];

  int bytes() const {
    int count = 2;
    for (int i = 0; i < spec.rank; ++i) count *= int(spec.box[i]);
    return count;
  }

  // Calls copy(smem address, element or null where outside the tensor) for each element of the box.
  template <class Copy>
  void for_each(Copy copy) const {
    const int row = int(spec.box[0]), rows = bytes() / 2 / row;
    for (int r = 0; r < rows; ++r) {
      bool inside = true;
      std::ptrdiff_t offset = 0;
      for (int i = 1, rest = r; i < spec.rank; rest /= int(spec.box[i]), ++i) {
        const int64_t index = at[i] + rest % int(spec.box[i]);
        inside = inside && index >= 0 && index < int64_t(spec.size[i]);
        offset += index * std::ptrdiff_t(spec.stride_bytes[i - 1]);
      }
      const char* data = static_cast<const char*>(spec.data) + (inside ? offset : 0);
      for (int c = 0; c < row; ++c) {
        const int64_t column = at[0] + c;
        const bool seen = inside && column >= 0 && column < int64_t(spec.size[0]);
        copy(swizzled(smem + uint32_t(r * row + c) * 2, spec.swizzle), seen ? data + column * 2 : nullptr);
      }
    }
  }
};

inline Box box_of(const TensorMap& map, const void* smem, int rank, int x, int y, int z = 0, int w = 0) {
  if (const char* reason = tensor_map_refusal(map.spec)) fail(std::string("TMA: ") + reason);
  if (map.spec.rank != rank) fail("TMA: the map has another rank than the instruction");
  Box box{map.spec, 0, {x, y, z, w, 0}};
  box.smem = block->smem.address(smem, size_t(box.bytes()), 128);
  return box;
}

// An mbarrier that a copy is to complete on.
inline void check_target(const uint64_t* bar) {
  read(bar);
  if (block->unfenced.count(bar)) fail("a copy on an mbarrier without fence_mbarrier_init since its start");
}

inline void tma_load(const Box& box, uint64_t* bar) {
  check_target(bar);
  sanitizer::release(bar);  // orders the copy after what its issuer has seen
  block->in_flight.push_back([=] {
    sanitizer::acquire(bar);
    box.for_each([](uint32_t to, const char* from) {
      uint16_t value = 0;
      if (from) std::memcpy(&value, from, 2);
      std::memcpy(block->smem.async(to, 2), &value, 2);
      const sanitizer::Observed observed;
      std::memcpy(block->smem.generic(to, 2), &value, 2);
    });
    update(bar, 0, -box.bytes());
  });
}

}  // namespace twin

namespace fastattn::cuda {

inline void tma_prefetch(const TensorMap& map) {
  if (const char* reason = tensor_map_refusal(map.spec)) twin::fail(std::string("TMA: ") + reason);
}

inline void tma_load_2d(void* smem, const TensorMap& map, uint64_t* bar, int x, int y) {
  const sanitizer::Unobserved unobserved;
  twin::tma_load(twin::box_of(map, smem, 2, x, y), bar);
}
inline void tma_load_3d(void* smem, const TensorMap& map, uint64_t* bar, int x, int y, int z) {
  const sanitizer::Unobserved unobserved;
  twin::tma_load(twin::box_of(map, smem, 3, x, y, z), bar);
}
inline void tma_load_4d(void* smem, const TensorMap& map, uint64_t* bar, int x, int y, int z, int w) {
  const sanitizer::Unobserved unobserved;
  twin::tma_load(twin::box_of(map, smem, 4, x, y, z, w), bar);
}
inline void bulk_load(void* smem, const void* gmem, int bytes, uint64_t* bar) {
  const sanitizer::Unobserved unobserved;
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(gmem) % 16 != 0)
    twin::fail("bulk_load: not multiples of 16");
  const uint32_t address = twin::block->smem.address(smem, size_t(bytes), 16);
  twin::check_target(bar);
  sanitizer::release(bar);
  twin::block->in_flight.push_back([=] {
    sanitizer::acquire(bar);
    std::memcpy(twin::block->smem.async(address, size_t(bytes)), gmem, size_t(bytes));
    {
      const sanitizer::Observed observed;
      std::memcpy(twin::block->smem.generic(address, size_t(bytes)), gmem, size_t(bytes));
    }
    twin::update(bar, 0, -bytes);
  });
}
inline void tma_store_2d(const TensorMap& map, const void* smem, int x, int y) {
  const sanitizer::Unobserved unobserved;
  const twin::Box box = twin::box_of(map, smem, 2, x, y);
  twin::self->bulk_store.issue([=] {
    box.for_each([](uint32_t from, const char* to) {
      const unsigned char* element = twin::block->smem.async(from, 2);
      const sanitizer::Observed observed;
      if (to) std::memcpy(const_cast<char*>(to), element, 2);
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
