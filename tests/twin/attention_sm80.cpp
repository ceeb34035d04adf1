// The sm_80 attention kernels for Python: every head size, type and mask form that the macros name.
#include "cuda/attention_sm80.cuh"

#include <twin/binding.h>

using namespace fastattn::cuda;

#if !defined(TWIN_HEAD)
#define TWIN_HEAD 64
#define TWIN_TYPE bf16
#endif

TWIN_EXPORT const char* attention_forward(uint64_t seed, const AttentionArgs* a) {
  return twin::guarded(seed, [&] {
    if (padded_head(a->D, a->Dv) > TWIN_HEAD) twin::fail("this library is for a smaller head");
    const auto start = a->block_list ? launch_attention_forward_sm80<TWIN_TYPE, TWIN_HEAD, MaskForm::Bits>
                       : a->lo || a->hi || a->band_lo > -kUnbounded || a->band_hi < kUnbounded
                           ? launch_attention_forward_sm80<TWIN_TYPE, TWIN_HEAD, MaskForm::Ranges>
                           : launch_attention_forward_sm80<TWIN_TYPE, TWIN_HEAD, MaskForm::None>;
    start(*a, nullptr);
  });
}

TWIN_EXPORT const char* layout(uint64_t, int64_t* bytes) {
  bytes[0] = sizeof(AttentionArgs);
  bytes[1] = sizeof(AttentionBwdArgs);
  return nullptr;
}
