// Dropout bits by counter: Philox4x32-10 (Salmon et al., 2011), key = seed, counter = (b, h, q_pos, k_pos /
// 4), one 32-bit word a key. The same mask on every backend, whatever the tiling.
#pragma once

namespace fastattn {
namespace {

// Words for four keys, one query a lane.
FASTATTN_INLINE void philox(uint64_t seed, I32 c0, I32 c1, I32 c2, I32 c3, I32* out) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    I32 high0, low0, high1, low1;
    multiply_wide(c0, 0xd2511f53u, &high0, &low0);
    multiply_wide(c2, 0xcd9e8d57u, &high1, &low1);
    c0 = high1 ^ c1 ^ splat_int(int32_t(k0));
    c1 = low1;
    c2 = high0 ^ c3 ^ splat_int(int32_t(k1));
    c3 = low0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

}  // namespace
}  // namespace fastattn
