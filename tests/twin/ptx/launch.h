// Twin of csrc/cuda/ptx/launch.h.
#pragma once

#include "../runtime.h"

namespace twin {
inline std::vector<const void*> launched;  // the kernels that were started, for tests that ask which ran
}  // namespace twin

namespace fastattn::cuda {

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block_dim, size_t smem_bytes, cudaStream_t,
                   Args&&... args) {
  std::tuple<Params...> params(std::forward<Args>(args)...);
  const std::function<void()> body = [&] { std::apply(kernel, params); };
  twin::launched.push_back(reinterpret_cast<const void*>(kernel));
  sanitizer::release(&twin::launch_begin);
  {
    const sanitizer::Unobserved unobserved;
    gridDim = grid;
    blockDim = block_dim;
    for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
      blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      const auto block = std::make_unique<twin::Block>(block_dim, smem_bytes, twin::options.seed + i);
      twin::block = block.get();
      block->run(body);
    }
    twin::block = nullptr;
  }
  sanitizer::acquire(&twin::launch_end);
  return cudaSuccess;
}

template <class T>
T& shared_storage() {
  twin::block->smem.address(twin::block->smem.base(), sizeof(T), 1024);
  return *reinterpret_cast<T*>(twin::block->smem.base());
}

inline uint32_t smem_address(const void* p, size_t bytes = 1, size_t alignment = 1) {
  return twin::block->smem.address(p, bytes, alignment);
}

}  // namespace fastattn::cuda
