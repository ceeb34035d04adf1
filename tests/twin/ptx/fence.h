// Twin of csrc/cuda/ptx/fence.h.
#pragma once

#include "../runtime.h"

namespace fastattn::cuda {

inline void fence_proxy_async() {
  const sanitizer::Unobserved unobserved;
  twin::block->smem.fence_proxy_async();
  std::erase_if(twin::block->unfenced, [](const auto& entry) { return entry.second == twin::self; });
}
inline void fence_mbarrier_init() {
  const sanitizer::Unobserved unobserved;
  std::erase_if(twin::block->unfenced, [](const auto& entry) { return entry.second == twin::self; });
}

}  // namespace fastattn::cuda
