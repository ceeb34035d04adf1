// The launches of the attention kernels, for the binding, which includes no device code. Each gives null, or
// what went wrong.
#pragma once

#include "attention_args.cuh"
#include "types.h"

namespace fastattn::cuda {

// kHead: padded_head of the call's sizes.
template <class T, int kHead>
const char* start_attention_sm80(const AttentionArgs& a, void* stream);

// All gradients that are asked for.
template <class T, int kHead>
const char* start_attention_bwd_sm80(const AttentionBwdArgs& a, void* stream);

// out [groups, width] = the sums of parts [groups, count, width], in a fixed order. Gives the launch's error
// code.
int start_sums(const float* parts, int64_t groups, int64_t count, int64_t width, float* out, void* stream);

// Why Hopper's kernel leaves a call to sm_80's; null: it serves it.
const char* refuse_attention_sm90(const AttentionArgs& a);
// kD: the call's D. `next_tile` is one zeroed word on the device, alive until the kernel ends.
template <class T, int kD>
const char* start_attention_sm90(const AttentionArgs& a, unsigned* next_tile, int multiprocessors,
                                 void* stream);

}  // namespace fastattn::cuda
