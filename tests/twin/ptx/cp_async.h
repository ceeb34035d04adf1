// Twin of csrc/cuda/ptx/cp_async.h.
#pragma once

#include "launch.h"

namespace fastattn::cuda {

inline void cp_async_16(void* smem, const void* gmem, bool valid) {
  const sanitizer::Unobserved unobserved;
  smem_address(smem, 16, 16);
  if (reinterpret_cast<uintptr_t>(gmem) % 16 != 0) twin::fail("cp.async: misaligned global address");
  twin::self->cp_async.issue([=] {
    const sanitizer::Observed observed;
    if (valid) std::memcpy(smem, gmem, 16);
    else std::memset(smem, 0, 16);
  });
}
inline void cp_async_commit() {
  const sanitizer::Unobserved unobserved;
  twin::self->cp_async.commit();
}
template <int kGroupsInFlight>
void cp_async_wait() {
  const sanitizer::Unobserved unobserved;
  twin::self->cp_async.wait(kGroupsInFlight);
}

}  // namespace fastattn::cuda
