// CUDA binding of attention_bwd: sm_80's kernels, on every card.
#include <tuple>
#include <vector>

#include "attention_call.h"

namespace fastattn::cuda {
namespace {

Tensor as_type(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, std::optional(dtype));
}

// Uninitialised in the shape of x, or of no elements where it is not needed.
Tensor empty_like(const Tensor& x, bool needed, bool fp32) {
  const ScalarType dtype = fp32 ? ScalarType::Float : x.scalar_type();
  return needed ? new_on(x, x.sizes(), dtype) : new_on(x, {0}, dtype);
}

// The same in the order of heads and rows of x [B, H, S, D].
Tensor gradient_like(const Tensor& x, bool needed, bool fp32, Result* g) {
  const bool rows_first = needed && x.stride(1) < x.stride(2);
  Tensor t = empty_like(rows_first ? torch::stable::transpose(x, 1, 2) : x, needed, fp32);
  if (rows_first) t = torch::stable::transpose(t, 1, 2);
  if (needed) *g = {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  return t;
}

template <class T>
T* memory_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Sums of a call's heads, [B, Hq], over what the result [1 or B, 1 or Hq] shares, in a fixed order.
void sum_heads(const Tensor& parts, const Tensor& result, bool by_batch, bool by_head, void* stream) {
  const int64_t B = parts.size(0), H = parts.size(1);
  const float* from = memory_of<float>(parts);
  float* to = memory_of<float>(result);
  const Tensor between = new_on(parts, {B}, ScalarType::Float);
  if (by_head) {
    check_launch(start_sums(from, by_batch ? B : 1, by_batch ? 1 : B, H, to, stream), "attention_bwd");
    return;
  }
  float* each = by_batch ? to : memory_of<float>(between);
  check_launch(start_sums(from, B, H, 1, each, stream), "attention_bwd");
  if (!by_batch) check_launch(start_sums(each, 1, B, 1, to, stream), "attention_bwd");
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_bwd(const Tensor& dout, OptionalTensor dlse, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& out, const Tensor& lse, double scale,
                        std::optional<int64_t> band_lo, std::optional<int64_t> band_hi, OptionalTensor lo,
                        OptionalTensor hi, OptionalTensor block_offsets, OptionalTensor block_list,
                        OptionalTensor block_offsets_t, OptionalTensor block_list_t, OptionalTensor bit_tiles,
                        OptionalTensor bias, OptionalTensor alibi_slopes, double softcap, double dropout_p,
                        OptionalTensor dropout_seed, OptionalTensor q_pos, OptionalTensor k_pos,
                        OptionalTensor block_table, OptionalTensor kv_lengths, OptionalTensor k_scale,
                        OptionalTensor v_scale, OptionalTensor sinks, std::vector<bool> needs,
                        bool grads_fp32) {
  AttentionBwdArgs a{};
  static_cast<AttentionArgs&>(a) = attention_args(
      q, k, v, {scale,     band_lo,     band_hi,      lo,      hi,        block_offsets, block_list,
                bit_tiles, bias,        alibi_slopes, softcap, dropout_p, dropout_seed,  q_pos,
                k_pos,     block_table, kv_lengths,   k_scale, v_scale,   sinks});
  STD_TORCH_CHECK(needs.size() == 6,
                  "fastattn: needs has one entry each for q, k, v, bias, alibi_slopes, sinks");
  check_device(q, dout, "dout"), check_device(q, dlse, "dlse"), check_device(q, out, "out");
  check_device(q, lse, "lse"), check_device(q, block_offsets_t, "block_offsets_t");
  check_device(q, block_list_t, "block_list_t");
  check_results(a, dout, out, lse);
  set_transposed_blocks(&a, block_offsets_t, block_list_t);

  const Tensor result = with_adjacent_columns(out);
  const Tensor gradient = with_adjacent_columns(as_type(dout, q.scalar_type()));
  set_operand(&a.dout, gradient, "dout");
  a.out_fp32 = result.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(a.out_fp32 || result.scalar_type() == q.scalar_type(),
                  "fastattn: out must be float32 or q's dtype");
  Operand given;
  set_operand(&given, result, "out");
  a.out = {const_cast<void*>(given.data), given.batch, given.head, given.row};  // read only here
  const Tensor given_lse = torch::stable::contiguous(lse);
  a.lse = static_cast<float*>(const_cast<void*>(given_lse.const_data_ptr()));
  const Tensor given_dlse = dlse ? torch::stable::contiguous(as_type(*dlse, ScalarType::Float)) : given_lse;
  STD_TORCH_CHECK(given_dlse.numel() == lse.numel(), "fastattn: dlse must have lse's shape");
  if (dlse) a.dlse = static_cast<const float*>(given_dlse.const_data_ptr());

  const Tensor statistics = new_on(q, {2, a.B, a.Hq, a.Sq}, ScalarType::Float);
  const Tensor extents = new_on(q, {a.B, a.Hq, (a.Sq + 63) / 64, 4}, ScalarType::Int);
  a.exponent = memory_of<float>(statistics);
  a.delta = a.exponent + int64_t(a.B) * a.Hq * a.Sq;
  a.extents = memory_of<int32_t>(extents);

  a.grads_fp32 = grads_fp32;
  Tensor dq = gradient_like(q, needs[0], grads_fp32, &a.dq);
  Tensor dk = gradient_like(k, needs[1], grads_fp32, &a.dk);
  Tensor dv = gradient_like(v, needs[2], grads_fp32, &a.dv);
  const bool needs_bias = needs[3] && bias, needs_slopes = needs[4] && alibi_slopes;
  const bool needs_sinks = needs[5] && sinks;
  Tensor dbias = empty_like(bias ? *bias : q, needs_bias, grads_fp32);
  if (needs_bias) {
    a.dbias = dbias.mutable_data_ptr(), a.dbias_fp32 = grads_fp32 || a.bias_fp32;
    a.bias_B = int32_t(bias->size(0)), a.bias_H = int32_t(bias->size(1));
    a.bias_Sq = int32_t(bias->size(2)), a.bias_Sk = int32_t(bias->size(3));
  }
  const Tensor heads = new_on(q, {2, a.B, a.Hq}, ScalarType::Float);
  const Tensor slope_parts = torch::stable::select(heads, 0, 0);
  const Tensor sink_parts = torch::stable::select(heads, 0, 1);
  const Tensor sink_terms = new_on(q, {a.B, a.Hq, needs_sinks ? a.Sq : 0}, ScalarType::Float);
  if (needs_slopes) a.dslopes = memory_of<float>(slope_parts);
  if (needs_sinks) a.dsinks = memory_of<float>(sink_parts), a.sink_terms = memory_of<float>(sink_terms);

  const OnDevice device(q);
  const bool is_bf16 = storage_of(q, "q") == Storage::kBFloat16;
  const char* error = with_head(padded_head(a.D, a.Dv), [&](auto head) {
    return is_bf16 ? start_attention_bwd_sm80<bf16, head.value>(a, device.stream())
                   : start_attention_bwd_sm80<fp16, head.value>(a, device.stream());
  });
  STD_TORCH_CHECK(error == nullptr,
                  "fastattn: the backward did not start on the device: ", error ? error : "");
  Tensor dslopes = empty_like(alibi_slopes ? *alibi_slopes : lse, needs_slopes, false);
  if (needs_slopes && dslopes.numel() > 0) {
    sum_heads(slope_parts, dslopes, dslopes.size(0) == a.B, dslopes.size(1) == a.Hq, device.stream());
  }
  Tensor dsinks = empty_like(sinks ? *sinks : lse, needs_sinks, false);
  if (needs_sinks && dsinks.numel() > 0) sum_heads(sink_parts, dsinks, false, true, device.stream());
  return {dq, dk, dv, dbias, dslopes, dsinks};
}

}  // namespace
}  // namespace fastattn::cuda

STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FASTATTN_CUDA_KEY, m) {
  m.impl("attention_bwd", TORCH_BOX(&fastattn::cuda::attention_bwd));
}
