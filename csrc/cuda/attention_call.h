// Tensors of a call to the kernels' arguments, checked: shared by the attention bindings.
#pragma once

#include <algorithm>
#include <optional>

#include "attention_launch.h"
#include "bind.h"

namespace fastattn::cuda {
namespace {

Operand operand_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, "fastattn: ", name, " must have 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) <= 1 || t.numel() == 0, "fastattn: the last stride of ", name,
                  " must be 1");
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

// The arguments of attention_fwd after v; attention_bwd has the same.
struct AttentionInputs {
  double scale;
  std::optional<int64_t> band_lo, band_hi;
  const OptionalTensor &lo, &hi, &block_offsets, &block_list, &bit_tiles, &bias, &alibi_slopes;
  double softcap, dropout_p;
  const OptionalTensor &dropout_seed, &q_pos, &k_pos, &block_table, &kv_lengths, &k_scale, &v_scale, &sinks;
};

AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionInputs& in) {
  STD_TORCH_CHECK(!in.block_table && !in.kv_lengths && !in.k_scale && !in.v_scale,
                  "fastattn: paged and quantised caches are not served by the CUDA kernels yet");
  check_device(q, k, "k"), check_device(q, v, "v"), check_device(q, in.lo, "lo"),
      check_device(q, in.hi, "hi");
  check_device(q, in.block_offsets, "block_offsets"), check_device(q, in.block_list, "block_list");
  check_device(q, in.bit_tiles, "bit_tiles"), check_device(q, in.bias, "bias"),
      check_device(q, in.sinks, "sinks");
  check_device(q, in.alibi_slopes, "alibi_slopes"), check_device(q, in.dropout_seed, "dropout_seed");
  check_device(q, in.q_pos, "q_pos"), check_device(q, in.k_pos, "k_pos");
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
  a.scale = float(in.scale), a.softcap = float(in.softcap);
  a.band_lo = bound_of(in.band_lo, -kUnbounded), a.band_hi = bound_of(in.band_hi, kUnbounded);
  a.lo = range_of(in.lo, a, "lo", a.lo_batch, a.lo_head, a.lo_row);
  a.hi = range_of(in.hi, a, "hi", a.hi_batch, a.hi_head, a.hi_row);
  set_blocks(a, in.block_offsets, in.block_list, in.bit_tiles);
  if (in.bias) {
    a.bias_fp32 = in.bias->scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK((a.bias_fp32 || in.bias->scalar_type() == q.scalar_type()) && in.bias->dim() == 4,
                    "fastattn: bias must have 4 dimensions and be float32 or of q's dtype");
    a.bias = in.bias->const_data_ptr();
    a.bias_batch = broadcast_stride(*in.bias, 0, a.B, "bias"),
    a.bias_head = broadcast_stride(*in.bias, 1, a.Hq, "bias");
    a.bias_row = broadcast_stride(*in.bias, 2, a.Sq, "bias"),
    a.bias_key = broadcast_stride(*in.bias, 3, a.Sk, "bias");
  }
  if (in.alibi_slopes) {
    check_dtype(*in.alibi_slopes, ScalarType::Float, "alibi_slopes", "float32");
    STD_TORCH_CHECK(in.alibi_slopes->dim() == 2, "fastattn: alibi_slopes must have 2 dimensions");
    a.alibi_slopes = data_of<float>(in.alibi_slopes);
    a.alibi_batch = broadcast_stride(*in.alibi_slopes, 0, a.B, "alibi_slopes");
    a.alibi_head = broadcast_stride(*in.alibi_slopes, 1, a.Hq, "alibi_slopes");
  }
  if (in.sinks) {
    check_dtype(*in.sinks, ScalarType::Float, "sinks", "float32");
    STD_TORCH_CHECK(in.sinks->dim() == 1 && in.sinks->size(0) == a.Hq && in.sinks->is_contiguous(),
                    "fastattn: sinks must be a contiguous [Hq]");
    a.sinks = data_of<float>(in.sinks);
  }
  a.q_pos = positions_of(in.q_pos, a.B, a.Sq, "q_pos", a.q_pos_batch, a.q_pos_row);
  a.k_pos = positions_of(in.k_pos, a.B, a.Sk, "k_pos", a.k_pos_batch, a.k_pos_key);
  if (in.dropout_p > 0) {
    STD_TORCH_CHECK(in.dropout_seed && in.dropout_seed->numel() == 1,
                    "fastattn: dropout needs dropout_seed, one int64");
    check_dtype(*in.dropout_seed, ScalarType::Long, "dropout_seed", "int64");
    const double threshold = in.dropout_p * 4294967296.0;
    a.dropout_threshold = threshold >= 4294967295.0 ? 0xffffffffu : uint32_t(threshold);
    a.dropout_scale = float(1.0 / (1.0 - in.dropout_p));
    a.dropout_seed = data_of<int64_t>(in.dropout_seed);
  }
  return a;
}

}  // namespace
}  // namespace fastattn::cuda
