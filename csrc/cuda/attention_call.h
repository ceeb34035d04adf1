// Tensors of a call to the kernels' arguments, checked: shared by the attention bindings.
#pragma once

#include <algorithm>
#include <optional>

#include "../attention_inputs.h"
#include "attention_launch.h"
#include "bind.h"

namespace fastattn::cuda {
namespace {

int32_t bound_of(std::optional<int64_t> bound, int32_t absent) {
  return bound ? int32_t(std::clamp<int64_t>(*bound, -kUnbounded, kUnbounded)) : absent;
}

// f with T and head size as types and constants.
template <class F>
const char* with_head(int head, const F& f) {
  switch (head) {
    case 32: return f(std::integral_constant<int, 32>{});
    case 64: return f(std::integral_constant<int, 64>{});
    case 96: return f(std::integral_constant<int, 96>{});
    case 128: return f(std::integral_constant<int, 128>{});
    case 192: return f(std::integral_constant<int, 192>{});
    default: return f(std::integral_constant<int, 256>{});
  }
}

AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& o) {
  STD_TORCH_CHECK(!o.block_table && !o.kv_lengths && !o.k_scale && !o.v_scale,
                  "fastattn: paged and quantised caches are not served by the CUDA kernels yet");
  check_device(q, k, "k"), check_device(q, v, "v"), check_device(q, o.lo, "lo"), check_device(q, o.hi, "hi");
  check_device(q, o.block_offsets, "block_offsets"), check_device(q, o.block_list, "block_list");
  check_device(q, o.bit_tiles, "bit_tiles"), check_device(q, o.bias, "bias"),
      check_device(q, o.sinks, "sinks");
  check_device(q, o.alibi_slopes, "alibi_slopes"), check_device(q, o.dropout_seed, "dropout_seed");
  check_device(q, o.q_pos, "q_pos"), check_device(q, o.k_pos, "k_pos");
  AttentionArgs a{};
  for (const Tensor* t : {&q, &k, &v})
    for (const int64_t size : t->sizes())
      STD_TORCH_CHECK(size < kUnbounded, "fastattn: sizes must be below 2^30, got ", size);
  set_operands(&a, q, k, v);
  STD_TORCH_CHECK(storage_of(q, "q") != Storage::kFloat, "fastattn: q must be bfloat16 or float16");
  STD_TORCH_CHECK(padded_head(a.D, a.Dv) != 0, "fastattn: head sizes must be at most 256");
  a.band_lo = bound_of(o.band_lo, -kUnbounded), a.band_hi = bound_of(o.band_hi, kUnbounded);
  set_options(&a, q, o);
  if (o.dropout_p > 0) {
    set_dropout(&a, o.dropout_p, o.dropout_seed);
    a.dropout_seed = data_of<int64_t>(o.dropout_seed);
  }
  return a;
}

}  // namespace
}  // namespace fastattn::cuda
