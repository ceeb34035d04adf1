// Every op schema of the library, on the LibTorch stable ABI: one build for every torch from 2.11 on.
//
// The schemas are whole from the start; what a backend does not serve is refused by name in
// fastattn/dispatch.py. The bindings stand in ops_*.cpp.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/targets/targets.h"
#include "parallel.h"

namespace fastattn {
namespace {

void set_isa(std::string name) {
  try {
    force_isa(name);
  } catch (const std::exception& e) {
    STD_TORCH_CHECK(false, "fastattn: ", e.what());
  }
}

void set_task_order(int64_t seed) { task_order_seed().store(seed); }

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY(fastattn, m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, float scale, int? band_lo, int? band_hi, Tensor? lo, "
      "Tensor? hi, "
      "Tensor? block_offsets, Tensor? block_list, Tensor? bit_tiles, Tensor? bias, Tensor? alibi_slopes, "
      "float softcap, float dropout_p, Tensor? dropout_seed, Tensor? q_pos, Tensor? k_pos, Tensor? "
      "block_table, "
      "Tensor? kv_lengths, Tensor? k_scale, Tensor? v_scale, Tensor? sinks, bool out_fp32) -> (Tensor out, "
      "Tensor lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float "
      "scale, "
      "int? band_lo, int? band_hi, Tensor? lo, Tensor? hi, Tensor? block_offsets, Tensor? block_list, "
      "Tensor? block_offsets_t, Tensor? block_list_t, Tensor? bit_tiles, Tensor? bias, Tensor? alibi_slopes, "
      "float softcap, float dropout_p, Tensor? dropout_seed, Tensor? q_pos, Tensor? k_pos, Tensor? "
      "block_table, "
      "Tensor? kv_lengths, Tensor? k_scale, Tensor? v_scale, Tensor? sinks, bool[6] needs, bool grads_fp32) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dslopes, Tensor dsinks)");
  m.def("attention_plain(Tensor q, Tensor k, Tensor v, float scale, bool is_causal) -> Tensor");
  m.def("_attention_bwd_route() -> str");
  m.def("mask_scan(Tensor mask) -> (Tensor offsets, Tensor blocks, Tensor tiles, Tensor flags)");
  m.def("mask_keys(Tensor mask) -> (Tensor lo, Tensor hi, Tensor flags)");
  m.def(
      "mask_build(int[] program, Tensor[] tensors, int B, int H, int Sq, int Sk) -> (Tensor offsets, Tensor "
      "blocks, Tensor tiles, Tensor flags)");
  m.def("mask_transpose(Tensor offsets, Tensor blocks, int n_k) -> (Tensor offsets_t, Tensor blocks_t)");
  // The CPU kernel of a call: "attention" or "decode". storage: 0 float32, 1 bfloat16, 2 float16.
  m.def("attention_route(int Sq, int group, int D, int Dv, int storage) -> str");
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
  m.def("_set_isa(str name) -> ()");
  m.def("_set_task_order(int seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("_set_isa", TORCH_BOX(&fastattn::set_isa));
  m.impl("_set_task_order", TORCH_BOX(&fastattn::set_task_order));
}
