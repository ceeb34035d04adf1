// CUDA binding of attention_fwd: Hopper's kernel where it serves the call, sm_80's else.
#include <tuple>

#include "attention_call.h"

namespace fastattn::cuda {
namespace {

template <class T>
const char* run(const AttentionArgs& a, const Tensor& q, [[maybe_unused]] const OnDevice& device) {
#if defined(FASTATTN_CUDA_SM90)
  const int card = q.get_device_index();
  if (capability(card) == 90 && refuse_attention_sm90(a) == nullptr) {
    Tensor next_tile = new_on(q, {1}, ScalarType::Int);
    torch::stable::zero_(next_tile);
    auto* word = static_cast<unsigned*>(next_tile.mutable_data_ptr());
    const int multiprocessors = cuda::multiprocessors(card);
    if (a.D == 64) return start_attention_sm90<T, 64>(a, word, multiprocessors, device.stream());
    if (a.D == 128) return start_attention_sm90<T, 128>(a, word, multiprocessors, device.stream());
    return start_attention_sm90<T, 256>(a, word, multiprocessors, device.stream());
  }
#endif
  return with_head(padded_head(a.D, a.Dv),
                   [&](auto head) { return start_attention_sm80<T, head.value>(a, device.stream()); });
}

// Uninitialised [B, Hq, Sq, Dv] in q's order of heads and rows.
Tensor output_like(const Tensor& q, const AttentionArgs& a, bool fp32) {
  const ScalarType dtype = fp32 ? ScalarType::Float : q.scalar_type();
  if (q.stride(1) >= q.stride(2)) return new_on(q, {a.B, a.Hq, a.Sq, a.Dv}, dtype);
  return torch::stable::transpose(new_on(q, {a.B, a.Sq, a.Hq, a.Dv}, dtype), 1, 2);
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
  a.out_fp32 = out_fp32;
  Tensor out = output_like(q, a, out_fp32), lse = new_on(q, {a.B, a.Hq, a.Sq}, ScalarType::Float);
  if (out.numel() == 0 && lse.numel() == 0) return {out, lse};
  a.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  const OnDevice device(q);
  const char* error =
      storage_of(q, "q") == Storage::kBFloat16 ? run<bf16>(a, q, device) : run<fp16>(a, q, device);
  STD_TORCH_CHECK(error == nullptr, "fastattn: attention did not start on the device: ", error ? error : "");
  return {out, lse};
}

}  // namespace
}  // namespace fastattn::cuda

STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FASTATTN_CUDA_KEY, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastattn::cuda::attention_fwd));
}
