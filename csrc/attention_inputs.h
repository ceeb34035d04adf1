// What the attention bindings of the CPU and of CUDA read from a call alike. `Args` are either's arguments of
// the kernels: both name their fields the same.
#pragma once

#include "bind.h"

namespace fastattn {

// Everything of the schema between v and out_fp32, in its order.
struct AttentionOptions {
  double scale;
  std::optional<int64_t> band_lo, band_hi;
  OptionalTensor lo, hi, block_offsets, block_list, bit_tiles, bias, alibi_slopes;
  double softcap, dropout_p;
  OptionalTensor dropout_seed, q_pos, k_pos, block_table, kv_lengths, k_scale, v_scale, sinks;
};

// Of a call with an upper-left triangle or none, and ranges of keys or none.
inline AttentionOptions plain_options(double scale, bool is_causal, OptionalTensor lo = {},
                                      OptionalTensor hi = {}) {
  AttentionOptions options{};
  options.scale = scale, options.lo = lo, options.hi = hi;
  if (is_causal) options.band_hi = 0;
  return options;
}

template <class T>
const T* data_of(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <class Operand>
void set_operand(Operand* operand, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, "fastattn: ", name, " must have 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) <= 1 || t.numel() == 0, "fastattn: the last stride of ", name,
                  " must be 1");
  *operand = {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

template <class Args>
const int32_t* range_of(const OptionalTensor& t, const Args& a, const char* name, int64_t* batch,
                        int64_t* head, int64_t* row) {
  if (!t) return nullptr;
  check_dtype(*t, ScalarType::Int, name, "int32");
  STD_TORCH_CHECK(t->dim() == 3, "fastattn: ", name, " must have 3 dimensions");
  *batch = broadcast_stride(*t, 0, a.B, name), *head = broadcast_stride(*t, 1, a.Hq, name);
  *row = broadcast_stride(*t, 2, a.Sq, name);
  return data_of<int32_t>(t);
}

inline const int32_t* positions_of(const OptionalTensor& t, int64_t batch, int64_t length, const char* name,
                                   int64_t* batch_stride, int64_t* stride) {
  if (!t) return nullptr;
  check_dtype(*t, ScalarType::Int, name, "int32");
  STD_TORCH_CHECK(t->dim() == 2, "fastattn: ", name, " must have 2 dimensions");
  *batch_stride = broadcast_stride(*t, 0, batch, name), *stride = broadcast_stride(*t, 1, length, name);
  return data_of<int32_t>(t);
}

template <class Args>
void set_blocks(Args* a, const AttentionOptions& o) {
  if (!o.block_offsets) return;
  STD_TORCH_CHECK(o.block_list && o.bit_tiles,
                  "fastattn: block_offsets, block_list and bit_tiles come together");
  const Tensor &offsets = *o.block_offsets, &list = *o.block_list, &tiles = *o.bit_tiles;
  check_dtype(offsets, ScalarType::Int, "block_offsets", "int32");
  check_dtype(list, ScalarType::Int, "block_list", "int32");
  check_dtype(tiles, ScalarType::Long, "bit_tiles", "int64");
  STD_TORCH_CHECK(offsets.dim() == 3 && offsets.size(2) == (a->Sq + 63) / 64 + 1 && offsets.is_contiguous() &&
                      list.is_contiguous() && tiles.is_contiguous(),
                  "fastattn: block_offsets must be a contiguous [B or 1, Hq or 1, ceil(Sq / 64) + 1]");
  a->map_batch = broadcast_stride(offsets, 0, a->B, "block_offsets");
  a->map_head = broadcast_stride(offsets, 1, a->Hq, "block_offsets");
  a->block_offsets = data_of<int32_t>(o.block_offsets), a->block_list = data_of<int32_t>(o.block_list);
  a->bit_tiles = data_of<uint64_t>(o.bit_tiles);
}

template <class Args>
void set_transposed_blocks(Args* a, const OptionalTensor& offsets, const OptionalTensor& list) {
  if (!a->block_offsets) return;
  STD_TORCH_CHECK(offsets && list, "fastattn: the backward needs block_offsets_t and block_list_t");
  check_dtype(*offsets, ScalarType::Int, "block_offsets_t", "int32");
  check_dtype(*list, ScalarType::Int, "block_list_t", "int32");
  STD_TORCH_CHECK(offsets->dim() == 3 && offsets->size(2) == (a->Sk + 63) / 64 + 1 &&
                      offsets->is_contiguous() && list->is_contiguous(),
                  "fastattn: block_offsets_t must be a contiguous [B or 1, Hq or 1, ceil(Sk / 64) + 1]");
  a->map_t_batch = broadcast_stride(*offsets, 0, a->B, "block_offsets_t");
  a->map_t_head = broadcast_stride(*offsets, 1, a->Hq, "block_offsets_t");
  a->block_offsets_t = data_of<int32_t>(offsets), a->block_list_t = data_of<int32_t>(list);
}

template <class Args>
void set_bias(Args* a, const OptionalTensor& bias, const Tensor& q) {
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

// The seed stays where it is: the CPU reads it, a kernel of CUDA does.
template <class Args>
void set_dropout(Args* a, double p, const OptionalTensor& seed) {
  STD_TORCH_CHECK(seed.has_value() && seed->numel() == 1, "fastattn: dropout needs dropout_seed, one int64");
  check_dtype(*seed, ScalarType::Long, "dropout_seed", "int64");
  const double threshold = p * 4294967296.0;
  a->dropout_threshold = threshold >= 4294967295.0 ? 0xffffffffu : uint32_t(threshold);
  a->dropout_scale = float(1.0 / (1.0 - p));
}

// q, k and v, and the sizes that they give.
template <class Args>
void set_operands(Args* a, const Tensor& q, const Tensor& k, const Tensor& v) {
  set_operand(&a->q, q, "q"), set_operand(&a->k, k, "k"), set_operand(&a->v, v, "v");
  using Size = decltype(a->B);
  a->B = Size(q.size(0)), a->Hq = Size(q.size(1)), a->Sq = Size(q.size(2)), a->D = Size(q.size(3));
  a->Hkv = Size(k.size(1)), a->Sk = Size(k.size(2)), a->Dv = Size(v.size(3));
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "fastattn: q, k and v must have one dtype");
  STD_TORCH_CHECK(k.size(0) == a->B && v.size(0) == a->B && v.size(1) == a->Hkv && v.size(2) == a->Sk &&
                      k.size(3) == a->D && (a->Hkv == 0 ? a->Hq == 0 : a->Hq % a->Hkv == 0),
                  "fastattn: the shapes of q, k and v do not fit");
}

// Of the options all but the bands and the dropout.
template <class Args>
void set_options(Args* a, const Tensor& q, const AttentionOptions& o) {
  a->scale = float(o.scale), a->softcap = float(o.softcap);
  a->lo = range_of(o.lo, *a, "lo", &a->lo_batch, &a->lo_head, &a->lo_row);
  a->hi = range_of(o.hi, *a, "hi", &a->hi_batch, &a->hi_head, &a->hi_row);
  set_blocks(a, o);
  set_bias(a, o.bias, q);
  a->q_pos = positions_of(o.q_pos, a->B, a->Sq, "q_pos", &a->q_pos_batch, &a->q_pos_row);
  a->k_pos = positions_of(o.k_pos, a->B, a->Sk, "k_pos", &a->k_pos_batch, &a->k_pos_key);
  if (o.alibi_slopes) {
    check_dtype(*o.alibi_slopes, ScalarType::Float, "alibi_slopes", "float32");
    STD_TORCH_CHECK(o.alibi_slopes->dim() == 2, "fastattn: alibi_slopes must have 2 dimensions");
    a->alibi_slopes = data_of<float>(o.alibi_slopes);
    a->alibi_batch = broadcast_stride(*o.alibi_slopes, 0, a->B, "alibi_slopes");
    a->alibi_head = broadcast_stride(*o.alibi_slopes, 1, a->Hq, "alibi_slopes");
  }
  if (o.sinks) {
    check_dtype(*o.sinks, ScalarType::Float, "sinks", "float32");
    STD_TORCH_CHECK(o.sinks->dim() == 1 && o.sinks->size(0) == a->Hq && o.sinks->is_contiguous(),
                    "fastattn: sinks must be a contiguous [Hq]");
    a->sinks = data_of<float>(o.sinks);
  }
}

// Of a call of the backward: that dout, out and lse have the forward's shapes.
template <class Args>
void check_results(const Args& a, const Tensor& dout, const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(out.dim() == 4 && out.size(0) == a.B && out.size(1) == a.Hq && out.size(2) == a.Sq &&
                      out.size(3) == a.Dv && dout.dim() == 4 && dout.size(0) == a.B && dout.size(1) == a.Hq &&
                      dout.size(2) == a.Sq && dout.size(3) == a.Dv,
                  "fastattn: dout and out must have the shape of the attention's result");
  check_dtype(lse, ScalarType::Float, "lse", "float32");
  STD_TORCH_CHECK(lse.dim() == 3 && lse.size(0) == a.B && lse.size(1) == a.Hq && lse.size(2) == a.Sq,
                  "fastattn: lse must be [B, Hq, Sq]");
}

inline Tensor with_adjacent_columns(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) <= 1 ? t : torch::stable::contiguous(t);
}

}  // namespace fastattn
