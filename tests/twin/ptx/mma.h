// Twin of csrc/cuda/ptx/mma.h.
#pragma once

#include "../runtime.h"
#include "convert.h"

namespace twin {

template <class T>
float low_half(uint32_t pair) {
  return fastattn::cuda::to_float(T{uint16_t(pair)});
}
template <class T>
float high_half(uint32_t pair) {
  return fastattn::cuda::to_float(T{uint16_t(pair >> 16)});
}

struct MmaOperands {
  uint32_t a[4], b[2];
  float c[4];
};

template <class T>
void multiply(MmaOperands* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* element = &a[group + i % 2 * 8][pair + i / 2 * 8];
      element[0] = low_half<T>(lanes[lane].a[i]);
      element[1] = high_half<T>(lanes[lane].a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = low_half<T>(lanes[lane].b[i]);
      b[pair + i * 8 + 1][group] = high_half<T>(lanes[lane].b[i]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < 8; ++col) sum[col] += a[row][k] * b[k][col];
    }
    for (int col = 0; col < 8; ++col) lanes[row % 8 * 4 + col / 2].c[row / 8 * 2 + col % 2] += sum[col];
  }
}

}  // namespace twin

namespace fastattn::cuda {

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const twin::MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const auto* all = twin::warp_collective("mma_m16n8k16", twin::kAllLanes, mine, twin::multiply<T>);
  for (int i = 0; i < 4; ++i) c[i] = all[twin::self->lane()].c[i];
}

}  // namespace fastattn::cuda
