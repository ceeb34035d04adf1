// sm_80 attention of head sizes up to 32.
#include "attention_sm80_start.cuh"

namespace fastattn::cuda {

template const char* start_attention_sm80<bf16, 32>(const AttentionArgs&, void*);
template const char* start_attention_sm80<fp16, 32>(const AttentionArgs&, void*);

}  // namespace fastattn::cuda
