// The sm_80 attention kernels for Python: one head size and type a library, all mask forms.
#include "cuda/attention_sm80.cuh"

#include <twin/binding.h>

#include "cuda/attention_bwd_bias.cuh"

using namespace fastattn::cuda;

#if !defined(TWIN_HEAD)
#define TWIN_HEAD 64
#define TWIN_TYPE bf16
#endif

namespace {

template <class Start>
void by_form(const AttentionArgs& a, Start start) {
  if (padded_head(a.D, a.Dv) > TWIN_HEAD) twin::fail("this library is for a smaller head");
  with_mask_form(a, start);
}

}  // namespace

TWIN_EXPORT const char* attention_forward(uint64_t seed, const AttentionArgs* a) {
  return twin::guarded(seed, [&] {
    by_form(*a, [&](auto form) { launch_attention_forward_sm80<TWIN_TYPE, TWIN_HEAD, form()>(*a, nullptr); });
  });
}

TWIN_EXPORT const char* attention_backward(uint64_t seed, const AttentionBwdArgs* a) {
  return twin::guarded(seed, [&] {
    by_form(*a,
            [&](auto form) { launch_attention_backward_sm80<TWIN_TYPE, TWIN_HEAD, form()>(*a, nullptr); });
  });
}

TWIN_EXPORT const char* layout(uint64_t, int64_t* bytes) {
  bytes[0] = sizeof(AttentionArgs);
  bytes[1] = sizeof(AttentionBwdArgs);
  return nullptr;
}
