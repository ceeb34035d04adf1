// One attention call as the CPU kernels see it: pointers, shapes, strides in elements. No torch, no
// ownership.
#pragma once

#include <cstdint>

#include "simd/types.h"

namespace fastattn {

constexpr int kGranule = 64;  // rows of a task, keys of a block, side of a bit tile

// [batch, head, row, column]; the columns are adjacent.
struct Operand {
  const void* data;
  int64_t batch, head, row;
};

struct AttentionArgs {
  uint64_t call;  // differs from call to call: what a thread's scratch keeps from task to task carries it
  Storage storage;
  int64_t B, Hq, Hkv, Sq, Sk, D, Dv;
  Operand q, k, v;
  void* out;  // strides below; q's storage, or fp32
  int64_t out_batch, out_head, out_row;
  bool out_fp32;
  float* lse;  // contiguous [B, Hq, Sq], natural log
  float scale;

  // Ranges: row i sees the keys of [i + band_lo, i + band_hi] and of [lo, hi).
  bool has_band_lo, has_band_hi;
  int64_t band_lo, band_hi;
  const int32_t *lo, *hi;  // null: absent; strides may be 0
  int64_t lo_batch, lo_head, lo_row, hi_batch, hi_head, hi_row;

  // Bits: Q granule n of map (b, h) sees block_list[block_offsets[n] .. block_offsets[n + 1]], pairs of
  // (K granule, tile); tile -1 is full.
  const int32_t *block_offsets, *block_list;  // null: absent
  const uint64_t* bit_tiles;
  int64_t map_batch, map_head;  // strides of block_offsets, 0 where it broadcasts

  // Score terms; null or 0: absent.
  float softcap;
  const void* bias;
  bool bias_fp32;  // else q's storage
  int64_t bias_batch, bias_head, bias_row, bias_key;
  const float *alibi_slopes, *sinks;
  int64_t alibi_batch, alibi_head;
  const int32_t *q_pos, *k_pos;  // null: 0, 1, 2, ...
  int64_t q_pos_batch, q_pos_row, k_pos_batch, k_pos_key;

  // Dropout keeps where the Philox lane is at least the threshold.
  bool dropout;
  uint32_t dropout_threshold;
  float dropout_scale;
  uint64_t dropout_seed;

  float* partials;  // decode only: what each split found, laid out by DecodePlan

  int64_t q_blocks() const { return (Sq + kGranule - 1) / kGranule; }
  int64_t tasks() const { return B * Hq * q_blocks(); }
};

// Runs one task; `scratch` is 64-byte aligned and belongs to the calling thread.
using AttentionTask = void (*)(const AttentionArgs&, int64_t task, void* scratch);
using AttentionScratch = int64_t (*)(const AttentionArgs&);

}  // namespace fastattn
