// Hopper's attention of head size 256.
#include "attention_sm90_start.cuh"

namespace fastattn::cuda {

template const char* start_attention_sm90<bf16, 256>(const AttentionArgs&, unsigned*, int, void*);
template const char* start_attention_sm90<fp16, 256>(const AttentionArgs&, unsigned*, int, void*);

}  // namespace fastattn::cuda
