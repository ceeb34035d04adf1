// The row kernels of one instruction set, as kernel tables hold them.
#pragma once

#include "norm.h"
#include "softmax.h"

namespace fastattn {
namespace {

constexpr RowKernels kRowKernels = {
    {{softmax_task<float, float>, softmax_task<float, float>},
     {softmax_task<BFloat16, BFloat16>, softmax_task<BFloat16, float>},
     {softmax_task<Half, Half>, softmax_task<Half, float>}},
    SoftmaxScratch::bytes,
    {norm_task<float>, norm_task<BFloat16>, norm_task<Half>},
    norm_scratch,
    widen_weight,
};

}  // namespace
}  // namespace fastattn
