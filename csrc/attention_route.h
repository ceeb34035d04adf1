// Which of the CPU's attention kernels serves a call. A pure function without the batch, the length of the
// keys or the machine in it: the bits of a row must not change with those.
#pragma once

#include <cstdint>

#include "cpu/decode_plan.h"
#include "cpu/simd/types.h"

namespace fastattn {

enum class AttentionRoute { kAttention, kDecode };

// attention.h makes a lane of every query row of a head and leaves the lanes that Sq does not fill idle, so
// the break-even lies where Sq fills a register, whatever the group, the head sizes and the storage: at 8
// rows on 8 lanes (AVX2, measured 0.8 to 1.2 times), at 12 to 16 on 16 lanes.
constexpr int64_t kMaxDecodeRows = 8;

inline AttentionRoute attention_route(int64_t Sq, [[maybe_unused]] int64_t group, [[maybe_unused]] int64_t D,
                                      [[maybe_unused]] int64_t Dv, [[maybe_unused]] Storage storage) {
  static_assert(kMaxDecodeRows <= DecodePlan::kMaxRows);
  return Sq <= kMaxDecodeRows ? AttentionRoute::kDecode : AttentionRoute::kAttention;
}

inline const char* name_of(AttentionRoute route) {
  return route == AttentionRoute::kDecode ? "decode" : "attention";
}

}  // namespace fastattn
