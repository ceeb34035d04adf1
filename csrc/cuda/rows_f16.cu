// The row kernels of fp16 tensors.
#include "norm.cuh"
#include "norm_backward.cuh"
#include "softmax.cuh"
#include "softmax_backward.cuh"

namespace fastattn::cuda {

template int softmax<fp16, fp16>(const SoftmaxCall&, void*);
template int softmax_backward<fp16, fp16>(const SoftmaxBackwardCall&, void*);
template int softmax<fp16, float>(const SoftmaxCall&, void*);
template int softmax_backward<float, fp16>(const SoftmaxBackwardCall&, void*);
template int norm<fp16>(const NormCall&, void*);
template int norm_backward<fp16>(const NormBackwardCall&, void*);

}  // namespace fastattn::cuda
