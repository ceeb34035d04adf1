// The gradients of what is added to scores: a bias of any broadcast shape, and ALiBi slopes. dS is computed
// once more and summed over what the target shares, in ascending order of batch, head, row and key tiles.
#pragma once

#include "attention_bwd_sm80.cuh"

namespace fastattn::cuda {

// Where the sums go: contiguous [B, H, Sq, Sk], each the call's own or 1. With `distances`, dS is weighted by
// ALiBi's
// -|q_pos - k_pos|, so that [B, Hq, 1, 1] is the slopes' gradient.
struct TermTarget {
  void* data;
  bool fp32, distances;
  int32_t B, H, Sq, Sk;
};

template <class T, int kHead>
struct TermPassSmem {
  T q[kGranule * kHead], dout[kGranule * kHead], k[kGranule * kHead], v[kGranule * kHead];
  float sums[4][kGranule];
};

// The entry of K granule `key` among those that granule `query` sees: kFull, kHidden or a tile.
template <MaskForm kForm>
__device__ __forceinline__ int find_tile(const AttentionArgs& a, int b, int h, int query, int key) {
  if (kForm != MaskForm::Bits) return kFull;
  const int32_t* offsets = a.block_offsets + b * a.map_batch + h * a.map_head + query;
  const int at = first_entry(a.block_list, offsets[0], offsets[1], key);
  const bool found = at < offsets[1] && a.block_list[2 * int64_t(at)] == key;
  return found ? a.block_list[2 * int64_t(at) + 1] : kHidden;
}

// One block a tile of the target, 64 rows by 64 keys, or 1 where the target is shared.
template <class T, int kHead, MaskForm kForm>
__global__ void __launch_bounds__(4 * kWarp)
    attention_bwd_terms(const __grid_constant__ AttentionBwdArgs a, const __grid_constant__ TermTarget to) {
  constexpr int kThreads = 4 * kWarp, kTilesN = kGranule / 8;
  auto& smem = shared_storage<TermPassSmem<T, kHead>>();
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int my_row = warp * 16 + lane / 4, my_col = lane % 4 * 2;
  const int q_tiles = (a.Sq + kGranule - 1) / kGranule, k_tiles = (a.Sk + kGranule - 1) / kGranule;
  const ScoreUnit unit(a);

  // Each index of the target: one value, or all that share it.
  int rest = int(blockIdx.x);
  const auto range_of = [&](bool shared, int count) {
    if (shared) return Range{0, count};
    const int at = rest % count;
    rest /= count;
    return Range{at, at + 1};
  };
  const Range of_k = range_of(to.Sk == 1, k_tiles), of_q = range_of(to.Sq == 1, q_tiles);
  const Range of_h = range_of(to.H == 1, a.Hq), of_b = range_of(to.B == 1, a.B);

  float sum[kTilesN][4] = {};
  for (int b = of_b.lo; b < of_b.hi; ++b) {
    for (int h = of_h.lo; h < of_h.hi; ++h) {
      for (int at = 0; at < (of_q.hi - of_q.lo) * (of_k.hi - of_k.lo); ++at) {
        const int query = of_q.lo + at / (of_k.hi - of_k.lo), m_first = query * kGranule;
        const int n_block = of_k.lo + at % (of_k.hi - of_k.lo), key = n_block * kGranule;
        const Extent extent = stored_extent(a, b, h, query);
        if (!extent.sees(key, kGranule)) continue;
        const int bits = find_tile<kForm>(a, b, h, query, n_block);
        if (bits == kHidden) continue;

        const int64_t statistics = (int64_t(b) * a.Hq + h) * a.Sq + m_first;
        uint64_t rows = 0;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int row = part * kWarp + lane;
          const bool sees = m_first + row < a.Sq && a.exponent[statistics + row] < INFINITY;
          rows |= uint64_t(warp_ballot(sees)) << (part * kWarp);
        }
        const uint64_t keys = bits_between(0, a.Sk - key);
        const int kv = h / (a.Hq / a.Hkv);
        __syncthreads();  // the tiles before have been read
        load_tile<kGranule, kHead, kThreads>(smem.q, Rows<T>(a.q, b, h, a.D), m_first, rows);
        load_tile<kGranule, kHead, kThreads>(smem.dout, Rows<T>(a.dout, b, h, a.Dv), m_first, rows);
        load_tile<kGranule, kHead, kThreads>(smem.k, Rows<T>(a.k, b, kv, a.D), key, keys);
        load_tile<kGranule, kHead, kThreads>(smem.v, Rows<T>(a.v, b, kv, a.Dv), key, keys);
        cp_async_commit();
        uint64_t words[2], kept = 0;
        float exponent[2], delta[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = my_row + half * 8;
          const bool exists = m_first + r < a.Sq;
          const Range range = exists ? row_range<kForm>(a, b, h, m_first + r) : Range{0, 0};
          words[half] = bits_between(range.lo - key, range.hi - key);
          if (bits >= 0) words[half] &= a.bit_tiles[int64_t(bits) * kGranule + r];
          exponent[half] = exists ? a.exponent[statistics + r] : INFINITY;
          delta[half] = exists ? a.delta[statistics + r] : 0.0f;
        }
        if (a.dropout_seed) kept = kept_elements<1, kTilesN>(a, b, h, m_first + opaque(my_row), key + my_col);
        cp_async_wait<0>();
        __syncthreads();

        float s[1][kTilesN][4] = {}, dp[1][kTilesN][4] = {};
        multiply_transposed<kHead>(s, smem.q, warp * 16, smem.k);
        multiply_transposed<kHead>(dp, smem.dout, warp * 16, smem.v);
        const ScoreTerms<T> terms(a, b, h);
        each_element(unit.plain, s, dp, [&](float& x, float& y, int n, int i) {
          const int row = m_first + my_row + i / 2 * 8, col = n * 8 + my_col + i % 2;
          if (!unit.plain) x = terms.apply(a, x, row, key + col);
          y = score_gradient(a, unit, x, y, exponent[i / 2], delta[i / 2], 1.0f, words[i / 2] >> col & 1,
                             kept >> (n * 4 + i) & 1)
                  .ds_term;
          if (to.distances) {
            y *= -fabsf(float(query_position(a, b, row) - key_position(a, b, key + col)));
          }
        });
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[n][i] += dp[0][n][i];
        }
      }
    }
  }

  // Over the rows of a warp, then over the warps, where the target has one row.
  if (to.Sq == 1) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x = sum[n][i] + sum[n][i + 2];
