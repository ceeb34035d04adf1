// One attention call as the CUDA kernels see it: device pointers, shapes, strides in elements. A POD of the
// whole contract, passed by value; the binding has checked it. No torch, no ownership.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// [batch, head, row, column]; the columns are adjacent. Kernels read 16 bytes at a time where the pointer and
// the strides allow it, and single elements where not.
struct Operand {
  const void* data;
  int64_t batch, head, row;
};
// A result to write, laid out likewise; null: not asked for.
struct Result {
  void* data;
  int64_t batch, head, row;
};

// The head size that serves D and Dv; 0: none.
constexpr int padded_head(int D, int Dv) {
  const int largest = D > Dv ? D : Dv;
  const int heads[] = {32, 64, 96, 128, 192, 256};
  for (const int head : heads) {
    if (largest <= head) return head;
  }
  return 0;
}

// An absent bound of the band; far beyond any row or key, and i + kUnbounded does not overflow.
constexpr int32_t kUnbounded = 1 << 30;

struct AttentionArgs {
  int32_t B, Hq, Hkv, Sq, Sk, D, Dv;  // Sq, Sk < kUnbounded
  Operand q, k, v;                    // of the kernel's element type
  Result out;                         // q's type, or fp32
  bool out_fp32;
  float* lse;  // contiguous [B, Hq, Sq], natural log
  float scale;

  // Ranges: row i sees the keys of [i + band_lo, i + band_hi] and of [lo, hi).
  int32_t band_lo, band_hi;  // -kUnbounded, kUnbounded: absent; the binding brings others within these
  const int32_t *lo, *hi;    // null: absent; strides may be 0
  int64_t lo_batch, lo_head, lo_row, hi_batch, hi_head, hi_row;

  // Bits: Q granule n of map (b, h) sees block_list[block_offsets[n] .. block_offsets[n + 1]], pairs of
  // (K granule, tile) ascending by granule; tile -1 is full. The transposed lists, for the backward, are
  // pairs of (Q granule, tile) a K granule.
  const int32_t *block_offsets, *block_list;  // null: absent
  const int32_t *block_offsets_t, *block_list_t;
  const uint64_t* bit_tiles;                             // [T, 64]: a word a row, the first key lowest
  int64_t map_batch, map_head, map_t_batch, map_t_head;  // strides of the offsets, 0 where they broadcast

  // Score terms; null or 0: absent.
  float softcap;
  const void* bias;
  bool bias_fp32;  // else q's type
  int64_t bias_batch, bias_head, bias_row, bias_key;
  const float *alibi_slopes, *sinks;  // slopes by strides, sinks [Hq]
  int64_t alibi_batch, alibi_head;
  const int32_t *q_pos, *k_pos;  // null: 0, 1, 2, ...
  int64_t q_pos_batch, q_pos_row, k_pos_batch, k_pos_key;

  // Dropout keeps where the Philox word is at least the threshold, and multiplies by the scale. The seed
  // stays on the device.
  const int64_t* dropout_seed;  // null: no dropout
  uint32_t dropout_threshold;
  float dropout_scale;
};

// The backward's own part. `out` and `lse` of the forward are inputs here, the global ones where the call is
// one chunk of many.
struct AttentionBwdArgs : AttentionArgs {
  Operand dout;       // q's type
  const float* dlse;  // null: 0; contiguous [B, Hq, Sq]

  // Of the row pass, contiguous [B, Hq, Sq]: the lse with the sink in it, +inf for a row that sees nothing,
  // and sum(dout * out) less what dlse adds.
  float *exponent, *delta;
  float* sink_terms;  // what each row adds to dsinks, where that is asked for
  int32_t* extents;   // contiguous [B, Hq, ceil(Sq / 64), 4]: the keys that 64 rows see by ranges (Extent)

  Result dq, dk, dv;  // q's type, or fp32
  bool grads_fp32;

  // Contiguous [bias_B, bias_H, bias_Sq, bias_Sk], each the call's own or 1 where the bias broadcasts.
  void* dbias;  // null: not asked for
  bool dbias_fp32;
  int32_t bias_B, bias_H, bias_Sq, bias_Sk;
  float *dslopes, *dsinks;  // null: not asked for; [B, Hq] each, for the binding to sum over what is shared
};

}  // namespace fastattn::cuda
