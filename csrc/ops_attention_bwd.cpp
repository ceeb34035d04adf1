// CPU binding of attention_bwd.
#include <cmath>
#include <tuple>
#include <vector>

#include "attention_call.h"
#include "cpu/targets/targets.h"
#include "parallel.h"

namespace fastattn {
namespace {

// Empty in the order of heads and rows of x, or of no elements where it is not needed.
Tensor gradient_like(const Tensor& x, bool needed, bool fp32, Gradient* g) {
  const ScalarType dtype = fp32 ? ScalarType::Float : x.scalar_type();
  if (!needed) return torch::stable::new_empty(x, {0}, dtype);
  const bool rows_first = x.stride(1) < x.stride(2);
  Tensor t = torch::stable::new_empty(
      x, {x.size(0), x.size(rows_first ? 2 : 1), x.size(rows_first ? 1 : 2), x.size(3)}, dtype);
  if (rows_first) t = torch::stable::transpose(t, 1, 2);
  *g = {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  return t;
}

Tensor with_adjacent_columns(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) <= 1 ? t : torch::stable::contiguous(t);
}

Tensor contiguous_float(const Tensor& t) {
  return torch::stable::contiguous(
      t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, std::optional(ScalarType::Float)));
}

Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

float* floats_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

void check_results(const AttentionArgs& a, const Tensor& dout, const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(out.dim() == 4 && out.size(0) == a.B && out.size(1) == a.Hq && out.size(2) == a.Sq &&
                      out.size(3) == a.Dv && dout.dim() == 4 && dout.size(0) == a.B && dout.size(1) == a.Hq &&
                      dout.size(2) == a.Sq && dout.size(3) == a.Dv,
                  "fastattn: dout and out must have the shape of the attention's result");
  STD_TORCH_CHECK(dout.scalar_type() == out.scalar_type(), "fastattn: dout must have out's dtype");
  check_dtype(lse, ScalarType::Float, "lse", "float32");
  STD_TORCH_CHECK(lse.dim() == 3 && lse.size(0) == a.B && lse.size(1) == a.Hq && lse.size(2) == a.Sq,
                  "fastattn: lse must be [B, Hq, Sq]");
}

void set_transposed_blocks(AttentionBwdArgs* a, const OptionalTensor& offsets, const OptionalTensor& list) {
  if (!a->block_offsets) return;
  STD_TORCH_CHECK(offsets && list, "fastattn: the backward needs block_offsets_t and block_list_t");
  check_dtype(*offsets, ScalarType::Int, "block_offsets_t", "int32");
  check_dtype(*list, ScalarType::Int, "block_list_t", "int32");
  STD_TORCH_CHECK(offsets->dim() == 3 && offsets->size(2) == a->k_blocks() + 1 && offsets->is_contiguous() &&
                      list->is_contiguous(),
                  "fastattn: block_offsets_t must be a contiguous [B or 1, Hq or 1, ceil(Sk / 64) + 1]");
  a->map_t_batch = broadcast_stride(*offsets, 0, a->B, "block_offsets_t");
  a->map_t_head = broadcast_stride(*offsets, 1, a->Hq, "block_offsets_t");
  a->block_offsets_t = static_cast<const int32_t*>(offsets->const_data_ptr());
  a->block_list_t = static_cast<const int32_t*>(list->const_data_ptr());
}

// What a tasking costs: products a tile, for each tile of one kv head and batch, on the busiest thread.
// `heads` computes five products where `queries` and `keys` compute seven, but uses no more threads than it
// has tasks. All give the same bits.
struct Costs {
  double batches, heads, threads;

