// How a decode call is cut into tasks, shared by the kernel and by the driver that runs it.
//
// Nothing but the shapes of one batch item enters: a result depends neither on the batch around it nor on the
// threads.
#pragma once

#include "attention_args.h"

namespace fastattn {

struct DecodePlan {
  // Keys of a split. At head size 128 in bf16 its K and V are 256 KB, ten microseconds of memory traffic:
  // long beside what a task costs, short enough that one long sequence feeds every core.
  static constexpr int64_t kSplit = 512;
  static constexpr int64_t kMaxRows = 64;  // packed rows of a task

  int64_t group;   // query heads of a K/V head
  int64_t heads;   // query heads of a task, all of one group
  int64_t chunks;  // tasks that share a K/V head's split
  int64_t splits;
  int64_t items;  // outputs of their own: batch, K/V head, chunk
  int64_t rows;   // packed rows of a task, `heads` times Sq; the last chunk may have fewer
  int64_t out_stride;

  explicit DecodePlan(const AttentionArgs& a) {
    group = a.Hkv ? a.Hq / a.Hkv : 1;
    const int64_t most = a.Sq > 0 && a.Sq < kMaxRows ? kMaxRows / a.Sq : 1;
    chunks = (group + most - 1) / most;
    heads = (group + chunks - 1) / chunks;
    splits = a.Sk > kSplit ? (a.Sk + kSplit - 1) / kSplit : 1;
    items = a.B * a.Hkv * chunks;
    rows = heads * a.Sq;
    out_stride = (a.Dv + 15) / 16 * 16;
  }
  int64_t tasks() const { return items * splits; }

  // The result of one split: the row maxima and sums, then the rows of O, not normalised.
  int64_t partial_floats() const { return (2 * rows + 15) / 16 * 16 + rows * out_stride; }
  float* max(const AttentionArgs& a, int64_t task) const { return a.partials + task * partial_floats(); }
  float* sum(const AttentionArgs& a, int64_t task) const { return max(a, task) + rows; }
  float* out(const AttentionArgs& a, int64_t task) const { return max(a, task) + (2 * rows + 15) / 16 * 16; }
};

}  // namespace fastattn
