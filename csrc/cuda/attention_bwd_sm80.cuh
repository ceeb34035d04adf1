// Attention backward for every card from sm_80 on, deterministic: dQ in a pass over blocks of rows, dK and dV
// in a pass over blocks of keys, each of which sums in its own registers and in ascending order. No atomics.
//
//   P = exp2(S - lse), dP = dO V^T, dS = P * (dP - delta);  dV = P^T dO, dK = dS^T Q, dQ = dS K
//
// Both passes compute S and dP: seven products a tile instead of five, for sums in fixed order and no fp32 dQ
// in memory. The pass over keys computes S and dP transposed, so that P^T and dS^T go from accumulator to
// operand in registers. Rows that see nothing are zeros on the way, since they may hold NaN; so are keys that
// nobody sees. An lse beyond 1e6 in size (rows whose bias is the lowest finite number) has lost its last
// digits, and their weights with it. Head sizes above 128 take more than the 99 KB that a block has on sm_86
// and sm_89.
#pragma once

#include "attention_bwd_rows.cuh"
#include "attention_tile.cuh"
#include "online_softmax.cuh"

namespace fastattn::cuda {

// Registers hold the gradients of 16 rows a warp; scores come by as many columns as fit beside them.
// Above 128 two warps share the 16 keys of dK and dV, a half of the columns each, and compute the scores
// twice.
template <int kHead>
struct BackwardTile {
  static constexpr int kStages = kHead <= 128 ? 2 : 1;
  static constexpr int kInnerKeys = kHead == 64 ? 64 : kHead <= 192 ? 32 : 16;
  static constexpr int kInnerQueries = kHead <= 192 ? 32 : 16;
  static constexpr int kColumnGroups = kHead <= 128 ? 1 : 2;
  // Blocks on a multiprocessor that registers leave room for: left to itself nvcc stops at three of 168, and
  // spills what does not fit.
  static constexpr int kQueryBlocks = kHead == 32 ? 4 : kHead == 96 ? 3 : kHead <= 128 ? 2 : 1;
  static constexpr int kQueryThreads = 4 * kWarp, kKeyThreads = kColumnGroups * 4 * kWarp;
};

// The derivative of one score, from the score and dP of the same place.
struct ScoreGradient {
  float p, ds;    // p with dropout; ds of the raw product, but for scale
  float ds_term;  // of what is added to the score: bias, ALiBi
};

__device__ __forceinline__ ScoreGradient score_gradient(const AttentionArgs& a, const ScoreUnit& unit,
                                                        float s, float dp, float exponent, float delta,
                                                        float cap_slope, bool seen, bool kept) {
  const float p = unit.plain ? exp2_approx(fmaf(s, unit.unit, -exponent * kLog2e)) : unit.power(s, exponent);
  if (a.dropout_seed) dp = kept ? dp * a.dropout_scale : 0.0f;
  const float ds = p * (dp - delta);
  const float weight = a.dropout_seed ? (kept ? p * a.dropout_scale : 0.0f) : p;
  if (!seen) return {0.0f, 0.0f, 0.0f};
  return {weight, ds * cap_slope, ds};
}

// The same of whole accumulators: s becomes p and dp becomes ds, by each(s, dp, n, i). A loop over arrays
// that turn where scores have terms (see apply_terms).
template <int kTilesN, class Each>
__device__ __forceinline__ void each_element(bool plain, float (&s)[1][kTilesN][4],
                                             float (&dp)[1][kTilesN][4], Each each) {
  if (plain) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) each(s[0][n][i], dp[0][n][i], n, i);
    }
    return;
  }
#pragma unroll 1
  for (int n = 0; n < kTilesN; ++n) {
    float x[4], y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = s[0][0][i], y[i] = dp[0][0][i];
      each(x[i], y[i], n, i);
    }
#pragma unroll
    for (int m = 0; m + 1 < kTilesN; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][m][i] = s[0][m + 1][i], dp[0][m][i] = dp[0][m + 1][i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[0][kTilesN - 1][i] = x[i], dp[0][kTilesN - 1][i] = y[i];
  }
}

// Writes 16 rows of an accumulator, from row `row` of `limit`, columns from `col` of `columns`.
template <class T, int kTilesD>
__device__ __forceinline__ void store_rows(const Result& to, int b, int h, bool fp32, int row, int limit,
                                           int col, int columns, const float (&x)[1][kTilesD][4],
                                           float factor) {
  if (!to.data) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + half * 8 >= limit) continue;
    const int64_t at = b * to.batch + h * to.head + (row + half * 8) * to.row;
