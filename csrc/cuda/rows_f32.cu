// The row kernels of fp32 tensors.
#include "norm.cuh"
#include "norm_backward.cuh"
#include "softmax.cuh"
#include "softmax_backward.cuh"

namespace fastattn::cuda {

template int softmax<float, float>(const SoftmaxCall&, void*);
template int softmax_backward<float, float>(const SoftmaxBackwardCall&, void*);
template int norm<float>(const NormCall&, void*);
template int norm_backward<float>(const NormBackwardCall&, void*);

}  // namespace fastattn::cuda
