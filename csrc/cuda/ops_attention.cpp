// CUDA binding of attention_fwd: Hopper's kernel where it serves the call, sm_80's else.
#include <algorithm>
#include <tuple>

#include "attention_launch.h"
#include "bind.h"

namespace fastattn::cuda {
namespace {

Operand operand_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, "fastattn: ", name, " must have 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) <= 1, "fastattn: the last stride of ", name, " must be 1");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
const T* data_of(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

const int32_t* range_of(const OptionalTensor& t, const AttentionArgs& a, const char* name, int64_t& batch,
                        int64_t& head, int64_t& row) {
  if (!t) return nullptr;
  check_dtype(*t, ScalarType::Int, name, "int32");
  STD_TORCH_CHECK(t->dim() == 3, "fastattn: ", name, " must have 3 dimensions");
  batch = broadcast_stride(*t, 0, a.B, name), head = broadcast_stride(*t, 1, a.Hq, name);
  row = broadcast_stride(*t, 2, a.Sq, name);
  return data_of<int32_t>(t);
}

const int32_t* positions_of(const OptionalTensor& t, int64_t batch, int64_t length, const char* name,
                            int64_t& batch_stride, int64_t& stride) {
  if (!t) return nullptr;
  check_dtype(*t, ScalarType::Int, name, "int32");
  STD_TORCH_CHECK(t->dim() == 2, "fastattn: ", name, " must have 2 dimensions");
  batch_stride = broadcast_stride(*t, 0, batch, name), stride = broadcast_stride(*t, 1, length, name);
  return data_of<int32_t>(t);
}

int32_t bound_of(std::optional<int64_t> bound, int32_t absent) {
  return bound ? int32_t(std::clamp<int64_t>(*bound, -kUnbounded, kUnbounded)) : absent;
}

void set_blocks(AttentionArgs& a, const OptionalTensor& offsets, const OptionalTensor& list,
                const OptionalTensor& tiles) {
  if (!offsets) return;
  STD_TORCH_CHECK(list && tiles, "fastattn: block_offsets, block_list and bit_tiles come together");
  check_dtype(*offsets, ScalarType::Int, "block_offsets", "int32");
  check_dtype(*list, ScalarType::Int, "block_list", "int32");
  check_dtype(*tiles, ScalarType::Long, "bit_tiles", "int64");
  STD_TORCH_CHECK(offsets->dim() == 3 && offsets->size(2) == (a.Sq + 63) / 64 + 1 &&
                      offsets->is_contiguous() && list->is_contiguous() && tiles->is_contiguous(),
                  "fastattn: block_offsets must be a contiguous [B or 1, Hq or 1, ceil(Sq / 64) + 1]");
  a.map_batch = broadcast_stride(*offsets, 0, a.B, "block_offsets");
  a.map_head = broadcast_stride(*offsets, 1, a.Hq, "block_offsets");
  a.block_offsets = data_of<int32_t>(offsets), a.block_list = data_of<int32_t>(list);
  a.bit_tiles = data_of<uint64_t>(tiles);
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
  STD_TORCH_CHECK(!block_table && !kv_lengths && !k_scale && !v_scale,
                  "fastattn: paged and quantised caches are not served by the CUDA kernels yet");
  check_device(q, k, "k"), check_device(q, v, "v"), check_device(q, lo, "lo"), check_device(q, hi, "hi");
  check_device(q, block_offsets, "block_offsets"), check_device(q, block_list, "block_list");
  check_device(q, bit_tiles, "bit_tiles"), check_device(q, bias, "bias"), check_device(q, sinks, "sinks");
  check_device(q, alibi_slopes, "alibi_slopes"), check_device(q, dropout_seed, "dropout_seed");
  check_device(q, q_pos, "q_pos"), check_device(q, k_pos, "k_pos");
  AttentionArgs a{};
  a.q = operand_of(q, "q"), a.k = operand_of(k, "k"), a.v = operand_of(v, "v");
  const int64_t sizes[] = {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3)};
  for (const int64_t size : sizes)
    STD_TORCH_CHECK(size < kUnbounded, "fastattn: sizes must be below 2^30, got ", size);
  a.B = int32_t(sizes[0]), a.Hq = int32_t(sizes[1]), a.Hkv = int32_t(sizes[2]), a.Sq = int32_t(sizes[3]);
  a.Sk = int32_t(sizes[4]), a.D = int32_t(sizes[5]), a.Dv = int32_t(sizes[6]);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "fastattn: q, k and v must have one dtype");
  const Storage storage = storage_of(q, "q");
  STD_TORCH_CHECK(storage != Storage::kFloat, "fastattn: q must be bfloat16 or float16");
  STD_TORCH_CHECK(padded_head(a.D, a.Dv) != 0, "fastattn: head sizes must be at most 256");
  STD_TORCH_CHECK(k.size(0) == a.B && v.size(0) == a.B && v.size(1) == a.Hkv && v.size(2) == a.Sk &&
                      k.size(3) == a.D && (a.Hkv == 0 ? a.Hq == 0 : a.Hq % a.Hkv == 0),
                  "fastattn: the shapes of q, k and v do not fit");
  a.scale = float(scale), a.softcap = float(softcap), a.out_fp32 = out_fp32;
  a.band_lo = bound_of(band_lo, -kUnbounded), a.band_hi = bound_of(band_hi, kUnbounded);
  a.lo = range_of(lo, a, "lo", a.lo_batch, a.lo_head, a.lo_row);
  a.hi = range_of(hi, a, "hi", a.hi_batch, a.hi_head, a.hi_row);
  set_blocks(a, block_offsets, block_list, bit_tiles);
  if (bias) {
    a.bias_fp32 = bias->scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK((a.bias_fp32 || bias->scalar_type() == q.scalar_type()) && bias->dim() == 4,
                    "fastattn: bias must have 4 dimensions and be float32 or of q's dtype");
    a.bias = bias->const_data_ptr();
    a.bias_batch = broadcast_stride(*bias, 0, a.B, "bias"),
    a.bias_head = broadcast_stride(*bias, 1, a.Hq, "bias");
    a.bias_row = broadcast_stride(*bias, 2, a.Sq, "bias"),
    a.bias_key = broadcast_stride(*bias, 3, a.Sk, "bias");
  }
  if (alibi_slopes) {
    check_dtype(*alibi_slopes, ScalarType::Float, "alibi_slopes", "float32");
    STD_TORCH_CHECK(alibi_slopes->dim() == 2, "fastattn: alibi_slopes must have 2 dimensions");
    a.alibi_slopes = data_of<float>(alibi_slopes);
    a.alibi_batch = broadcast_stride(*alibi_slopes, 0, a.B, "alibi_slopes");
    a.alibi_head = broadcast_stride(*alibi_slopes, 1, a.Hq, "alibi_slopes");
  }
  if (sinks) {
    check_dtype(*sinks, ScalarType::Float, "sinks", "float32");
    STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == a.Hq && sinks->is_contiguous(),
                    "fastattn: sinks must be a contiguous [Hq]");
    a.sinks = data_of<float>(sinks);
  }
  a.q_pos = positions_of(q_pos, a.B, a.Sq, "q_pos", a.q_pos_batch, a.q_pos_row);
  a.k_pos = positions_of(k_pos, a.B, a.Sk, "k_pos", a.k_pos_batch, a.k_pos_key);
  if (dropout_p > 0) {
    STD_TORCH_CHECK(dropout_seed && dropout_seed->numel() == 1,
                    "fastattn: dropout needs dropout_seed, one int64");
    check_dtype(*dropout_seed, ScalarType::Long, "dropout_seed", "int64");
    const double threshold = dropout_p * 4294967296.0;
    a.dropout_threshold = threshold >= 4294967295.0 ? 0xffffffffu : uint32_t(threshold);
    a.dropout_scale = float(1.0 / (1.0 - dropout_p));
    a.dropout_seed = data_of<int64_t>(dropout_seed);
  }
  Tensor out = output_like(q, a, out_fp32), lse = new_on(q, {a.B, a.Hq, a.Sq}, ScalarType::Float);
  if (out.numel() == 0 && lse.numel() == 0) return {out, lse};
  a.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  const OnDevice device(q);
  const char* error = storage == Storage::kBFloat16 ? run<bf16>(a, q, device) : run<fp16>(a, q, device);
  STD_TORCH_CHECK(error == nullptr, "fastattn: attention did not start on the device: ", error ? error : "");
  return {out, lse};
}

}  // namespace
}  // namespace fastattn::cuda

STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FASTATTN_CUDA_KEY, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastattn::cuda::attention_fwd));
}
