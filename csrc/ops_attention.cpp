// CPU binding of attention_fwd.
#include <tuple>

#include "attention_call.h"
#include "cpu/targets/targets.h"
#include "parallel.h"

namespace fastattn {
namespace {

// Keeps q's order of heads and rows, so that a model's own transpose after attention is free.
Tensor output_like(const Tensor& q, int64_t width, bool fp32) {
  const ScalarType dtype = fp32 ? ScalarType::Float : q.scalar_type();
  if (q.stride(1) < q.stride(2)) {
    return torch::stable::transpose(
        torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), width}, dtype), 1, 2);
  }
  return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), width}, dtype);
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                         std::optional<int64_t> band_lo, std::optional<int64_t> band_hi,
                                         OptionalTensor lo, OptionalTensor hi, OptionalTensor block_offsets,
                                         OptionalTensor block_list, OptionalTensor bit_tiles,
                                         OptionalTensor bias, OptionalTensor alibi_slopes, double softcap,
                                         double dropout_p, OptionalTensor dropout_seed, OptionalTensor q_pos,
                                         OptionalTensor k_pos, OptionalTensor block_table,
                                         OptionalTensor kv_lengths, OptionalTensor k_scale,
                                         OptionalTensor v_scale, OptionalTensor sinks, bool out_fp32) {
  AttentionArgs a = attention_args(
      q, k, v, {scale,     band_lo,     band_hi,      lo,      hi,        block_offsets, block_list,
                bit_tiles, bias,        alibi_slopes, softcap, dropout_p, dropout_seed,  q_pos,
                k_pos,     block_table, kv_lengths,   k_scale, v_scale,   sinks});
  Tensor out = output_like(q, a.Dv, out_fp32);
  Tensor lse = torch::stable::new_empty(q, {a.B, a.Hq, a.Sq}, ScalarType::Float);
  a.out = out.mutable_data_ptr(), a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.out_batch = out.stride(0), a.out_head = out.stride(1), a.out_row = out.stride(2), a.out_fp32 = out_fp32;
  const KernelTable& table = kernels();
  const AttentionTask task = table.attention[int(storage_of(q, "q"))];
  run_tasks(a.tasks(), table.attention_scratch(a), [&](int64_t i, void* scratch) { task(a, i, scratch); });
  return {out, lse};
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("attention_fwd", TORCH_BOX(&fastattn::attention_fwd)); }
