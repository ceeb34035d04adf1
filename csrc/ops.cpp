// Every op schema of the library, on the LibTorch stable ABI: one build for every torch from 2.11 on.
//
// The schemas are whole from the start; what a backend does not serve is refused by name in
// fastattn/dispatch.py. Those that several backends share stand in schemas.h, the bindings in ops_*.cpp.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/targets/targets.h"
#include "parallel.h"
#include "schemas.h"

namespace fastattn {
namespace {

std::string isa() { return kernels().isa; }

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
  fastattn::define_attention(m);
  // For inference, on the CPU: no LSE and no score terms.
  m.def("attention_plain(Tensor q, Tensor k, Tensor v, float scale, bool is_causal) -> Tensor");
  m.def(
      "attention_masked(Tensor q, Tensor k, Tensor v, float scale, SymInt? band_lo, SymInt? band_hi, "
      "Tensor? lo, Tensor? hi, Tensor? block_offsets, Tensor? block_list, Tensor? bit_tiles) -> Tensor");
  // For training, on the CPU: what has no score terms and no blocks.
  m.def(
      "attention_training(Tensor q, Tensor k, Tensor v, float scale, bool is_causal, Tensor? lo, Tensor? hi) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "attention_training_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? lo, "
      "Tensor? hi, float scale, bool is_causal, bool needs_q, bool needs_k, bool needs_v) -> (Tensor dq, "
      "Tensor dk, Tensor dv)");
  m.def("_attention_bwd_route() -> str");
  m.def("mask_scan(Tensor mask) -> (Tensor offsets, Tensor blocks, Tensor tiles, Tensor flags)");
  m.def("bias_scan(Tensor bias) -> (Tensor offsets, Tensor blocks, Tensor tiles, Tensor flags)");
  m.def("mask_keys(Tensor mask) -> (Tensor lo, Tensor hi, Tensor flags)");
  m.def(
      "mask_build(SymInt[] program, Tensor[] tensors, SymInt B, SymInt H, SymInt Sq, SymInt Sk) -> "
      "(Tensor offsets, Tensor blocks, Tensor tiles, Tensor flags)");
  m.def("mask_transpose(Tensor offsets, Tensor blocks, SymInt n_k) -> (Tensor offsets_t, Tensor blocks_t)");
  m.def(
      "mask_rows(Tensor offsets, Tensor blocks, Tensor tiles, SymInt first, SymInt last, SymInt Sk) -> "
      "Tensor");
  // The CPU kernel of a call: "attention" or "decode". storage: 0 float32, 1 bfloat16, 2 float16.
  m.def("attention_route(int Sq, int group, int D, int Dv, int storage) -> str");
  fastattn::define_rows(m);
  // For inference, on the CPU. activation: "none", "relu" or "gelu", the exact one.
  m.def("linear_fwd(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor");
  m.def("_isa() -> str");
  m.def("_set_isa(str name) -> ()");
  // Of results.h: an uninitialised contiguous tensor; gives idle blocks back and returns their bytes; the
  // bytes in use, idle and allowed to be idle, and those of the smallest block.
  m.def("_new_result(int[] sizes, ScalarType dtype) -> Tensor");
  m.def("_release_results() -> int");
  m.def("_result_memory() -> int[]");
  m.def("_set_task_order(int seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&fastattn::isa));
  m.impl("_set_isa", TORCH_BOX(&fastattn::set_isa));
  m.impl("_set_task_order", TORCH_BOX(&fastattn::set_task_order));
}
