// CPU binding of attention_bwd.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "attention_call.h"
#include "cpu/targets/targets.h"
#include "parallel.h"
#include "results.h"

namespace fastattn {
namespace {

// Uninitialised and contiguous in the shape of x, or of no elements where it is not needed.
Tensor empty_like(const Tensor& x, bool needed, bool fp32) {
  const ScalarType dtype = fp32 ? ScalarType::Float : x.scalar_type();
  if (!needed) return new_tensor({0}, dtype);
  return new_tensor(x.sizes(), dtype);
}

// The same in the order of heads and rows of x [B, H, S, D].
Tensor gradient_like(const Tensor& x, bool needed, bool fp32, Gradient* g) {
  if (!needed) return empty_like(x, false, fp32);
  const auto at_least_1 = [&](int d) { return std::max<int64_t>(x.size(d), 1); };
  const int64_t heads = at_least_1(1), rows = at_least_1(2), width = at_least_1(3),
                batch = heads * rows * width;
  const bool rows_first = x.stride(1) < x.stride(2);
  *g = {nullptr, batch, rows_first ? width : rows * width, rows_first ? heads * width : width};
  Tensor t =
      new_tensor(x.sizes(), {g->batch, g->head, g->row, 1}, fp32 ? ScalarType::Float : x.scalar_type());
  g->data = t.mutable_data_ptr();
  return t;
}

Tensor contiguous_float(const Tensor& t) {
  return torch::stable::contiguous(
      t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, std::optional(ScalarType::Float)));
}

// Memory of one call.
using Floats = std::unique_ptr<float[]>;
Floats floats(int64_t n) { return Floats(new float[size_t(n)]); }

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

// The tasking of the last call, for tests.
std::atomic<const char*> last_route{"none"};

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
  last_route = a->sums_in_heads ? "heads with bias" : heads ? "heads" : "queries and keys";
  if (heads) {
    run(a->B / a->batches * a->Hkv, tasks.heads, true);
  } else {
    run(a->tasks(), tasks.rows, false);
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

// parts [outer, n, inner] to n sums, in one order.
void sum_over(const float* parts, int64_t outer, int64_t n, int64_t inner, Tensor* result) {
  float* out = static_cast<float*>(result->mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t j = 0; j < inner; ++j) sum += parts[(o * n + i) * inner + j];
    }
    out[i] = float(sum);
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients gradients(const Tensor& dout, const OptionalTensor& dlse, const Tensor& given_q,
                    const Tensor& given_k, const Tensor& given_v, const Tensor& out, const Tensor& lse,
                    const AttentionOptions& options, const OptionalTensor& block_offsets_t,
                    const OptionalTensor& block_list_t, const std::vector<bool>& needs, bool grads_fp32) {
  const Tensor q = with_adjacent_columns(given_q), k = with_adjacent_columns(given_k),
               v = with_adjacent_columns(given_v);
  const OptionalTensor &bias = options.bias, &alibi_slopes = options.alibi_slopes, &sinks = options.sinks;
  AttentionBwdArgs a{};
  static_cast<AttentionArgs&>(a) = attention_args(q, k, v, options);
  STD_TORCH_CHECK(needs.size() == 6,
                  "fastattn: needs has one entry each for q, k, v, bias, alibi_slopes, sinks");
  check_results(a, dout, out, lse);
  STD_TORCH_CHECK(dout.scalar_type() == out.scalar_type(), "fastattn: dout must have out's dtype");
  set_transposed_blocks(&a, block_offsets_t, block_list_t);

  const Tensor result = with_adjacent_columns(out), gradient = with_adjacent_columns(dout);
  const Tensor narrowed = gradient.scalar_type() == q.scalar_type()
                              ? gradient
                              : torch::stable::to(gradient, std::optional(q.scalar_type()));
  set_operand(&a.dout, narrowed, "dout"), set_operand(&a.dout_as_out, gradient, "dout");
  Operand results;
  set_operand(&results, result, "out");
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
  const bool needs_bias = needs[3] && bias, needs_slopes = needs[4] && alibi_slopes;
  const bool needs_sinks = needs[5] && sinks;
  const Floats statistics = floats(3 * rows), sink_parts = floats(needs_sinks ? blocks : 0);
  const std::unique_ptr<QueryBlock[]> query_blocks(new QueryBlock[size_t(blocks)]);
  a.exponent = statistics.get(), a.shift = a.exponent + rows, a.delta = a.shift + rows;
  a.blocks = query_blocks.get();
  if (needs_sinks) a.dsinks = sink_parts.get();

  a.grads_fp32 = grads_fp32 || q.scalar_type() == ScalarType::Float;
  Tensor dq = gradient_like(given_q, needs[0], grads_fp32, &a.dq);
  Tensor dk = gradient_like(given_k, needs[1], grads_fp32, &a.dk);
  Tensor dv = gradient_like(given_v, needs[2], grads_fp32, &a.dv);

  const bool by_columns = needs_bias && bias->size(2) == 1;
  const Floats columns = floats(by_columns ? a.B * a.Hq * a.Sk : 0);
  Tensor dbias = empty_like(bias ? *bias : q, needs_bias, grads_fp32);
  if (needs_bias) {
    a.dbias_fp32 = grads_fp32 || a.bias_fp32;
    a.bias_B = bias->size(0), a.bias_H = bias->size(1), a.bias_Sk = bias->size(3);
    if (by_columns) a.dbias_columns = columns.get();
    else a.dbias = dbias.mutable_data_ptr();
  }
  const Floats slope_parts = floats(needs_slopes ? a.B * a.Hq : 0);
  if (needs_slopes) a.dslopes = slope_parts.get();

  run_gradients(&a, kernels().attention_bwd[int(storage_of(q, "q"))]);

  if (a.dbias_columns) {
    void* at = dbias.mutable_data_ptr();
    if (a.dbias_fp32) sum_columns(a, static_cast<float*>(at));
    else if (q.scalar_type() == ScalarType::BFloat16) sum_columns(a, static_cast<BFloat16*>(at));
    else sum_columns(a, static_cast<Half*>(at));
  }
  Tensor dslopes = empty_like(alibi_slopes ? *alibi_slopes : lse, needs_slopes, false);
  if (needs_slopes) {
    const bool by_batch = dslopes.size(0) > 1, by_head = dslopes.size(1) > 1;
    sum_over(a.dslopes, by_batch ? 1 : a.B, dslopes.numel(), by_head ? 1 : a.Hq, &dslopes);
  }
  Tensor dsinks = empty_like(sinks ? *sinks : lse, needs_sinks, false);
  if (needs_sinks) sum_over(a.dsinks, a.B, a.Hq, a.q_blocks(), &dsinks);
  return {dq, dk, dv, dbias, dslopes, dsinks};
}

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
  return gradients(dout, dlse, q, k, v, out, lse,
                   {scale,     band_lo,     band_hi,      lo,      hi,        block_offsets, block_list,
                    bit_tiles, bias,        alibi_slopes, softcap, dropout_p, dropout_seed,  q_pos,
                    k_pos,     block_table, kv_lengths,   k_scale, v_scale,   sinks},
                   block_offsets_t, block_list_t, needs, grads_fp32);
}

// Of attention_training.
std::tuple<Tensor, Tensor, Tensor> attention_training_bwd(const Tensor& dout, const Tensor& q,
                                                          const Tensor& k, const Tensor& v, const Tensor& out,
                                                          const Tensor& lse, OptionalTensor lo,
                                                          OptionalTensor hi, double scale, bool is_causal,
                                                          bool needs_q, bool needs_k, bool needs_v) {
  const auto [dq, dk, dv, dbias, dslopes, dsinks] =
      gradients(dout, {}, q, k, v, out, lse, plain_options(scale, is_causal, lo, hi), {}, {},
                {needs_q, needs_k, needs_v, false, false, false}, false);
  return {dq, dk, dv};
}

std::string attention_bwd_route() { return last_route.load(); }

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_bwd", TORCH_BOX(&fastattn::attention_bwd));
  m.impl("attention_training_bwd", TORCH_BOX(&fastattn::attention_training_bwd));
}
STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("_attention_bwd_route", TORCH_BOX(&fastattn::attention_bwd_route));
}
