// The ops of the CUDA library, in a namespace of its own with the schemas of csrc/ops.cpp. The bindings stand
// in ops_*.cpp of this folder, the kernels' instantiations in its .cu files, which include no torch.
#include <string>

#include "../schemas.h"
#include "runtime.h"

#if !defined(FASTATTN_CUDA_VERSION)
#define FASTATTN_CUDA_VERSION 0
#define FASTATTN_CUDA_ARCHS ""
#endif

namespace fastattn::cuda {
namespace {

int64_t built_for() { return FASTATTN_CUDA_VERSION; }
std::string architectures() { return FASTATTN_CUDA_ARCHS; }
int64_t driver() { return driver_version(); }

}  // namespace
}  // namespace fastattn::cuda

STABLE_TORCH_LIBRARY(fastattn_cuda, m) {
  fastattn::define_attention(m);
  fastattn::define_rows(m);
  // CUDA versions are 13000 for 13.0; the architectures are as in FASTATTN_CUDA_ARCHS, by spaces.
  m.def("_built_for() -> int");
  m.def("_architectures() -> str");
  m.def("_driver() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, CompositeExplicitAutograd, m) {
  m.impl("_built_for", TORCH_BOX(&fastattn::cuda::built_for));
  m.impl("_architectures", TORCH_BOX(&fastattn::cuda::architectures));
  m.impl("_driver", TORCH_BOX(&fastattn::cuda::driver));
}
