// Op schemas and the CPU bindings, on the LibTorch stable ABI: one library for every torch from 2.11 on.
//
// The schemas are whole from the start; what a backend does not serve is refused by name in
// fastattn/dispatch.py. The checks here keep a direct call of an op from reading past a tensor; the messages
// for people are in fastattn/problem.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/simd/types.h"
#include "cpu/targets/targets.h"
#include "parallel.h"

namespace fastattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Storage storage_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::kFloat;
    case ScalarType::BFloat16: return Storage::kBFloat16;
    case ScalarType::Half: return Storage::kHalf;
    default: STD_TORCH_CHECK(false, "fastattn: ", name, " must be float32, bfloat16 or float16");
  }
}

Operand operand_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, "fastattn: ", name, " must have 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) <= 1, "fastattn: the last stride of ", name, " must be 1");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// The stride of a dimension that may broadcast.
int64_t broadcast_stride(const Tensor& t, int dim, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.size(dim) == size || t.size(dim) == 1, "fastattn: dimension ", dim, " of ", name,
                  " must be ", size, " or 1, got ", t.size(dim));
  return t.size(dim) == 1 ? 0 : t.stride(dim);
}

void check_dtype(const Tensor& t, ScalarType dtype, const char* name, const char* wanted) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "fastattn: ", name, " must be ", wanted);
}

const int32_t* range_of(const OptionalTensor& t, const AttentionArgs& a, const char* name, int64_t* strides) {
  if (!t) return nullptr;
  check_dtype(*t, ScalarType::Int, name, "int32");
  STD_TORCH_CHECK(t->dim() == 3, "fastattn: ", name, " must have 3 dimensions");
  strides[0] = broadcast_stride(*t, 0, a.B, name);
  strides[1] = broadcast_stride(*t, 1, a.Hq, name);
  strides[2] = broadcast_stride(*t, 2, a.Sq, name);
  return static_cast<const int32_t*>(t->const_data_ptr());
}

const int32_t* positions_of(const OptionalTensor& t, int64_t batch, int64_t length, const char* name,
                            int64_t* batch_stride, int64_t* stride) {
  if (!t) return nullptr;
  check_dtype(*t, ScalarType::Int, name, "int32");
  STD_TORCH_CHECK(t->dim() == 2, "fastattn: ", name, " must have 2 dimensions");
  *batch_stride = broadcast_stride(*t, 0, batch, name);
  *stride = broadcast_stride(*t, 1, length, name);
  return static_cast<const int32_t*>(t->const_data_ptr());
}