  double per_head() const { return 5 * std::ceil(batches * heads / threads); }
  double per_group_of_batches() const { return 5 * batches * std::ceil(heads / threads); }
  double per_block() const { return 7 * batches * heads / threads; }
  double bias() const { return 2.5 * batches * heads / threads; }
};

void run_gradients(AttentionBwdArgs* a, const AttentionBwdTasks& tasks) {
  const auto run = [&](int64_t count, AttentionBwdTask task, bool heads) {
    run_tasks(count, tasks.scratch(*a, heads), [&](int64_t i, void* scratch) { task(*a, i, scratch); });
  };
  const bool queries = a->dq.data, keys = a->dk.data || a->dv.data || a->dbias_columns;
  const Costs costs{double(a->B), double(a->Hkv), double(torch::stable::get_num_threads())};
  const double alone = std::min(costs.per_head(), costs.per_block());
  bool heads = queries && keys && costs.per_head() <= costs.per_block();
  a->batches = 1;
  if (a->dbias && queries && keys && a->bias_Sk > 1 && a->bias_H == a->Hq) {
    // A map of the bias that several batches share is summed by one task for all of them.
    const bool shared = a->bias_B < a->B;
    if ((shared ? costs.per_group_of_batches() : costs.per_head()) <= alone + costs.bias()) {
      heads = a->sums_in_heads = true;
      a->batches = shared ? a->B : 1;
    }
  }
  if (heads) {
    run(a->B / a->batches * a->Hkv, tasks.heads, true);
  } else {
    if (queries) run(a->tasks(), tasks.queries, false);
    if (keys) run(a->B * a->Hkv * a->k_blocks(), tasks.keys, false);
  }
  if (a->dbias && !a->sums_in_heads) run(a->bias_B * a->bias_H * a->q_blocks(), tasks.bias, false);
  if (a->dslopes) run(a->B * a->Hq, tasks.slopes, false);
}

// The gradient of a bias without rows, from the sums over rows of every head: its map's, in one order.
template <class Out>
void sum_columns(const AttentionBwdArgs& a, Out* out) {
  const bool by_batch = a.bias_B > 1, by_head = a.bias_H > 1, by_key = a.bias_Sk > 1;
  for (int64_t i = 0; i < a.bias_B * a.bias_H * a.bias_Sk; ++i) {
    const int64_t map = i / a.bias_Sk, first_b = by_batch ? map / a.bias_H : 0;
    const int64_t first_h = by_head ? map % a.bias_H : 0, first_k = by_key ? i % a.bias_Sk : 0;
    double sum = 0;
    for (int64_t b = first_b; b < (by_batch ? first_b + 1 : a.B); ++b) {
      for (int64_t h = first_h; h < (by_head ? first_h + 1 : a.Hq); ++h) {
        const float* row = a.dbias_columns + (b * a.Hq + h) * a.Sk;
        for (int64_t k = first_k; k < (by_key ? first_k + 1 : a.Sk); ++k) sum += row[k];
      }
    }
    from_float(float(sum), out + i);
  }
}

// parts [outer, n, inner] to [n], in one order.
Tensor sum_over(const Tensor& like, const float* parts, int64_t outer, int64_t n, int64_t inner) {
  Tensor result = new_floats(like, {n});
  float* out = floats_of(result);
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t j = 0; j < inner; ++j) sum += parts[(o * n + i) * inner + j];
    }
    out[i] = float(sum);
  }
  return result;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_bwd(const Tensor& dout, OptionalTensor dlse, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& out, const Tensor& lse, double scale,
                        std::optional<int64_t> band_lo, std::optional<int64_t> band_hi, OptionalTensor lo,
                        OptionalTensor hi, OptionalTensor block_offsets, OptionalTensor block_list,
                        OptionalTensor block_offsets_t, OptionalTensor block_list_t, OptionalTensor bit_tiles,
                        OptionalTensor bias, OptionalTensor alibi_slopes, double softcap, double dropout_p,
                        OptionalTensor dropout_seed, OptionalTensor q_pos, OptionalTensor k_pos,
                        OptionalTensor block_table, OptionalTensor kv_lengths, OptionalTensor k_scale,
                        OptionalTensor v_scale, OptionalTensor sinks, std::vector<bool> needs,
                        bool grads_fp32) {
  AttentionBwdArgs a{};
  static_cast<AttentionArgs&>(a) = attention_args(
      q, k, v, {scale,     band_lo,     band_hi,      lo,      hi,        block_offsets, block_list,
                bit_tiles, bias,        alibi_slopes, softcap, dropout_p, dropout_seed,  q_pos,
                k_pos,     block_table, kv_lengths,   k_scale, v_scale,   sinks});
  STD_TORCH_CHECK(needs.size() == 6,
                  "fastattn: needs has one entry each for q, k, v, bias, alibi_slopes, sinks");
  check_results(a, dout, out, lse);
  set_transposed_blocks(&a, block_offsets_t, block_list_t);

  const Tensor result = with_adjacent_columns(out), gradient = with_adjacent_columns(dout);
  const Tensor narrowed = gradient.scalar_type() == q.scalar_type()
                              ? gradient
                              : torch::stable::to(gradient, std::optional(q.scalar_type()));
  a.dout = operand_of(narrowed, "dout"), a.dout_as_out = operand_of(gradient, "dout");
  const Operand results = operand_of(result, "out");
  a.out = const_cast<void*>(results.data);  // read only here
  a.out_batch = results.batch, a.out_head = results.head, a.out_row = results.row;
  a.out_fp32 = result.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(a.out_fp32 || result.scalar_type() == q.scalar_type(),
                  "fastattn: out must be float32 or q's dtype");
  const Tensor given_lse = torch::stable::contiguous(lse);
  a.lse = static_cast<float*>(const_cast<void*>(given_lse.const_data_ptr()));
  const Tensor given_dlse = dlse ? contiguous_float(*dlse) : given_lse;
  STD_TORCH_CHECK(given_dlse.numel() == lse.numel(), "fastattn: dlse must have lse's shape");
  if (dlse) a.dlse = static_cast<const float*>(given_dlse.const_data_ptr());

  const int64_t rows = a.B * a.Hq * a.Sq, blocks = a.B * a.Hq * a.q_blocks();
  Tensor statistics = new_floats(q, {2 * rows});
  Tensor block_space = new_floats(q, {blocks * int64_t(sizeof(QueryBlock) / 4)});
  a.lse2 = floats_of(statistics), a.delta = a.lse2 + rows;
  a.blocks = static_cast<QueryBlock*>(block_space.mutable_data_ptr());
  const bool needs_bias = needs[3] && bias, needs_slopes = needs[4] && alibi_slopes;
  const bool needs_sinks = needs[5] && sinks;
  Tensor sink_parts = new_floats(q, {needs_sinks ? blocks : 0});
  if (needs_sinks) a.dsinks = floats_of(sink_parts);

  a.grads_fp32 = grads_fp32 || q.scalar_type() == ScalarType::Float;
  Tensor dq = gradient_like(q, needs[0], grads_fp32, &a.dq);
  Tensor dk = gradient_like(k, needs[1], grads_fp32, &a.dk);
  Tensor dv = gradient_like(v, needs[2], grads_fp32, &a.dv);

  Tensor columns = new_floats(q, {needs_bias && bias->size(2) == 1 ? a.B * a.Hq * a.Sk : 0});
  Tensor dbias = torch::stable::new_empty(q, {0}, bias ? bias->scalar_type() : q.scalar_type());
  if (needs_bias) {
    a.dbias_fp32 = grads_fp32 || a.bias_fp32;
    a.bias_B = bias->size(0), a.bias_H = bias->size(1), a.bias_Sk = bias->size(3);
    dbias = torch::stable::new_empty(q, {a.bias_B, a.bias_H, bias->size(2), a.bias_Sk},
                                     a.dbias_fp32 ? ScalarType::Float : bias->scalar_type());
    if (bias->size(2) == 1) a.dbias_columns = floats_of(columns);
    else a.dbias = dbias.mutable_data_ptr();
  }
  Tensor slope_parts = new_floats(q, {needs_slopes ? a.B * a.Hq : 0});
  if (needs_slopes) a.dslopes = floats_of(slope_parts);

  const AttentionBwdTasks& tasks = kernels().attention_bwd[int(storage_of(q, "q"))];
  run_tasks(blocks, 0, [&](int64_t i, void* scratch) { tasks.rows(a, i, scratch); });
  run_gradients(&a, tasks);

  if (a.dbias_columns) {
    void* at = dbias.mutable_data_ptr();
    if (a.dbias_fp32) sum_columns(a, static_cast<float*>(at));
    else if (q.scalar_type() == ScalarType::BFloat16) sum_columns(a, static_cast<BFloat16*>(at));
    else sum_columns(a, static_cast<Half*>(at));
  }
  Tensor dslopes = new_floats(q, {0}), dsinks = new_floats(q, {0});
  if (needs_slopes) {
    const int64_t b = alibi_slopes->size(0), h = alibi_slopes->size(1);
    // [B, Hq] over the batches or heads that share a slope.
    dslopes = torch::stable::reshape(
        sum_over(q, a.dslopes, b > 1 ? 1 : a.B, (b > 1 ? a.B : 1) * (h > 1 ? a.Hq : 1), h > 1 ? 1 : a.Hq),
        {b, h});
  }
  if (needs_sinks) dsinks = sum_over(q, a.dsinks, a.B, a.Hq, a.q_blocks());
  return {dq, dk, dv, dbias, dslopes, dsinks};
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("attention_bwd", TORCH_BOX(&fastattn::attention_bwd)); }
