// The sm_80 backward of head sizes up to 192.
#include "attention_bwd_sm80_start.cuh"

namespace fastattn::cuda {

template const char* start_attention_bwd_sm80<bf16, 192>(const AttentionBwdArgs&, void*);
template const char* start_attention_bwd_sm80<fp16, 192>(const AttentionBwdArgs&, void*);

}  // namespace fastattn::cuda
