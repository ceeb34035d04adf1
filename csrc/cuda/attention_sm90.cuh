// Attention forward for Hopper (sm_90a): out = softmax(scale * q k^T, masked) v and its log-sum-exp.
// q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], bf16 or fp16, D = 64, 128 or 256; masks by ranges and bits,
// softcap.
//
// A block of threads owns tiles of 64 rows a consumer warpgroup. The producer warpgroup gives its registers
// away; one warp of it walks the visible blocks of keys and loads them by TMA, two stages deep. A consumer
// issues S = Q K^T of the next block and O += P V of this one together, both by wgmma with sums in registers,
// P an operand in registers, Q, K and V in shared memory, and turns S into P while its O and the other
// consumers' products run. A baton keeps the consumers in turn (ping-pong), so that one's softmax falls
// beside another's products. The scheme is that of FlashAttention-3 (Shah et al., 2024).
//
// Tiles are taken from a counter, the longest first. Each is computed by one block of threads in one order of
// sums, so neither batch nor card changes a bit.
#pragma once

#include "attention_sm90_rows.cuh"
#include "attention_sm90_schedule.cuh"
#include "attention_sm90_walk.cuh"

namespace fastattn::cuda {

// Shapes of a head size. Registers: (consumers * theirs + producer's) * 128 fit the file of 65536.
template <int kD>
struct TileSm90;
template <>
struct TileSm90<64> {
  static constexpr int kConsumers = 3, kKeyGranules = 2, kConsumerRegisters = 160, kProducerRegisters = 32;
  static constexpr bool kBaton = true;
};
template <>
struct TileSm90<128> {
  static constexpr int kConsumers = 2, kKeyGranules = 2, kConsumerRegisters = 224, kProducerRegisters = 56;
  static constexpr bool kBaton = true;
};
template <>
struct TileSm90<256> {  // a block of 128 keys would need 256 KB; products outweigh the softmax: no baton
  static constexpr int kConsumers = 2, kKeyGranules = 1, kConsumerRegisters = 232, kProducerRegisters = 40;
  static constexpr bool kBaton = false;
};

constexpr int kStages = 2;  // of keys and values

// Tiles are panels of 64 columns, rows of 128 bytes swizzled.
template <class T, int kD>
struct alignas(1024) SmemSm90 {
  using Tile = TileSm90<kD>;
  static constexpr int kM = Tile::kConsumers * kGranule, kN = Tile::kKeyGranules * kGranule;

  T q[kM * kD];
  T k[kStages][kN * kD];
  T v[kStages][kN * kD];

  using Plan = GranulePlan<Tile::kKeyGranules>;
  // What comes with k: what each consumer sees of it, and its first key, -1 after the tile's last block.
  Plan plan[kStages][Tile::kConsumers];
  alignas(
      16) uint64_t words[kStages][Tile::kConsumers][Tile::kKeyGranules][kGranule];  // of the tiles it names
  int first_key[kStages];
  int tile[2];  // comes with q, in turns as it is written ahead of it; -1 after the last
  KeyRange range[Tile::kConsumers][kGranule];  // a consumer's own notes

