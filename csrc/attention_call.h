// From the tensors of attention_fwd and attention_bwd to the arguments of the CPU kernels.
#pragma once

#include <atomic>

#include "bind.h"
#include "cpu/attention_args.h"

namespace fastattn {

inline Operand operand_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, "fastattn: ", name, " must have 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) <= 1 || t.numel() == 0, "fastattn: the last stride of ", name,
                  " must be 1");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline const int32_t* range_of(const OptionalTensor& t, const AttentionArgs& a, const char* name,
                               int64_t* strides) {
  if (!t) return nullptr;
  check_dtype(*t, ScalarType::Int, name, "int32");
  STD_TORCH_CHECK(t->dim() == 3, "fastattn: ", name, " must have 3 dimensions");
  strides[0] = broadcast_stride(*t, 0, a.B, name);
  strides[1] = broadcast_stride(*t, 1, a.Hq, name);
  strides[2] = broadcast_stride(*t, 2, a.Sq, name);
  return static_cast<const int32_t*>(t->const_data_ptr());
}

inline const int32_t* positions_of(const OptionalTensor& t, int64_t batch, int64_t length, const char* name,
                                   int64_t* batch_stride, int64_t* stride) {
  if (!t) return nullptr;
  check_dtype(*t, ScalarType::Int, name, "int32");
  STD_TORCH_CHECK(t->dim() == 2, "fastattn: ", name, " must have 2 dimensions");
  *batch_stride = broadcast_stride(*t, 0, batch, name);
  *stride = broadcast_stride(*t, 1, length, name);
  return static_cast<const int32_t*>(t->const_data_ptr());
}

inline void set_blocks(AttentionArgs* a, const OptionalTensor& offsets, const OptionalTensor& list,
                       const OptionalTensor& tiles) {
  if (!offsets) return;
  STD_TORCH_CHECK(list && tiles, "fastattn: block_offsets, block_list and bit_tiles come together");
  check_dtype(*offsets, ScalarType::Int, "block_offsets", "int32");
  check_dtype(*list, ScalarType::Int, "block_list", "int32");
  check_dtype(*tiles, ScalarType::Long, "bit_tiles", "int64");
  STD_TORCH_CHECK(offsets->dim() == 3 && offsets->size(2) == a->q_blocks() + 1 && offsets->is_contiguous() &&
                      list->is_contiguous() && tiles->is_contiguous(),
                  "fastattn: block_offsets must be a contiguous [B or 1, Hq or 1, ceil(Sq / 64) + 1]");
  a->map_batch = broadcast_stride(*offsets, 0, a->B, "block_offsets");
  a->map_head = broadcast_stride(*offsets, 1, a->Hq, "block_offsets");
  a->block_offsets = static_cast<const int32_t*>(offsets->const_data_ptr());
  a->block_list = static_cast<const int32_t*>(list->const_data_ptr());
  a->bit_tiles = static_cast<const uint64_t*>(tiles->const_data_ptr());
}

inline void set_bias(AttentionArgs* a, const OptionalTensor& bias, const Tensor& q) {
  if (!bias) return;
  a->bias_fp32 = bias->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(a->bias_fp32 || bias->scalar_type() == q.scalar_type(),
                  "fastattn: bias must be float32 or q's dtype");
  STD_TORCH_CHECK(bias->dim() == 4, "fastattn: bias must have 4 dimensions");
  a->bias = bias->const_data_ptr();
  a->bias_batch = broadcast_stride(*bias, 0, a->B, "bias");
  a->bias_head = broadcast_stride(*bias, 1, a->Hq, "bias");
  a->bias_row = broadcast_stride(*bias, 2, a->Sq, "bias");
  a->bias_key = broadcast_stride(*bias, 3, a->Sk, "bias");
}

inline void set_dropout(AttentionArgs* a, double p, const OptionalTensor& seed) {
  if (p == 0) return;
  STD_TORCH_CHECK(seed.has_value() && seed->numel() == 1, "fastattn: dropout needs dropout_seed, one int64");
  check_dtype(*seed, ScalarType::Long, "dropout_seed", "int64");
  const double threshold = p * 4294967296.0;
  a->dropout = true;
  a->dropout_threshold = threshold >= 4294967295.0 ? 0xffffffffu : uint32_t(threshold);
  a->dropout_scale = float(1.0 / (1.0 - p));
  a->dropout_seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
}

