// CPU binding of attention_fwd.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>
#include <tuple>

#include "attention_call.h"
#include "attention_route.h"
#include "cpu/targets/targets.h"
#include "parallel.h"
#include "results.h"

namespace fastattn {
namespace {

// Keeps q's order of heads and rows, so that a model's own transpose after attention is free.
Tensor output_like(const Tensor& q, const AttentionArgs& a, bool fp32) {
  const int64_t heads = std::max<int64_t>(a.Hq, 1), rows = std::max<int64_t>(a.Sq, 1);
  const int64_t width = std::max<int64_t>(a.Dv, 1), batch = heads * rows * width;
  const ScalarType dtype = fp32 ? ScalarType::Float : q.scalar_type();
  if (q.stride(1) < q.stride(2)) {
    return new_tensor({a.B, a.Hq, a.Sq, a.Dv}, {batch, width, heads * width, 1}, dtype);
  }
  return new_tensor({a.B, a.Hq, a.Sq, a.Dv}, {batch, rows * width, width, 1}, dtype);
}

// The thread that finishes an item's last split merges them, in the order of the splits whoever it is.
void run_decode(AttentionArgs& a, const KernelTable& table) {
  const int storage = int(a.storage);
  const DecodePlan plan(a);
  const int64_t bytes = (plan.tasks() * plan.partial_floats() * 4 + 63) / 64 * 64;
  const std::unique_ptr<void, decltype(&std::free)> partials(std::aligned_alloc(64, bytes), &std::free);
  STD_TORCH_CHECK(partials != nullptr, "fastattn: out of memory for ", bytes, " bytes of partial results");
  a.partials = static_cast<float*>(partials.get());
  std::unique_ptr<std::atomic<int64_t>[]> done;
  if (plan.splits > 1) done.reset(new std::atomic<int64_t>[plan.items]());
  run_tasks(plan.tasks(), table.decode_scratch(a), [&](int64_t i, void* scratch) {
    table.decode[storage](a, i, scratch);
    const int64_t item = i / plan.splits;
    if (!done || done[item].fetch_add(1, std::memory_order_acq_rel) + 1 == plan.splits) {
      table.decode_merge[storage](a, item, scratch);
    }
  });
}

void run(AttentionArgs& a, const Tensor& out) {
  if (a.B * a.Hq * a.Sq == 0) return;
  a.out = out.mutable_data_ptr();
  a.out_batch = out.stride(0), a.out_head = out.stride(1), a.out_row = out.stride(2);
  const KernelTable& table = kernels();
  if (attention_route(a.Sq, a.Hq / a.Hkv, a.D, a.Dv, a.storage) == AttentionRoute::kDecode) {
    return run_decode(a, table);
  }
  const AttentionTask task = table.attention[int(a.storage)];
  const int64_t together = table.keeps_heads && a.Hkv > 0 ? a.q_blocks() * (a.Hq / a.Hkv) : 1;
  run_tasks(
      a.tasks(), table.attention_scratch(a), [&](int64_t i, void* scratch) { task(a, i, scratch); },
      together);
}

// The arguments of a call, whose columns may lie anywhere: what is copied for that lives as long.
struct ForwardCall {
  const Tensor q, k, v;
  AttentionArgs a;
  Tensor out;

  ForwardCall(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v,
              const AttentionOptions& options, bool out_fp32)
      : q(with_adjacent_columns(given_q)),
        k(with_adjacent_columns(given_k)),
        v(with_adjacent_columns(given_v)),
        a(attention_args(q, k, v, options)),
        out(output_like(given_q, a, out_fp32)) {
    a.out_fp32 = out_fp32;
  }
};

std::tuple<Tensor, Tensor> run_with_lse(ForwardCall call) {
  AttentionArgs& a = call.a;
  Tensor lse = new_tensor({a.B, a.Hq, a.Sq}, {a.Hq * a.Sq, a.Sq, 1}, ScalarType::Float);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  run(a, call.out);
  return {call.out, lse};
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
  return run_with_lse({q,
                       k,
                       v,
                       {scale,     band_lo,     band_hi,      lo,      hi,        block_offsets, block_list,
                        bit_tiles, bias,        alibi_slopes, softcap, dropout_p, dropout_seed,  q_pos,
                        k_pos,     block_table, kv_lengths,   k_scale, v_scale,   sinks},
                       out_fp32});
}

Tensor run_inference(ForwardCall call) {
  run(call.a, call.out);
  return call.out;
}

// The plain call of inference: no mask or an upper-left triangle, no LSE. Short, because at one row the
// arguments of attention_fwd would cost more than the attention.
Tensor attention_plain(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool is_causal) {
  return run_inference({q, k, v, plain_options(scale, is_causal), false});
}

// The same under any mask: without an LSE the tiles may make weights by integers.
Tensor attention_masked(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                        std::optional<int64_t> band_lo, std::optional<int64_t> band_hi, OptionalTensor lo,
                        OptionalTensor hi, OptionalTensor block_offsets, OptionalTensor block_list,
                        OptionalTensor bit_tiles) {
  AttentionOptions options = plain_options(scale, false, lo, hi);
  options.band_lo = band_lo, options.band_hi = band_hi;
  options.block_offsets = block_offsets, options.block_list = block_list, options.bit_tiles = bit_tiles;
  return run_inference({q, k, v, options, false});
}

// With an LSE, for attention_training_bwd.
std::tuple<Tensor, Tensor> attention_training(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                              bool is_causal, OptionalTensor lo, OptionalTensor hi) {
  return run_with_lse({q, k, v, plain_options(scale, is_causal, lo, hi), false});
}

std::string route_name(int64_t Sq, int64_t group, int64_t D, int64_t Dv, int64_t storage) {
  STD_TORCH_CHECK(storage >= 0 && storage < 3,
                  "fastattn: storage must be 0 (float32), 1 (bfloat16) or 2 (float16), got ", storage);
  return name_of(attention_route(Sq, group, D, Dv, Storage(storage)));
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastattn::attention_fwd));
  m.impl("attention_plain", TORCH_BOX(&fastattn::attention_plain));
  m.impl("attention_masked", TORCH_BOX(&fastattn::attention_masked));
  m.impl("attention_training", TORCH_BOX(&fastattn::attention_training));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("attention_route", TORCH_BOX(&fastattn::route_name));
}
