// Twin of csrc/cuda/ptx/wgmma.h.
#pragma once

#include "mma.h"
#include "shuffle.h"

namespace twin {

using fastattn::cuda::Major;

// Element (mn, k) of the matrix that a 128-byte-swizzle descriptor names, as the async proxy sees it.
template <class T>
float wgmma_element(uint64_t descriptor, Major major, int mn, int k) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
    fail("wgmma: the twin models the 128-byte swizzle only");
  }
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
  const uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4,
                 stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t linear = major == Major::K
                              ? start + uint32_t(mn / 8) * stride + uint32_t(mn % 8) * 128 + uint32_t(k) * 2
                              : start + uint32_t(mn / 64) * leading + uint32_t(k / 8) * stride +
                                    uint32_t(k % 8) * 128 + uint32_t(mn % 64) * 2;
  const uint32_t address = linear ^ (linear >> 7 & 7) << 4;
  if (address % 16 == 0) {
    const sanitizer::Observed observed;
    sanitizer::observe_read16(block->smem.generic(address, 16));
  }
  uint16_t bits;
  std::memcpy(&bits, block->smem.async(address, 2), 2);
  return fastattn::cuda::to_float(T{bits});
}

struct WgmmaLane {
  float* d;
  uint64_t a, b;
  bool accumulate;
  bool same_operands(const WgmmaLane& other) const {
    return a == other.a && b == other.b && accumulate == other.accumulate;
  }
};

// One warp's part of a wgmma: 16 of the 64 rows. Lane l holds rows l / 4 and l / 4 + 8 of them, and columns
// l % 4 * 2 and the next of every 8.
template <class T, int kN>
struct Wgmma {
  Major major_a, major_b;
  int first_row;
  WgmmaLane lanes[kWarpSize];

  void operator()() const {
    float a[16][16], b[16][kN];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16; ++row)
        a[row][k] = wgmma_element<T>(lanes[0].a, major_a, first_row + row, k);
      for (int col = 0; col < kN; ++col) b[k][col] = wgmma_element<T>(lanes[0].b, major_b, col, k);
    }
    for (int row = 0; row < 16; ++row) {
      float sum[kN] = {};
      for (int k = 0; k < 16; ++k) {
        for (int col = 0; col < kN; ++col) sum[col] += a[row][k] * b[k][col];
      }
      for (int col = 0; col < kN; ++col) {
        const WgmmaLane& lane = lanes[row % 8 * 4 + col % 8 / 2];
        float& out = lane.d[col / 8 * 4 + row / 8 * 2 + col % 2];
        out = (lane.accumulate ? out : 0.0f) + sum[col];
      }
    }
  }
};

}  // namespace twin

namespace fastattn::cuda {

inline void wgmma_fence() {
  twin::warp_collective("wgmma_fence", kAllLanes, 0, [](int*) { twin::this_warp().wgmma_fenced = true; });
}
inline void wgmma_commit() {
  twin::warp_collective("wgmma_commit", kAllLanes, 0, [](int*) { twin::this_warp().wgmma.commit(); });
}
template <int kGroupsInFlight, int kCount>
void wgmma_wait(float (&)[kCount]) {
  twin::warp_collective("wgmma_wait", kAllLanes, 0, [](int*) {
    twin::this_warp().wgmma.wait(kGroupsInFlight);
    twin::this_warp().wgmma_fenced = false;
  });
}

template <Major kMajorA, Major kMajorB>
void wgmma_m64n64k16_bf16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  const twin::WgmmaLane mine{d, a, b, accumulate};
  twin::warp_collective("wgmma", kAllLanes, mine, [](twin::WgmmaLane* lanes) {
    twin::Warp& warp = twin::this_warp();
    if (!warp.wgmma_fenced) twin::fail("wgmma without wgmma_fence since the last wait");
    twin::Wgmma<bf16, 64> operation{kMajorA, kMajorB, twin::self->warp() % 4 * 16, {}};
    for (int i = 0; i < twin::kWarpSize; ++i) {
      if (!lanes[i].same_operands(lanes[0])) twin::fail("wgmma: operands differ between lanes");
      operation.lanes[i] = lanes[i];
    }
    warp.wgmma.issue(operation);
  });
}

}  // namespace fastattn::cuda