#pragma unroll
        for (int lanes = 4; lanes < kWarp; lanes *= 2) x += shfl_xor(x, lanes);
        sum[n][i] = x;
        if (lane < 4) smem.sums[warp][n * 8 + my_col + i] = x;
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int col = n * 8 + my_col + i;
        sum[n][i] = smem.sums[0][col] + smem.sums[1][col] + smem.sums[2][col] + smem.sums[3][col];
      }
    }
  }
  const int b = to.B == 1 ? 0 : of_b.lo, h = to.H == 1 ? 0 : of_h.lo;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row =
        to.Sq == 1 ? (warp + lane / 4 + half == 0 ? 0 : 1) : of_q.lo * kGranule + my_row + half * 8;
    const int64_t at = ((int64_t(b) * to.H + h) * to.Sq + row) * to.Sk;
    if (to.Sk == 1) {
      float x = 0.0f;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) x += sum[n][2 * half] + sum[n][2 * half + 1];
      x = quad_sum(x);
      if (row < to.Sq && lane % 4 == 0) store_pair<T>(to.data, at, to.fp32, 1, x, 0.0f);
      continue;
    }
    if (row >= to.Sq) continue;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      const int col = of_k.lo * kGranule + n * 8 + my_col;
      store_pair<T>(to.data, at + col, to.fp32, a.Sk - col, sum[n][2 * half], sum[n][2 * half + 1]);
    }
  }
}

template <class T, int kHead, MaskForm kForm>
cudaError_t launch_attention_bwd_terms(const AttentionBwdArgs& a, const TermTarget& to, cudaStream_t stream) {
  const auto tiles = [](int rows) { return int64_t((rows + kGranule - 1) / kGranule); };
  const int64_t blocks = int64_t(to.B) * to.H * tiles(to.Sq) * tiles(to.Sk);
  if (blocks == 0) return cudaSuccess;
  return launch(attention_bwd_terms<T, kHead, kForm>, dim3(unsigned(blocks)), dim3(4 * kWarp),
                sizeof(TermPassSmem<T, kHead>), stream, a, to);
}

// All that is asked for: the row pass first, then the others, which do not depend on each other. Returns the
// first error of a launch.
template <class T, int kHead, MaskForm kForm>
cudaError_t launch_attention_backward_sm80(const AttentionBwdArgs& a, cudaStream_t stream) {
  using Tile = BackwardTile<kHead>;
  const int64_t q_blocks = (a.Sq + kGranule - 1) / kGranule, k_blocks = (a.Sk + kGranule - 1) / kGranule;
  const int64_t rows = int64_t(a.B) * a.Hq * q_blocks, keys = int64_t(a.B) * a.Hkv * k_blocks;
  cudaError_t error = cudaSuccess;
  if (rows > 0) {
    error = launch(attention_bwd_rows<T, kForm>, dim3(unsigned(rows)), dim3(kRowPassThreads),
                   sizeof(RowPassSmem), stream, a);
  }
  if (error == cudaSuccess && a.dq.data && rows > 0) {
    error = launch(attention_bwd_queries<T, kHead, kForm>, dim3(unsigned(rows)), dim3(Tile::kQueryThreads),
                   sizeof(QueryPassSmem<T, kHead>), stream, a);
  }
  if (error == cudaSuccess && (a.dk.data || a.dv.data) && keys > 0) {
    error = launch(attention_bwd_keys<T, kHead, kForm>, dim3(unsigned(keys)), dim3(Tile::kKeyThreads),
                   sizeof(KeyPassSmem<T, kHead>), stream, a);
  }
  if (error == cudaSuccess && a.dbias) {
    const TermTarget to{a.dbias, a.dbias_fp32, false, a.bias_B, a.bias_H, a.bias_Sq, a.bias_Sk};
    error = launch_attention_bwd_terms<T, kHead, kForm>(a, to, stream);
  }
  if (error == cudaSuccess && a.dslopes) {
    const TermTarget to{a.dslopes, true, true, a.B, a.Hq, 1, 1};
    error = launch_attention_bwd_terms<T, kHead, kForm>(a, to, stream);
  }
  if (error == cudaSuccess && a.dsinks && a.B * a.Hq > 0) {
    error = launch(attention_bwd_sinks, dim3(unsigned(a.B * a.Hq)), dim3(kRowPassThreads),
                   sizeof(RowPassSmem), stream, a);
  }
  return error;
}

}  // namespace fastattn::cuda
