// Twin of csrc/cuda/ptx/fence.h.
#pragma once

#include "../runtime.h"

namespace fastattn::cuda {

inline void fence_proxy_async() {
  const sanitizer::Unobserved unobserved;
  twin::block->smem.fence_proxy_async();
}
// Not modelled: the twin's copy engine sees a barrier as soon as it is written.
inline void fence_mbarrier_init() {}

}  // namespace fastattn::cuda
