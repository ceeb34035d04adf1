// Attention forward for every card from sm_80 on: FlashAttention-2's loop (Dao, 2023) with mma.sync, ldmatrix
// and cp.async, over the K granules that a block of rows sees.
//
//   S = Q K^T   [BLOCK_M, 64], m = max(m, S), P = exp2(S - m), l = l c + sum(P), O = O c + P V,  c =
//   exp2(m_old - m)
//
// A block owns BLOCK_M query rows of one head; a warp owns 16 or 32 of them, all keys and all columns, so
// that the softmax stays within four lanes and P goes from accumulator to operand in registers. K and V come
// in tiles of 64 keys, swizzled; what nobody in the block sees becomes zeros on the way (it may hold NaN).
// Head sizes are padded to 32, 64, 96, 128, 192 or 256; bias, ALiBi, softcap, sinks and dropout are decided
// at run time. A row's result depends on its own data and mask only: not on the batch, not on the number of
// SMs.
#pragma once

#include "attention_mask.cuh"
#include "attention_score.cuh"
#include "attention_tile.cuh"
#include "online_softmax.cuh"

namespace fastattn::cuda {

// Up to head size 128 a warp owns 32 rows, so that a fragment of K or V serves two products (shared memory
// feeds just one at full speed), and two stages overlap loads with a whole tile's work. Beyond, registers
// allow 16 rows, and K and V alternate in one stage each, which keeps a block within the 99 KB of sm_86 and
// sm_89.
template <int kHead>
struct ForwardTile {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = kHead <= 128 ? 2 : 1, kRows = kWarps * kRowTiles * 16;
  static constexpr int kGranules = kRows / kGranule;
  static constexpr int kStages = kHead <= 128 ? 2 : 1;
  static constexpr int kKeys = kHead == 96 || kHead == 128 ? 32 : kGranule;
};

template <class T, int kHead>
struct ForwardSmem {
  using Tile = ForwardTile<kHead>;
  T q[Tile::kRows * kHead];
  T k[Tile::kStages][kGranule * kHead];
  T v[Tile::kStages][kGranule * kHead];
  Range range[Tile::kRows];
  Extent extent[Tile::kWarps];
  int batch, head;
};

template <class T, int kHead, MaskForm kForm>
__global__ void __launch_bounds__(ForwardTile<kHead>::kThreads, 1)
    attention_forward_sm80(const __grid_constant__ AttentionArgs a) {
  using Tile = ForwardTile<kHead>;
  constexpr int kRowTiles = Tile::kRowTiles, kThreads = Tile::kThreads, kKeys = Tile::kKeys,
                kTilesN = kKeys / 8;
  constexpr int kGranules = Tile::kGranules, kStages = Tile::kStages, kTilesD = kHead / 8;
  auto& smem = shared_storage<ForwardSmem<T, kHead>>();
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;

  // The last rows of a causal mask take longest: they start first.
  const int blocks = (a.Sq + Tile::kRows - 1) / Tile::kRows, rest = int(blockIdx.x) / blocks;
  const int m_first = (blocks - 1 - int(blockIdx.x) % blocks) * Tile::kRows;
  const int head = rest % a.Hq, batch = rest / a.Hq;
  const int warp_row = warp * kRowTiles * 16;  // of the block
  const int my_row = warp_row + lane / 4, my_col = lane % 4 * 2;

  const ScoreUnit unit(a);

  // What the warp's rows and the block's rows see by ranges.
  Extent mine = no_rows();
  if (lane < kRowTiles * 16 && m_first + warp_row + lane < a.Sq) {
    const Range r = row_range<kForm>(a, batch, head, m_first + warp_row + lane);
    smem.range[warp_row + lane] = r;
    mine = extent_of(r);
  }
  mine = join_warp(mine);
  if (lane == 0) smem.extent[warp] = mine;
  if (threadIdx.x == 0) smem.batch = batch, smem.head = head;
#pragma unroll
  for (int rows = 0; rows < Tile::kRows; rows += kGranule) {
    load_tile<kGranule, kHead, kThreads>(&smem.q[rows * kHead], Rows<T>(a.q, batch, head, a.D),
                                         m_first + rows, bits_between(0, a.Sq - m_first - rows));
  }
  cp_async_commit();
  __syncthreads();
  // Read where they are needed, like batch and head: in registers they would wait through the products.
  const auto block_range = [&] {
    Range r{smem.extent[0].seen_lo, smem.extent[0].seen_hi};
#pragma unroll
    for (int w = 1; w < Tile::kWarps; ++w) {
      r = {min(r.lo, smem.extent[w].seen_lo), max(r.hi, smem.extent[w].seen_hi)};
    }
    return r;
  };

  KeyWalk<kForm, kGranules> walk(a, batch, head, m_first, block_range().lo, block_range().hi);
  const auto wanted_keys = [&](const Stop<kGranules>& stop) {
    const int key = stop.granule * kGranule;
    const Range seen = block_range();
    uint64_t wanted = bits_between(seen.lo - key, seen.hi - key);
    if (kForm == MaskForm::Bits) wanted &= seen_columns(a, stop.tiles);
    return wanted;
  };
  const auto load_keys = [&](const Stop<kGranules>& stop, int stage, uint64_t wanted) {
    const Rows<T> k(a.k, smem.batch, smem.head / (a.Hq / a.Hkv), a.D);
    load_tile<kGranule, kHead, kThreads>(smem.k[stage], k, stop.granule * kGranule, wanted);
  };
  const auto load_values = [&](const Stop<kGranules>& stop, int stage, uint64_t wanted) {
    const Rows<T> v(a.v, smem.batch, smem.head / (a.Hq / a.Hkv), a.Dv);
    load_tile<kGranule, kHead, kThreads>(smem.v[stage], v, stop.granule * kGranule, wanted);
  };

  float out[kRowTiles][kTilesD][4] = {};
  OnlineSoftmax<kRowTiles> softmax;

  Stop<kGranules> stop = walk.next();
  uint64_t wanted = 0;
  if (stop.granule >= 0) {
    wanted = wanted_keys(stop);
    load_keys(stop, 0, wanted);
    if (kStages == 2) load_values(stop, 0, wanted);
    cp_async_commit();
  }
  int stage = 0;
  while (stop.granule >= 0) {
    // One stage: K is here, V is fetched under QK^T, the next K under PV. Two: K and V are here, the next
    // fetched under both. Behind the barrier nobody reads what is overwritten.
    cp_async_wait<0>();
    __syncthreads();
    const Stop<kGranules> ahead = walk.next();
    uint64_t wanted_ahead = 0;
    if (ahead.granule >= 0) wanted_ahead = wanted_keys(ahead);
    if (kStages == 1) {
      load_values(stop, 0, wanted);
    } else if (ahead.granule >= 0) {
      load_keys(ahead, stage ^ 1, wanted_ahead);
      load_values(ahead, stage ^ 1, wanted_ahead);
    }
    cp_async_commit();

    const int bits = kGranules == 1 || warp < Tile::kWarps / 2 ? stop.tiles[0] : stop.tiles[kGranules - 1];
#pragma unroll 1
    for (int first = 0; first < kGranule; first += kKeys) {
      const int key = stop.granule * kGranule + first;
      const bool seen = bits != kHidden && smem.extent[warp].sees(key, kKeys);
      uint64_t kept = 0;  // a bit an element of S
      float s[kRowTiles][kTilesN][4] = {};
      if (seen) {
        const int row = opaque(my_row);
        if (a.dropout_seed) {
          kept = kept_elements<kRowTiles, kTilesN>(a, smem.batch, smem.head, m_first + row, key + my_col);
        }
        multiply_transposed<kHead>(s, smem.q, warp_row, &smem.k[stage][first * kHead]);
        if (!unit.plain) {
          const ScoreTerms<T> terms(a, smem.batch, smem.head);
          apply_terms(s, [&](float score, int t, int n, int i) {
            return terms.apply(a, score, m_first + row + t * 16 + i / 2 * 8, key + n * 8 + my_col + i % 2);
          });
        }
        if (bits >= 0 || !smem.extent[warp].covers(key, kKeys)) {
          hide_elements(s, [&](int below) {
            const int r = row + below;
            if (m_first + r >= a.Sq) return uint64_t(0);
            uint64_t word = bits_between(smem.range[r].lo - key, smem.range[r].hi - key);
            if (bits >= 0) word &= a.bit_tiles[int64_t(bits) * kGranule + r % kGranule] >> first;
            return word >> my_col;
          });
        }
        softmax.add(unit, s, out);
        if (a.dropout_seed) drop_elements(s, kept);
      }
      if (kStages == 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (ahead.granule >= 0) load_keys(ahead, 0, wanted_ahead);
        cp_async_commit();
      }
      if (seen) multiply_rounded<kHead>(out, s, &smem.v[stage][first * kHead], 0);
    }
    if (kStages == 2) stage ^= 1;
    stop = ahead;
    wanted = wanted_ahead;
  }
  cp_async_wait<0>();  // a block that sees nothing still waits for its Q

  const int b = smem.batch, h = smem.head;
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m_first + my_row + t * 16 + half * 8;
      const float sum = quad_sum(softmax.row_sum[t][half]);
      if (row >= a.Sq) continue;
      // In log2 and natural units alike: a plain score's unit holds scale.
      const float peak = unit.plain ? softmax.row_max[t][half] * a.scale : softmax.row_max[t][half];
      const float lse = sum == 0.0f ? -INFINITY : peak + logf(sum);
      float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
      if (a.dropout_seed) factor *= a.dropout_scale;
      if (a.sinks) factor *= 1.0f / (1.0f + expf(a.sinks[h] - lse));
      const int64_t at = b * a.out.batch + h * a.out.head + row * a.out.row;
#pragma unroll
      for (int d = 0; d < kTilesD; ++d) {
        const int col = d * 8 + my_col;
        store_pair<T>(a.out.data, at + col, a.out_fp32, a.Dv - col, out[t][d][2 * half] * factor,
                      out[t][d][2 * half + 1] * factor);
      }
      if (lane % 4 == 0) a.lse[(int64_t(b) * a.Hq + h) * a.Sq + row] = lse;
    }
  }
}

template <class T, int kHead, MaskForm kForm>
cudaError_t launch_attention_forward_sm80(const AttentionArgs& a, cudaStream_t stream) {
  using Tile = ForwardTile<kHead>;
  const int64_t blocks = int64_t(a.B) * a.Hq * ((a.Sq + Tile::kRows - 1) / Tile::kRows);
  if (blocks == 0) return cudaSuccess;
  return launch(attention_forward_sm80<T, kHead, kForm>, dim3(unsigned(blocks)), dim3(Tile::kThreads),
                sizeof(ForwardSmem<T, kHead>), stream, a);
}

}  // namespace fastattn::cuda
