// Twin of csrc/cuda/ptx/mbarrier.h.
#pragma once

#include "launch.h"

namespace twin {

struct MBarrier {
  uint64_t phase : 1, arrivals : 15, pending : 15;
  int64_t tx_bytes : 21;
  uint64_t magic : 12;
};
constexpr uint64_t kMagic = 0xb42;

inline MBarrier read(const uint64_t* bar) {
  block->smem.address(bar, 8, 8);
  const auto state = std::bit_cast<MBarrier>(*bar);
  if (state.magic != kMagic) fail("mbarrier used before mbarrier_init");
  return state;
}
inline void update(uint64_t* bar, int arrivals, int tx_bytes) {
  MBarrier state = read(bar);
  if (int(state.pending) < arrivals) fail("mbarrier: more arrivals than it was initialised for");
  state.pending = (state.pending - unsigned(arrivals)) & 0x7fff;
  state.tx_bytes += tx_bytes;
  if (state.pending == 0 && state.tx_bytes == 0) {
    state.phase ^= 1;
    state.pending = state.arrivals;
  }
  sanitizer::release(bar);
  *bar = std::bit_cast<uint64_t>(state);
  if (self) block->maybe_yield();  // not when a TMA load completes
}

}  // namespace twin

namespace fastattn::cuda {

inline void mbarrier_init(uint64_t* bar, int arrivals) {
  const sanitizer::Unobserved unobserved;
  smem_address(bar, 8, 8);
  const auto count = uint64_t(arrivals);
  *bar = std::bit_cast<uint64_t>(twin::MBarrier{0, count, count, 0, twin::kMagic});
  twin::block->unfenced[bar] = twin::self;
}
inline void mbarrier_arrive(uint64_t* bar) {
  const sanitizer::Unobserved unobserved;
  twin::update(bar, 1, 0);
}
inline void mbarrier_arrive_expect_tx(uint64_t* bar, int bytes) {
  const sanitizer::Unobserved unobserved;
  twin::update(bar, 1, bytes);
}
inline void mbarrier_wait(uint64_t* bar, int parity) {
  const sanitizer::Unobserved unobserved;
  while (int(twin::read(bar).phase) == parity) twin::block->wait_change(*bar, *bar, "mbarrier_wait");
  sanitizer::acquire(bar);
}

}  // namespace fastattn::cuda