#pragma unroll
    for (int d = 0; d < kTilesD; ++d) {
      store_pair<T>(to.data, at + col + d * 8, fp32, columns - col - d * 8, x[0][d][2 * half] * factor,
                    x[0][d][2 * half + 1] * factor);
    }
  }
}

template <class T, int kHead>
struct QueryPassSmem {
  T q[kGranule * kHead], dout[kGranule * kHead];
  T k[BackwardTile<kHead>::kStages][kGranule * kHead];
  T v[BackwardTile<kHead>::kStages][kGranule * kHead];
  float exponent[kGranule], delta[kGranule];
  Extent extent;
  int batch, head;
};

// dQ of 64 rows of one head; a warp owns 16.
template <class T, int kHead, MaskForm kForm>
__global__ void __launch_bounds__(BackwardTile<kHead>::kQueryThreads, BackwardTile<kHead>::kQueryBlocks)
    attention_bwd_queries(const __grid_constant__ AttentionBwdArgs a) {
  using Tile = BackwardTile<kHead>;
  constexpr int kThreads = Tile::kQueryThreads, kTilesN = Tile::kInnerKeys / 8, kTilesD = kHead / 8;
  auto& smem = shared_storage<QueryPassSmem<T, kHead>>();
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int blocks = (a.Sq + kGranule - 1) / kGranule, head = int(blockIdx.x) / blocks;
  const int granule = blocks - 1 - int(blockIdx.x) % blocks, m_first = granule * kGranule;
  const int h = head % a.Hq, b = head / a.Hq;
  const int my_row = warp * 16 + lane / 4, my_col = lane % 4 * 2;
  const ScoreUnit unit(a);

  // Kept in shared memory: in registers all this would wait through the products.
  const int64_t statistics = int64_t(head) * a.Sq + m_first;
  if (threadIdx.x < kGranule) {
    const int row = int(threadIdx.x);
    const bool exists = m_first + row < a.Sq;
    smem.exponent[row] = exists ? a.exponent[statistics + row] : INFINITY;
    smem.delta[row] = exists ? a.delta[statistics + row] : 0.0f;
  }
  if (threadIdx.x == 0) smem.extent = stored_extent(a, b, h, granule), smem.batch = b, smem.head = h;
  uint64_t rows = 0;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int row = part * kWarp + lane;
    const bool sees = m_first + row < a.Sq && a.exponent[statistics + row] < INFINITY;
    rows |= uint64_t(warp_ballot(sees)) << (part * kWarp);
  }
  load_tile<kGranule, kHead, kThreads>(smem.q, Rows<T>(a.q, b, h, a.D), m_first, rows);
  load_tile<kGranule, kHead, kThreads>(smem.dout, Rows<T>(a.dout, b, h, a.Dv), m_first, rows);
  cp_async_commit();
  __syncthreads();

  const auto load_keys = [&](const Stop<1>& stop, int stage) {
    const int key = stop.granule * kGranule;
    uint64_t wanted = bits_between(smem.extent.seen_lo - key, smem.extent.seen_hi - key);
    if (kForm == MaskForm::Bits) wanted &= seen_columns(a, stop.tiles);
    const int kv = smem.head / (a.Hq / a.Hkv);
    load_tile<kGranule, kHead, kThreads>(smem.k[stage], Rows<T>(a.k, smem.batch, kv, a.D), key, wanted);
    load_tile<kGranule, kHead, kThreads>(smem.v[stage], Rows<T>(a.v, smem.batch, kv, a.Dv), key, wanted);
    cp_async_commit();
  };

  float dq[1][kTilesD][4] = {};
  KeyWalk<kForm, 1> walk(a, b, h, m_first, smem.extent.seen_lo, smem.extent.seen_hi);
  Stop<1> stop = walk.next();
  int stage = 0;
  if (stop.granule >= 0 && Tile::kStages == 2) load_keys(stop, 0);
  while (stop.granule >= 0) {
    if (Tile::kStages == 1) load_keys(stop, 0);
    cp_async_wait<0>();
    __syncthreads();
    const Stop<1> ahead = walk.next();
    if (Tile::kStages == 2 && ahead.granule >= 0) load_keys(ahead, stage ^ 1);
    const int bits = stop.tiles[0];
#pragma unroll 1
    for (int first = 0; first < kGranule; first += Tile::kInnerKeys) {
      const int key = stop.granule * kGranule + first;
      if (!smem.extent.sees(key, Tile::kInnerKeys)) continue;
      const int row = opaque(my_row);
      uint64_t kept = 0, words[2] = {~uint64_t(0), ~uint64_t(0)};
      if (a.dropout_seed) {
        kept = kept_elements<1, kTilesN>(a, smem.batch, smem.head, m_first + row, key + my_col);
      }
      if (bits >= 0 || !smem.extent.covers(key, Tile::kInnerKeys)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = row + half * 8;
          const Range range =
              m_first + r < a.Sq ? row_range<kForm>(a, smem.batch, smem.head, m_first + r) : Range{0, 0};
          words[half] = bits_between(range.lo - key, range.hi - key);
          if (bits >= 0) words[half] &= a.bit_tiles[int64_t(bits) * kGranule + r] >> first;
        }
      }
      float s[1][kTilesN][4] = {}, dp[1][kTilesN][4] = {};
      multiply_transposed<kHead>(s, smem.q, warp * 16, &smem.k[stage][first * kHead]);
      multiply_transposed<kHead>(dp, smem.dout, warp * 16, &smem.v[stage][first * kHead]);
      const ScoreTerms<T> terms(a, smem.batch, smem.head);
      each_element(unit.plain, s, dp, [&](float& x, float& y, int n, int i) {
        const int col = n * 8 + my_col + i % 2;
        float cap_slope = 1.0f;
        if (!unit.plain) x = terms.apply(a, x, m_first + row + i / 2 * 8, key + col, &cap_slope);
        const int at = row + i / 2 * 8;
        y = score_gradient(a, unit, x, y, smem.exponent[at], smem.delta[at], cap_slope,
                           words[i / 2] >> col & 1, kept >> (n * 4 + i) & 1)
                .ds;
      });
      multiply_rounded<kHead>(dq, dp, &smem.k[stage][first * kHead], 0);
    }
    if (Tile::kStages == 2) stage ^= 1;
    else __syncthreads();  // before the only stage is filled again
    stop = ahead;
  }
  cp_async_wait<0>();
  store_rows<T>(a.dq, smem.batch, smem.head, a.grads_fp32, m_first + my_row, a.Sq, my_col, a.D, dq, a.scale);
}

