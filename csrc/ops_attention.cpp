// CPU binding of attention_fwd.
#include <algorithm>
#include <initializer_list>
#include <tuple>

#include "attention_call.h"
#include "cpu/targets/targets.h"
#include "parallel.h"

namespace fastattn {
namespace {

// An uninitialised CPU tensor; straight to the allocator, since a small call is mostly overhead.
Tensor empty(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, const Tensor& like,
             bool fp32) {
  int32_t dtype = aoti_torch_dtype_float32();
  if (!fp32) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides.begin(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Keeps q's order of heads and rows, so that a model's own transpose after attention is free.
Tensor output_like(const Tensor& q, const AttentionArgs& a, bool fp32) {
  const int64_t heads = std::max<int64_t>(a.Hq, 1), rows = std::max<int64_t>(a.Sq, 1);
  const int64_t width = std::max<int64_t>(a.Dv, 1), batch = heads * rows * width;
  if (a.q.head < a.q.row) {
    return empty({a.B, a.Hq, a.Sq, a.Dv}, {batch, width, heads * width, 1}, q, fp32);
  }
  return empty({a.B, a.Hq, a.Sq, a.Dv}, {batch, rows * width, width, 1}, q, fp32);
}

void run(AttentionArgs& a, const Tensor& out, Storage storage) {
  a.out = out.mutable_data_ptr();
  a.out_batch = out.stride(0), a.out_head = out.stride(1), a.out_row = out.stride(2);
  const KernelTable& table = kernels();
  const AttentionTask task = table.attention[int(storage)];
  run_tasks(a.tasks(), table.attention_scratch(a), [&](int64_t i, void* scratch) { task(a, i, scratch); });
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
  Tensor out = output_like(q, a, out_fp32);
  Tensor lse = empty({a.B, a.Hq, a.Sq}, {a.Hq * a.Sq, a.Sq, 1}, q, true);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  run(a, out, storage_of(q, "q"));
  return {out, lse};
}

// The plain call of inference: no mask or an upper-left triangle, no LSE. Short, because at one row the
// arguments of attention_fwd would cost more than the attention.
Tensor attention_plain(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool is_causal) {
  AttentionOptions options{};
  options.scale = scale;
  if (is_causal) options.band_hi = 0;
  AttentionArgs a = attention_args(q, k, v, options);
  Tensor out = output_like(q, a, false);
  run(a, out, storage_of(q, "q"));
  return out;
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastattn::attention_fwd));
  m.impl("attention_plain", TORCH_BOX(&fastattn::attention_plain));
}