void set_blocks(AttentionArgs* a, const OptionalTensor& offsets, const OptionalTensor& list,
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

void set_bias(AttentionArgs* a, const OptionalTensor& bias, const Tensor& q) {
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

void set_dropout(AttentionArgs* a, double p, const OptionalTensor& seed) {
  if (p == 0) return;
  STD_TORCH_CHECK(seed.has_value() && seed->numel() == 1, "fastattn: dropout needs dropout_seed, one int64");
  check_dtype(*seed, ScalarType::Long, "dropout_seed", "int64");
  const double threshold = p * 4294967296.0;
  a->dropout = true;
  a->dropout_threshold = threshold >= 4294967295.0 ? 0xffffffffu : uint32_t(threshold);
  a->dropout_scale = float(1.0 / (1.0 - p));
  a->dropout_seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
}

// Keeps q's order of heads and rows, so that a model's own transpose after attention is free.
Tensor output_like(const Tensor& q, int64_t width, bool fp32) {
  const ScalarType dtype = fp32 ? ScalarType::Float : q.scalar_type();
  if (q.stride(1) < q.stride(2)) {
    return torch::stable::transpose(
        torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), width}, dtype), 1, 2);
  }
  return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), width}, dtype);
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
                  "fastattn: paged and quantised caches are not served on the CPU yet");
  AttentionArgs a{};
  a.q = operand_of(q, "q"), a.k = operand_of(k, "k"), a.v = operand_of(v, "v");
  a.B = q.size(0), a.Hq = q.size(1), a.Sq = q.size(2), a.D = q.size(3);
  a.Hkv = k.size(1), a.Sk = k.size(2), a.Dv = v.size(3);
  const Storage storage = storage_of(q, "q");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "fastattn: q, k and v must have one dtype");
  STD_TORCH_CHECK(k.size(0) == a.B && v.size(0) == a.B && v.size(1) == a.Hkv && v.size(2) == a.Sk &&
                      k.size(3) == a.D && (a.Hkv == 0 ? a.Hq == 0 : a.Hq % a.Hkv == 0),
                  "fastattn: the shapes of q, k and v do not fit");
  STD_TORCH_CHECK(a.Sk < INT32_MAX && a.Sq < INT32_MAX, "fastattn: sequences must be shorter than 2^31 - 1");
  a.scale = float(scale), a.softcap = float(softcap), a.out_fp32 = out_fp32;
  a.has_band_lo = band_lo.has_value(), a.has_band_hi = band_hi.has_value();
  a.band_lo = band_lo.value_or(0), a.band_hi = band_hi.value_or(0);
  int64_t strides[3] = {};
  a.lo = range_of(lo, a, "lo", strides);
  a.lo_batch = strides[0], a.lo_head = strides[1], a.lo_row = strides[2];
  a.hi = range_of(hi, a, "hi", strides);
  a.hi_batch = strides[0], a.hi_head = strides[1], a.hi_row = strides[2];
  set_blocks(&a, block_offsets, block_list, bit_tiles);
  set_bias(&a, bias, q);
  set_dropout(&a, dropout_p, dropout_seed);
  a.q_pos = positions_of(q_pos, a.B, a.Sq, "q_pos", &a.q_pos_batch, &a.q_pos_row);
  a.k_pos = positions_of(k_pos, a.B, a.Sk, "k_pos", &a.k_pos_batch, &a.k_pos_key);
  if (alibi_slopes) {
    check_dtype(*alibi_slopes, ScalarType::Float, "alibi_slopes", "float32");
    STD_TORCH_CHECK(alibi_slopes->dim() == 2, "fastattn: alibi_slopes must have 2 dimensions");
    a.alibi_slopes = static_cast<const float*>(alibi_slopes->const_data_ptr());
    a.alibi_batch = broadcast_stride(*alibi_slopes, 0, a.B, "alibi_slopes");
    a.alibi_head = broadcast_stride(*alibi_slopes, 1, a.Hq, "alibi_slopes");
  }
  if (sinks) {
    check_dtype(*sinks, ScalarType::Float, "sinks", "float32");
    STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == a.Hq && sinks->is_contiguous(),
                    "fastattn: sinks must be a contiguous [Hq]");
    a.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }

  Tensor out = output_like(q, a.Dv, out_fp32);
  Tensor lse = torch::stable::new_empty(q, {a.B, a.Hq, a.Sq}, ScalarType::Float);
  a.out = out.mutable_data_ptr(), a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.out_batch = out.stride(0), a.out_head = out.stride(1), a.out_row = out.stride(2);
  const KernelTable& table = kernels();
  const AttentionTask task = table.attention[int(storage)];
  run_tasks(a.tasks(), table.attention_scratch(a), [&](int64_t i, void* scratch) { task(a, i, scratch); });
  return {out, lse};
}

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
      "Tensor? kv_lengths, Tensor? k_scale, Tensor? v_scale, Tensor? sinks, bool[4] needs, bool grads_fp32) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
  m.def("_set_isa(str name) -> ()");
  m.def("_set_task_order(int seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("attention_fwd", TORCH_BOX(&fastattn::attention_fwd)); }

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("_set_isa", TORCH_BOX(&fastattn::set_isa));
  m.impl("_set_task_order", TORCH_BOX(&fastattn::set_task_order));
}
