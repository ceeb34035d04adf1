// From the tensors of attention_fwd and attention_bwd to the arguments of the CPU kernels.
#pragma once

#include "attention_inputs.h"
#include "cpu/attention_args.h"
#include "parallel.h"

namespace fastattn {

inline AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const AttentionOptions& o) {
  STD_TORCH_CHECK(!o.block_table && !o.kv_lengths && !o.k_scale && !o.v_scale,
                  "fastattn: paged and quantised caches are not served on the CPU yet");
  AttentionArgs a{};
  a.storage = storage_of(q, "q");
  a.call = next_call();
  set_operands(&a, q, k, v);
  STD_TORCH_CHECK(a.Sk < INT32_MAX && a.Sq < INT32_MAX,
                  "fastattn: q and k must have fewer than 2^31 - 1 rows, got ", a.Sq, " and ", a.Sk);
  a.has_band_lo = o.band_lo.has_value(), a.has_band_hi = o.band_hi.has_value();
  a.band_lo = o.band_lo.value_or(0), a.band_hi = o.band_hi.value_or(0);
  set_options(&a, q, o);
  if (o.dropout_p > 0) {
    set_dropout(&a, o.dropout_p, o.dropout_seed);
    a.dropout = true;
    a.dropout_seed = *data_of<uint64_t>(o.dropout_seed);
  }
  return a;
}

}  // namespace fastattn
