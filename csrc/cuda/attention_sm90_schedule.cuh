// The order in which attention_sm90 takes its tiles: sections of heads whose keys and values share the
// second-level cache, and in a section all heads' longest tile first, then their second.
#pragma once

#include "attention_sm90_rows.cuh"

namespace fastattn::cuda {

// n / d for 0 <= n < 2^31 as a multiplication (Granlund and Montgomery, 1994), made on the host: a division
// would keep its reciprocal in registers.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  __device__ __forceinline__ int quotient(int n) const {
    return divisor == 1 ? n : int(__umulhi(uint32_t(n), multiplier) >> shift);
  }
};
inline Divisor make_divisor(int d) {
  uint32_t bits = 0;
  while ((uint64_t(1) << bits) < uint64_t(d)) ++bits;
  if (bits == 0) return {1, 0, 0};
  return {uint32_t(d), uint32_t(((uint64_t(1) << (31 + bits)) + uint64_t(d) - 1) / uint64_t(d)), bits - 1};
}

struct ScheduleSm90 {
  int tiles, m_blocks, section, sections;            // section: heads of all but the last
  Divisor per_section, of_section, of_last_section;  // by tiles of a section, by heads of one, of the last
  Divisor by_heads, by_group;                        // by Hq, by Hq / Hkv
  bool last_first;                                   // the last rows see the most
  unsigned* next_tile;                               // zero at launch
  ScoreUnits units;
};

struct TileIndex {
  int batch, head, m_block;
};

__device__ __forceinline__ TileIndex tile_index(const ScheduleSm90& schedule, const AttentionArgs& args,
                                                int tile) {
  const int section = schedule.per_section.quotient(tile);
  const int rest = tile - section * schedule.section * schedule.m_blocks;
  const Divisor& heads = section == schedule.sections - 1 ? schedule.of_last_section : schedule.of_section;
  const int m = heads.quotient(rest), head = section * schedule.section + rest - m * int(heads.divisor);
  const int batch = schedule.by_heads.quotient(head);
  return {batch, head - batch * args.Hq, schedule.last_first ? schedule.m_blocks - 1 - m : m};
}

// Sections are as many heads as have keys and values of at most `cache_bytes` together.
inline ScheduleSm90 make_schedule(const AttentionArgs& args, int rows_of_tile, unsigned* next_tile,
                                  int64_t cache_bytes) {
  ScheduleSm90 schedule{};
  const int heads = args.B * args.Hq, group = args.Hq / args.Hkv;
  schedule.m_blocks = (args.Sq + rows_of_tile - 1) / rows_of_tile;
  schedule.tiles = schedule.m_blocks * heads;
  const int64_t kv_head_bytes = 2 * int64_t(args.Sk) * args.D * 2;
  const int64_t kv_heads = kv_head_bytes > 0 ? cache_bytes / kv_head_bytes : heads;
  const int64_t section = (kv_heads < 1 ? 1 : kv_heads) * group;
  schedule.section = int(section < heads ? section : heads);
  schedule.sections = (heads + schedule.section - 1) / schedule.section;
  schedule.per_section = make_divisor(schedule.section * schedule.m_blocks);
  schedule.of_section = make_divisor(schedule.section);
  schedule.of_last_section = make_divisor(heads - (schedule.sections - 1) * schedule.section);
  schedule.by_heads = make_divisor(args.Hq);
  schedule.by_group = make_divisor(group);
  // Bounded above, the band gives later rows more; bounded below only, earlier ones.
  schedule.last_first = args.band_hi < kUnbounded || args.band_lo <= -kUnbounded;
  schedule.next_tile = next_tile;
  schedule.units = score_units(args);
  return schedule;
}

}  // namespace fastattn::cuda