  uint64_t q_full, q_empty;
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

template <int kRows, int kD, class T>
__device__ __forceinline__ void load_panels(T* smem, const TensorMap& map, uint64_t* bar, int row, int head,
                                            int batch) {
#pragma unroll
  for (int panel = 0; panel < kD / 64; ++panel) {
    tma_load_4d(smem + panel * kRows * 64, map, bar, panel * 64, row, head, batch);
  }
}

// One warp.
template <class T, int kD>
__device__ __forceinline__ void produce(SmemSm90<T, kD>& smem, const TensorMap& q_map, const TensorMap& k_map,
                                        const TensorMap& v_map, const AttentionArgs& args,
                                        const ScheduleSm90& schedule) {
  using Smem = SmemSm90<T, kD>;
  using Tile = TileSm90<kD>;
  using Walk = BlockWalk<Tile::kConsumers, Tile::kKeyGranules>;
  constexpr int kBlockBytes = Smem::kN * kD * int(sizeof(T)), kTileBytes = kGranule * int(sizeof(uint64_t));
  const int lane = int(threadIdx.x) % kWarp;
  int tile = int(blockIdx.x);
  // Tiles so far, modulo 4, and in the bits above them blocks of keys asked for so far with an end of each
  // tile: one register for two, as this warp has few.
  uint32_t turns = 0;
  const auto round = [&] { return turns % 4; };
  const auto keys = [&] { return turns / 4; };

  while (true) {
    const bool end = tile >= schedule.tiles;
    if (lane == 0) smem.tile[round() % 2] = end ? -1 : tile;
    const TileIndex index = tile_index(schedule, args, end ? 0 : tile);
    Walk walk(args, index.batch, index.head, index.m_block * Tile::kConsumers);

    mbarrier_wait(&smem.q_empty, int(round() & 1) ^ 1);
    if (lane == 0) {
      if (end) {
        mbarrier_arrive(&smem.q_full);
      } else {
        mbarrier_arrive_expect_tx(&smem.q_full, Smem::kM * kD * int(sizeof(T)));
        load_panels<Smem::kM, kD>(smem.q, q_map, &smem.q_full, index.m_block * Smem::kM, index.head,
                                  index.batch);
      }
    }
    if (end) return;
    const int kv_head = schedule.by_group.quotient(index.head);
    // Lane 0 keeps the next tile until the others need it, so that nobody waits for the counter.
    if (lane == 0) tile = int(gridDim.x + atomicAdd(schedule.next_tile, 1u));

    // Keys go ahead of values by a block, as the consumers ask for them.
    bool more = true, values_due = false;
    while (more || values_due) {
      if (more) {
        typename Walk::Plan plan;
        const int n_block = walk.next(plan);
        more = n_block >= 0;
        const int stage = int(keys() % kStages);
        mbarrier_wait(&smem.k_empty[stage], int(keys() / kStages & 1) ^ 1);
        turns += 4;
        if (lane < Tile::kConsumers) smem.plan[stage][lane] = plan;
        int tiles = 0;
#pragma unroll
        for (int i = 0; i < Tile::kKeyGranules; ++i) {
          const bool wanted = plan.tile[i] >= 0;
          tiles += __popc(warp_ballot(wanted));
          if (wanted) {
            bulk_load(smem.words[stage][lane][i], args.bit_tiles + int64_t(plan.tile[i]) * kGranule,
                      kTileBytes, &smem.k_full[stage]);
          }
        }
        if (lane == 0) smem.first_key[stage] = n_block * Smem::kN;
        __syncwarp();  // the plan is written before lane 0 arrives
        if (lane == 0) {
          if (more) {
            mbarrier_arrive_expect_tx(&smem.k_full[stage], kBlockBytes + tiles * kTileBytes);
            load_panels<Smem::kN, kD>(smem.k[stage], k_map, &smem.k_full[stage], n_block * Smem::kN, kv_head,
                                      index.batch);
          } else {
            mbarrier_arrive(&smem.k_full[stage]);
          }
        }
      }
      if (values_due) {
        // Values loaded before: this tile's block after it, or its end, has been asked for, and `round` ends
        // before.
        const uint32_t values = keys() - round() - 2;
        const int stage = int(values % kStages);
        mbarrier_wait(&smem.v_empty[stage], int(values / kStages & 1) ^ 1);
        if (lane == 0) {
          mbarrier_arrive_expect_tx(&smem.v_full[stage], kBlockBytes);
          const int first_key = smem.first_key[keys() % kStages];  // of the block of keys before the last
          load_panels<Smem::kN, kD>(smem.v[stage], v_map, &smem.v_full[stage], first_key, kv_head,
                                    index.batch);
        }
      }
      values_due = more;
    }
    tile = shfl(tile, 0);
    turns = (turns & ~3u) | ((turns + 1) & 3);
  }
}

// S = Q K^T for a warpgroup's rows; `q` is its first row of the first panel.
template <class T, int kD, int kM, int kN>
__device__ __forceinline__ void issue_scores(float (&s)[kN / 2], const T* q, const T* k) {
  const uint32_t q_address = smem_address(q), k_address = smem_address(k);
#pragma unroll
  for (int d = 0; d < kD; d += 16) {
    const uint32_t panel = d / 64, column_bytes = d % 64 * 2;
    wgmma_ss<T, kN, Major::K, Major::K>(
        s, wgmma_descriptor(q_address + panel * kM * 128 + column_bytes, 0, 1024),
        wgmma_descriptor(k_address + panel * kN * 128 + column_bytes, 0, 1024), d > 0);
  }
  wgmma_commit();
}

// O += P V.
template <class T, int kD, int kN>
__device__ __forceinline__ void issue_values(float (&o)[kD / 2], const uint32_t (&p)[kN / 16][4],
                                             const T* v) {
  const uint32_t v_address = smem_address(v);
#pragma unroll
  for (int n = 0; n < kN; n += 16) {
    wgmma_rs<T, kD, Major::MN>(o, p[n / 16], wgmma_descriptor(v_address + n * 128, kN * 128, 1024), true);
  }
  wgmma_commit();
}

// The 128 threads of one consumer warpgroup.
template <class T, int kD>
__device__ __forceinline__ void consume(SmemSm90<T, kD>& smem, const AttentionArgs& args,
                                        const ScheduleSm90& schedule) {
  using Smem = SmemSm90<T, kD>;
  using Tile = TileSm90<kD>;
  using Plan = typename Smem::Plan;
  constexpr int kM = Smem::kM, kN = Smem::kN;
  const int warpgroup = shfl(int(threadIdx.x) / 128, 0) - 1;
  const T* q = smem.q + warpgroup * kGranule * 64;
  const ScoreUnits& units = schedule.units;

  const auto release = [&](uint64_t* bar) {
    __syncwarp();  // lane 0 speaks for the warp's reads
    if (thread_index() % kWarp == 0) mbarrier_arrive(bar);
  };
  const auto take_baton = [&] {
    if (Tile::kBaton) named_barrier_sync(1 + warpgroup, 256);
  };
  const auto pass_baton = [&] {
    if (Tile::kBaton) named_barrier_arrive(1 + (warpgroup + 1) % Tile::kConsumers, 256);
  };
  if (warpgroup == Tile::kConsumers - 1) pass_baton();  // the first consumer begins

  float s[kN / 2], o[kD / 2], row_max[2], row_sum[2], correction[2];
  uint32_t p[kN / 16][4];
  uint32_t keys = 0, values = 0;  // blocks done with so far, as the producer counts
  const auto stage_of = [](uint32_t count) { return int(count % kStages); };
  const auto parity_of = [](uint32_t count) { return int(count / kStages & 1); };

  for (int turn = 0;; turn ^= 1) {
    mbarrier_wait(&smem.q_full, turn);
    const int tile = shfl(smem.tile[turn], 0);
    if (tile < 0) break;
    const auto index_of_tile = [&] { return tile_index(schedule, args, tile); };
    const auto first_row = [&](const TileIndex& index) {
      return index.m_block * kM + warpgroup * kGranule + row_in_granule();
    };
    if (thread_index() % 4 == 0) {
      const TileIndex index = index_of_tile();
      const RowRanges ranges(args, uint32_t(index.batch), uint32_t(index.head));
      for (int row = first_row(index), end = row + 16; row < end; row += 8) {
        smem.range[warpgroup][row % kGranule] = row < args.Sq ? ranges(uint32_t(row)) : KeyRange{0, 0};
      }
    }
    __syncwarp();
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) o[i] = 0.0f;

    bool cut = false;
    Plan plan;
    int key;
    const auto next_plan = [&] {
      const int stage = stage_of(keys);
      mbarrier_wait(&smem.k_full[stage], parity_of(keys));
      plan = uniform(smem.plan[stage][warpgroup]);
      key = shfl(smem.first_key[stage], 0);
      if (key >= 0) return;
      release(&smem.q_empty);  // the scores of the tile's last block have been waited for
      release(&smem.k_empty[stage]);
      ++keys;
    };
    const auto scores_to_weights = [&] {
      const int stage = stage_of(keys);
      transform_scores(s, units);
      if (plan.seen != kSeenWhole) {
        hide_scores(s, plan, smem.words[stage][warpgroup], smem.range[warpgroup], key);
        cut = true;
      }
      release(&smem.k_empty[stage]);
      ++keys;
      online_softmax(s, row_max, row_sum, correction, units.factor);
    };

    next_plan();
    while (key >= 0) {
      if (plan.seen == kSeenNothing) {  // another warpgroup's block: let it pass
        take_baton();
        pass_baton();
        release(&smem.k_empty[stage_of(keys)]);
        ++keys;
        mbarrier_wait(&smem.v_full[stage_of(values)],
                      parity_of(values));  // else a phase could be arrived at twice
        release(&smem.v_empty[stage_of(values)]);
        ++values;
        next_plan();
        continue;
      }
      take_baton();
      wgmma_fence();
      issue_scores<T, kD, kM, kN>(s, q, smem.k[stage_of(keys)]);
      pass_baton();
      wgmma_wait<0>(s);
      scores_to_weights();
      rescale(o, correction);
      round_weights<T>(p, s);

      // Scores of the next block beside the values of this one.
      next_plan();
      while (key >= 0 && plan.seen != kSeenNothing) {
        take_baton();
        wgmma_fence();
        issue_scores<T, kD, kM, kN>(s, q, smem.k[stage_of(keys)]);
        mbarrier_wait(&smem.v_full[stage_of(values)], parity_of(values));
        wgmma_fence();  // the wait's loop parts it from the one above
        issue_values<T, kD, kN>(o, p, smem.v[stage_of(values)]);
        pass_baton();
        wgmma_wait<1>(s);
        scores_to_weights();
        wgmma_wait<0>(o);
        release(&smem.v_empty[stage_of(values)]);
        ++values;
        rescale(o, correction);
        round_weights<T>(p, s);
        next_plan();
      }

      mbarrier_wait(&smem.v_full[stage_of(values)], parity_of(values));
      wgmma_fence();
      issue_values<T, kD, kN>(o, p, smem.v[stage_of(values)]);
      wgmma_wait<0>(o);
      release(&smem.v_empty[stage_of(values)]);
      ++values;
    }

    // Looked up again: over the loop, registers are dearer.
    const TileIndex index = index_of_tile();
    finish_rows<T, kD>(args, index.batch, index.head, first_row(index), o, row_max, row_sum, units, cut);
  }
  if (warpgroup == 0) take_baton();  // the last pass
}

template <class T, int kD>
__global__ void __launch_bounds__((TileSm90<kD>::kConsumers + 1) * 128, 1)
    attention_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map, const __grid_constant__ AttentionArgs args,
                   const __grid_constant__ ScheduleSm90 schedule) {
  using Tile = TileSm90<kD>;
  auto& smem = shared_storage<SmemSm90<T, kD>>();
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = Tile::kConsumers * 4;
    mbarrier_init(&smem.q_full, 1);
    mbarrier_init(&smem.q_empty, kConsumerWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&smem.k_full[stage], 1);
      mbarrier_init(&smem.v_full[stage], 1);
      mbarrier_init(&smem.k_empty[stage], kConsumerWarps);
      mbarrier_init(&smem.v_empty[stage], kConsumerWarps);
    }
    fence_mbarrier_init();
    tma_prefetch(q_map);
    tma_prefetch(k_map);
    tma_prefetch(v_map);
  }
  __syncthreads();

  if (shfl(int(threadIdx.x) / 128, 0) == 0) {
    setmaxnreg_dec<Tile::kProducerRegisters>();
    if (threadIdx.x < kWarp) produce<T, kD>(smem, q_map, k_map, v_map, args, schedule);
  } else {
    setmaxnreg_inc<Tile::kConsumerRegisters>();
    consume<T, kD>(smem, args, schedule);
  }
}

}  // namespace fastattn::cuda
