// The row kernels of bf16 tensors.
#include "norm.cuh"
#include "norm_backward.cuh"
#include "softmax.cuh"
#include "softmax_backward.cuh"

namespace fastattn::cuda {

template int softmax<bf16, bf16>(const SoftmaxCall&, void*);
template int softmax_backward<bf16, bf16>(const SoftmaxBackwardCall&, void*);
template int softmax<bf16, float>(const SoftmaxCall&, void*);
template int softmax_backward<float, bf16>(const SoftmaxBackwardCall&, void*);
template int norm<bf16>(const NormCall&, void*);
template int norm_backward<bf16>(const NormBackwardCall&, void*);

}  // namespace fastattn::cuda
