// Hopper's attention of head size 128.
#include "attention_sm90_start.cuh"

namespace fastattn::cuda {

template const char* start_attention_sm90<bf16, 128>(const AttentionArgs&, unsigned*, int, void*);
template const char* start_attention_sm90<fp16, 128>(const AttentionArgs&, unsigned*, int, void*);

}  // namespace fastattn::cuda
