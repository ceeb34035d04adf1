// The row kernels of one instruction set, as kernel tables hold them.
#pragma once

#include "norm.h"
#include "norm_backward.h"
#include "softmax.h"
#include "softmax_backward.h"

namespace fastattn {
namespace {

constexpr RowKernels kRowKernels = {
    {{softmax_task<float, float>, softmax_task<float, float>},
     {softmax_task<BFloat16, BFloat16>, softmax_task<BFloat16, float>},
     {softmax_task<Half, Half>, softmax_task<Half, float>}},
    SoftmaxScratch::bytes,
    {norm_task<float>, norm_task<BFloat16>, norm_task<Half>},
    norm_scratch,
    {{softmax_backward_task<float, float>, softmax_backward_task<float, float>},
     {softmax_backward_task<BFloat16, BFloat16>, softmax_backward_task<float, BFloat16>},
     {softmax_backward_task<Half, Half>, softmax_backward_task<float, Half>}},
    softmax_backward_scratch,
    {norm_backward_task<float>, norm_backward_task<BFloat16>, norm_backward_task<Half>},
    norm_backward_scratch,
    widen_weight,
    add_parts,
};

}  // namespace
}  // namespace fastattn
