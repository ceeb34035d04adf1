// Hopper's attention of head size 64.
#include "attention_sm90_start.cuh"

namespace fastattn::cuda {

const char* refuse_attention_sm90(const AttentionArgs& a) { return attention_sm90_refusal(a); }

template const char* start_attention_sm90<bf16, 64>(const AttentionArgs&, unsigned*, int, void*);
template const char* start_attention_sm90<fp16, 64>(const AttentionArgs&, unsigned*, int, void*);

}  // namespace fastattn::cuda
