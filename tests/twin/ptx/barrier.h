// Twin of csrc/cuda/ptx/barrier.h.
#pragma once

#include "../runtime.h"

namespace fastattn::cuda {

inline void named_barrier_sync(int id, int threads) { twin::barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { twin::barrier(id, threads, false); }

// The twin has no registers to move; it checks that the whole warp asks for the same.
template <int kRegisters>
void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  twin::warp_collective("setmaxnreg", twin::kAllLanes, kRegisters, [](int*) {});
}
template <int kRegisters>
void setmaxnreg_dec() {
  setmaxnreg_inc<kRegisters>();
}

}  // namespace fastattn::cuda
