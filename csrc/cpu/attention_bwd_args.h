// One attention backward call as the CPU kernels see it. No torch, no ownership.
#pragma once

#include "attention_args.h"

namespace fastattn {

// What the row pass leaves for the others about 64 query rows of one head.
struct QueryBlock {
  int32_t seen_lo, seen_hi, all_lo, all_hi;  // by ranges: the keys any row sees, the keys every row sees
  uint64_t bad_q, bad_dout;                  // bit r: row r of q, of dout, holds a number that is not finite
  uint64_t extreme;  // bit r: row r has an lse that fp32 cannot tell from its neighbours
};

// A gradient to write; columns are adjacent.
struct Gradient {
  void* data;  // null: not asked for
  int64_t batch, head, row;
};

// The forward's arguments; out and lse are its results (those of all keys, where the call is one chunk of
// many).
struct AttentionBwdArgs : AttentionArgs {
  Operand dout;         // in q's storage
  Operand dout_as_out;  // in out's storage: the same tensor, unless out is fp32 and q is not
  const float* dlse;    // null: 0; contiguous [B, Hq, Sq]

  // Of the row pass, [B, Hq, Sq]: lse with the sink in it, in the units of has_score_terms' scores (natural)
  // or else of log2, +inf for a row that sees nothing; what is taken off exponents of 2 besides it, 0 but
  // for extreme rows; and sum(dout * out) - dlse, what the softmax's derivative takes off.
  float *exponent, *shift, *delta;
  QueryBlock* blocks;  // [B, Hq, q_blocks]
  float* dsinks;       // null: not asked for; [B, Hq, q_blocks], the sinks' gradient in parts

  // The transpose of the map of bits: K granule n is seen by block_list_t[block_offsets_t[n] ..], pairs of
  // (Q granule, tile).
  const int32_t *block_offsets_t, *block_list_t;
  int64_t map_t_batch, map_t_head;

  Gradient dq, dk, dv;
  bool grads_fp32;

  int64_t batches;  // neighbouring batches that a task of `heads` does

  // A bias with rows: dbias, contiguous [bias_B, bias_H, Sq, bias_Sk], 1 where it broadcasts; written by
  // `heads` or by `bias`. Without: sums over rows, contiguous [B, Hq, Sk]. Null: not asked for.
  void* dbias;
  bool dbias_fp32, sums_in_heads;
  int64_t bias_B, bias_H, bias_Sk;
  float* dbias_columns;
  float* dslopes;  // null: not asked for; [B, Hq]

  int64_t k_blocks() const { return (Sk + kGranule - 1) / kGranule; }
};

using AttentionBwdTask = void (*)(const AttentionBwdArgs&, int64_t task, void* scratch);

// The passes of the backward. `rows` or `heads` comes first; the others are independent of each other.
// `heads` does the work of `rows`, `queries` and `keys` together, to the same bits, with one computation of
// the probabilities instead of two; there are fewer and longer tasks of it.
struct AttentionBwdTasks {
  AttentionBwdTask rows;     // [B, Hq, q_blocks] tasks: exponent, shift, delta, blocks, dsinks
  AttentionBwdTask heads;    // [B, Hkv]: that and dq, dk, dv
  AttentionBwdTask queries;  // [B, Hq, q_blocks]: dq
  AttentionBwdTask keys;     // [B, Hkv, k_blocks]: dk, dv
  AttentionBwdTask bias;     // bias_tasks(): dbias
  AttentionBwdTask slopes;   // [B, Hq]: dslopes
  int64_t (*scratch)(const AttentionBwdArgs&, bool heads);  // bytes, for a task of `heads` or any other
};

}  // namespace fastattn