// Spread over 64 bits, so that leftovers of other kernels in a scratch do not pass for one.
inline uint64_t next_call() {
  static std::atomic<uint64_t> calls{0};
  return (calls.fetch_add(1, std::memory_order_relaxed) + 1) * 0x9e3779b97f4a7c15ull;
}

// Everything of the schema between v and out_fp32, in its order.
struct AttentionOptions {
  double scale;
  std::optional<int64_t> band_lo, band_hi;
  OptionalTensor lo, hi, block_offsets, block_list, bit_tiles, bias, alibi_slopes;
  double softcap, dropout_p;
  OptionalTensor dropout_seed, q_pos, k_pos, block_table, kv_lengths, k_scale, v_scale, sinks;
};

inline AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const AttentionOptions& o) {
  STD_TORCH_CHECK(!o.block_table && !o.kv_lengths && !o.k_scale && !o.v_scale,
                  "fastattn: paged and quantised caches are not served on the CPU yet");
  AttentionArgs a{};
  a.q = operand_of(q, "q"), a.k = operand_of(k, "k"), a.v = operand_of(v, "v");
  a.B = q.size(0), a.Hq = q.size(1), a.Sq = q.size(2), a.D = q.size(3);
  a.Hkv = k.size(1), a.Sk = k.size(2), a.Dv = v.size(3);
  a.storage = storage_of(q, "q");
  a.call = next_call();
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "fastattn: q, k and v must have one dtype");
  STD_TORCH_CHECK(k.size(0) == a.B && v.size(0) == a.B && v.size(1) == a.Hkv && v.size(2) == a.Sk &&
                      k.size(3) == a.D && (a.Hkv == 0 ? a.Hq == 0 : a.Hq % a.Hkv == 0),
                  "fastattn: the shapes of q, k and v do not fit");
  STD_TORCH_CHECK(a.Sk < INT32_MAX && a.Sq < INT32_MAX, "fastattn: sequences must be shorter than 2^31 - 1");
  a.scale = float(o.scale), a.softcap = float(o.softcap);
  a.has_band_lo = o.band_lo.has_value(), a.has_band_hi = o.band_hi.has_value();
  a.band_lo = o.band_lo.value_or(0), a.band_hi = o.band_hi.value_or(0);
  int64_t strides[3] = {};
  a.lo = range_of(o.lo, a, "lo", strides);
  a.lo_batch = strides[0], a.lo_head = strides[1], a.lo_row = strides[2];
  a.hi = range_of(o.hi, a, "hi", strides);
  a.hi_batch = strides[0], a.hi_head = strides[1], a.hi_row = strides[2];
  set_blocks(&a, o.block_offsets, o.block_list, o.bit_tiles);
  set_bias(&a, o.bias, q);
  set_dropout(&a, o.dropout_p, o.dropout_seed);
  a.q_pos = positions_of(o.q_pos, a.B, a.Sq, "q_pos", &a.q_pos_batch, &a.q_pos_row);
  a.k_pos = positions_of(o.k_pos, a.B, a.Sk, "k_pos", &a.k_pos_batch, &a.k_pos_key);
  if (o.alibi_slopes) {
    check_dtype(*o.alibi_slopes, ScalarType::Float, "alibi_slopes", "float32");
    STD_TORCH_CHECK(o.alibi_slopes->dim() == 2, "fastattn: alibi_slopes must have 2 dimensions");
    a.alibi_slopes = static_cast<const float*>(o.alibi_slopes->const_data_ptr());
    a.alibi_batch = broadcast_stride(*o.alibi_slopes, 0, a.B, "alibi_slopes");
    a.alibi_head = broadcast_stride(*o.alibi_slopes, 1, a.Hq, "alibi_slopes");
  }
  if (o.sinks) {
    check_dtype(*o.sinks, ScalarType::Float, "sinks", "float32");
    STD_TORCH_CHECK(o.sinks->dim() == 1 && o.sinks->size(0) == a.Hq && o.sinks->is_contiguous(),
                    "fastattn: sinks must be a contiguous [Hq]");
    a.sinks = static_cast<const float*>(o.sinks->const_data_ptr());
  }
  return a;
}

}  // namespace fastattn
