// The schemas that every backend defines in its own namespace, text for text the same.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastattn {

template <class Library>
void define_attention(Library& m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, float scale, SymInt? band_lo, SymInt? band_hi, Tensor? "
      "lo, "
      "Tensor? hi, "
      "Tensor? block_offsets, Tensor? block_list, Tensor? bit_tiles, Tensor? bias, Tensor? alibi_slopes, "
      "float softcap, float dropout_p, Tensor? dropout_seed, Tensor? q_pos, Tensor? k_pos, Tensor? "
      "block_table, "
      "Tensor? kv_lengths, Tensor? k_scale, Tensor? v_scale, Tensor? sinks, bool out_fp32) -> (Tensor out, "
      "Tensor lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float "
      "scale, "
      "SymInt? band_lo, SymInt? band_hi, Tensor? lo, Tensor? hi, Tensor? block_offsets, Tensor? block_list, "
      "Tensor? block_offsets_t, Tensor? block_list_t, Tensor? bit_tiles, Tensor? bias, Tensor? alibi_slopes, "
      "float softcap, float dropout_p, Tensor? dropout_seed, Tensor? q_pos, Tensor? k_pos, Tensor? "
      "block_table, "
      "Tensor? kv_lengths, Tensor? k_scale, Tensor? v_scale, Tensor? sinks, bool[6] needs, bool grads_fp32) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dslopes, Tensor dsinks)");
}

template <class Library>
void define_rows(Library& m) {
  m.def(
      "softmax_fwd(Tensor x, int dim, Tensor? mask, Tensor? bias, float scale, bool causal, bool out_fp32) "
      "-> Tensor");
  m.def(
      "softmax_out(Tensor x, int dim, Tensor? mask, Tensor? bias, float scale, bool causal, Tensor(a!) out) "
      "-> ()");
  m.def(
      "softmax_bwd(Tensor dy, Tensor y, int dim, Tensor? bias, float scale, ScalarType x_dtype, bool[2] "
      "needs) "
      "-> (Tensor dx, Tensor dbias)");
  m.def(
      "norm_fwd(Tensor x, int row_dims, Tensor? weight, Tensor? bias, float eps, float weight_offset, "
      "bool rms) -> (Tensor y, Tensor stats)");
  m.def(
      "norm_out(Tensor x, int row_dims, Tensor? weight, Tensor? bias, float eps, float weight_offset, "
      "bool rms, Tensor(a!) out) -> ()");
  m.def(
      "add_norm_fwd(Tensor x, Tensor residual, int row_dims, Tensor? weight, Tensor? bias, float eps, "
      "float weight_offset, bool rms, ScalarType sum_dtype) -> (Tensor y, Tensor sum, Tensor stats)");
  m.def(
      "add_norm_out(Tensor x, Tensor residual, int row_dims, Tensor? weight, Tensor? bias, float eps, "
      "float weight_offset, bool rms, Tensor(a!) out, Tensor(b!) sum_out) -> ()");
  m.def(
      "norm_bwd(Tensor dy, Tensor? dsum, Tensor h, Tensor stats, int row_dims, Tensor? weight, "
      "ScalarType? bias_dtype, float weight_offset, bool rms, bool[3] needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");
}

}  // namespace fastattn