template <class T, int kHead>
struct KeyPassSmem {
  static constexpr int kStages = BackwardTile<kHead>::kStages;
  T k[kGranule * kHead], v[kGranule * kHead];
  T q[kStages][kGranule * kHead], dout[kStages][kGranule * kHead];
  uint64_t words[kStages][kGranule];  // a row's keys of this block
  float exponent[kStages][kGranule], delta[kStages][kGranule];
};

// dK and dV of 64 keys of one KV head, over the rows of all query heads of its group; a warp owns 16 keys.
template <class T, int kHead, MaskForm kForm>
__global__ void __launch_bounds__(BackwardTile<kHead>::kKeyThreads)
    attention_bwd_keys(const __grid_constant__ AttentionBwdArgs a) {
  using Tile = BackwardTile<kHead>;
  constexpr int kThreads = Tile::kKeyThreads, kTilesN = Tile::kInnerQueries / 8;
  constexpr int kTilesD = kHead / 8 / Tile::kColumnGroups;
  auto& smem = shared_storage<KeyPassSmem<T, kHead>>();
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp % 4;
  const int my_key = warp * 16 + lane / 4, my_query = lane % 4 * 2;  // of the block, of a tile of queries
  const int column = Tile::kColumnGroups == 1 ? 0
                                              : int(threadIdx.x) / (4 * kWarp) * kTilesD *
                                                    8;  // of the gradients, the warp's first
  const int blocks = (a.Sk + kGranule - 1) / kGranule, head = int(blockIdx.x) / blocks;
  const int key = int(blockIdx.x) % blocks * kGranule, kv = head % a.Hkv, b = head / a.Hkv;
  const ScoreUnit unit(a);

  const uint64_t keys = bits_between(0, a.Sk - key);
  load_tile<kGranule, kHead, kThreads>(smem.k, Rows<T>(a.k, b, kv, a.D), key, keys);
  load_tile<kGranule, kHead, kThreads>(smem.v, Rows<T>(a.v, b, kv, a.Dv), key, keys);
  cp_async_commit();

  // Q and dO of a granule, what its rows see of the block's keys, and their statistics.
  const auto load_queries = [&](const QueryStop& stop, int stage) {
    const int first = stop.granule * kGranule;
    const int64_t statistics = (int64_t(b) * a.Hq + stop.h) * a.Sq + first;
    uint64_t rows = 0;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int row = part * kWarp + lane;
      const bool sees = first + row < a.Sq && a.exponent[statistics + row] < INFINITY;
      rows |= uint64_t(warp_ballot(sees)) << (part * kWarp);
    }
    const int batch = kHead > 192 ? opaque(b) : b;  // no register is left there to keep its products in
    load_tile<kGranule, kHead, kThreads>(smem.q[stage], Rows<T>(a.q, batch, stop.h, a.D), first, rows);
    load_tile<kGranule, kHead, kThreads>(smem.dout[stage], Rows<T>(a.dout, batch, stop.h, a.Dv), first, rows);
    cp_async_commit();
    if (threadIdx.x < kGranule) {
      const int row = int(threadIdx.x);
      const bool exists = first + row < a.Sq;
      const Range range = exists ? row_range<kForm>(a, b, stop.h, first + row) : Range{0, 0};
      uint64_t word = bits_between(range.lo - key, range.hi - key);
      if (kForm == MaskForm::Bits && stop.tile >= 0) word &= a.bit_tiles[int64_t(stop.tile) * kGranule + row];
      smem.words[stage][row] = word;
      smem.exponent[stage][row] = exists ? a.exponent[statistics + row] : INFINITY;
      smem.delta[stage][row] = exists ? a.delta[statistics + row] : 0.0f;
    }
  };

  float dk[1][kTilesD][4] = {}, dv[1][kTilesD][4] = {};
  QueryWalk<kForm> walk(a, b, kv, key);
  QueryStop stop = walk.next();
  int stage = 0;
  if (stop.granule >= 0 && Tile::kStages == 2) load_queries(stop, 0);
  while (stop.granule >= 0) {
    if (Tile::kStages == 1) load_queries(stop, 0);
    cp_async_wait<0>();
    __syncthreads();
    const QueryStop ahead = walk.next();
    if (Tile::kStages == 2 && ahead.granule >= 0) load_queries(ahead, stage ^ 1);
    const bool masked = stop.tile >= 0 || !stop.covered;
#pragma unroll 1
    for (int first = 0; first < kGranule; first += Tile::kInnerQueries) {
      const int query = first + opaque(my_query), row = stop.granule * kGranule + query;
      uint32_t kept = 0;
      if (a.dropout_seed) {
        const auto seed = uint64_t(*a.dropout_seed);
#pragma unroll 1
        for (int at = 0; at < kTilesN * 4; ++at) {
          const int i = row + at / 4 * 8 + at % 2, j = key + my_key + at / 2 % 2 * 8;
          kept |= uint32_t(keeps(a, seed, b, stop.h, i, j)) << at;
        }
      }
      float s[1][kTilesN][4] = {}, dp[1][kTilesN][4] = {};
      multiply_transposed<kHead>(s, smem.k, warp * 16, &smem.q[stage][first * kHead]);
      multiply_transposed<kHead>(dp, smem.v, warp * 16, &smem.dout[stage][first * kHead]);
      const ScoreTerms<T> terms(a, opaque(b), stop.h);
      each_element(unit.plain, s, dp, [&](float& x, float& y, int n, int i) {
        const int at = query + n * 8 + i % 2, j = my_key + i / 2 * 8;
        // The warp's 16 keys of the word.
        const int bits = reinterpret_cast<const uint16_t*>(&smem.words[stage][at])[warp];
        const bool seen = !masked || (bits >> (j % 16) & 1);
        float cap_slope = 1.0f;
        if (!unit.plain) x = terms.apply(a, x, row + n * 8 + i % 2, key + j, &cap_slope);
        const ScoreGradient g = score_gradient(a, unit, x, y, smem.exponent[stage][at], smem.delta[stage][at],
                                               cap_slope, seen, kept >> (n * 4 + i) & 1);
        x = g.p;
        y = g.ds;
      });
      multiply_rounded<kHead>(dv, s, &smem.dout[stage][first * kHead], column);
      multiply_rounded<kHead>(dk, dp, &smem.q[stage][first * kHead], column);
    }
    if (Tile::kStages == 2) stage ^= 1;
    else __syncthreads();  // before the only stage is filled again
    stop = ahead;
  }
  cp_async_wait<0>();
  const int col = column + my_query;
  store_rows<T>(a.dk, b, kv, a.grads_fp32, key + my_key, a.Sk, col, a.D, dk, a.scale);
  store_rows<T>(a.dv, b, kv, a.grads_fp32, key + my_key, a.Sk, col, a.Dv, dv, 1.0f);
}

}  // namespace fastattn::cuda
