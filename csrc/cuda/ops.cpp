// The ops of the CUDA library, in a namespace of its own with the schemas of csrc/ops.cpp. The bindings stand
// in ops_*.cpp of this folder, the kernels' instantiations in its .cu files, which include no torch.
#include "../schemas.h"

STABLE_TORCH_LIBRARY(fastattn_cuda, m) {
  fastattn::define_attention(m);
  fastattn::define_rows(m);
}
