// Twin of csrc/cuda/ptx/wgmma.h.
#pragma once

#include "mma.h"
#include "shuffle.h"
#include "tma.h"

namespace twin {

using fastattn::cuda::Major;

// A matrix in shared memory as its descriptor's bits name it, read as the async proxy sees it.
template <class T>
class WgmmaMatrix {
 public:
  WgmmaMatrix(uint64_t descriptor, Major major)
      : start_(uint32_t(descriptor & 0x3fff) << 4),
        leading_(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        stride_(uint32_t(descriptor >> 32 & 0x3fff) << 4),
        major_(major) {
    constexpr Swizzle kModes[] = {Swizzle::None, Swizzle::B128, Swizzle::B64, Swizzle::B32};
    swizzle_ = kModes[descriptor >> 62];
    if (swizzle_ == Swizzle::None) fail("wgmma: the twin models swizzled operands only");
    if ((descriptor >> 49 & 7) != 0) fail("wgmma: the twin models base offset 0 only");
  }

  // Eight neighbours along the direction that is adjacent in memory: from (mn, k), both multiples of 8 or not
  // as the direction wants it.
  void read8(int mn, int k, float (&to)[8]) const {
    const uint32_t line = uint32_t(swizzle_);
    uint32_t linear = start_;
    if (major_ == Major::K) {
      linear += uint32_t(mn / 8) * stride_ + uint32_t(mn % 8) * line + uint32_t(k) * 2;
    } else {
      const int wide = int(line / 2);
      linear += uint32_t(mn / wide) * leading_ + uint32_t(k / 8) * stride_ + uint32_t(k % 8) * line +
                uint32_t(mn % wide) * 2;
    }
    const uint32_t address = swizzled(linear, swizzle_);
    {
      const sanitizer::Observed observed;
      sanitizer::observe_read16(block->smem.generic(address, 16));
    }
    uint16_t bits[8];
    std::memcpy(bits, block->smem.async(address, 16), 16);
    for (int i = 0; i < 8; ++i) to[i] = fastattn::cuda::to_float(T{bits[i]});
  }

  // Rows [first, first + kRows) of mn, all 16 of k, as to[mn][k] or, transposed, to[k][mn].
  template <int kRows, bool kTransposed, class Tile>
  void read(int first, Tile& to) const {
    float chunk[8];
    const bool by_k = major_ == Major::K;
    for (int mn = 0; mn < kRows; mn += by_k ? 1 : 8) {
      for (int k = 0; k < 16; k += by_k ? 8 : 1) {
        read8(first + mn, k, chunk);
        for (int i = 0; i < 8; ++i) {
          const int row = by_k ? mn : mn + i, col = by_k ? k + i : k;
          (kTransposed ? to[col][row] : to[row][col]) = chunk[i];
        }
      }
    }
  }

 private:
  uint32_t start_, leading_, stride_;
  Major major_;
  Swizzle swizzle_;
};

struct WgmmaLane {
  float* d;
  const uint32_t* a_registers;  // null: a in shared memory
  uint64_t a, b;
  bool accumulate;
  bool same_operands(const WgmmaLane& other) const {
    return a == other.a && b == other.b && accumulate == other.accumulate;
  }
};

// One warp's part of a wgmma: 16 of the 64 rows. Lane l holds rows l / 4 and l / 4 + 8 of them, and columns
// l % 4 * 2 and the next of every 8. Registers are read when it takes effect, not when it is issued.
template <class T, int kN>
struct Wgmma {
  Major major_a, major_b;
  int first_row;
  WgmmaLane lanes[kWarpSize];

  void operator()() const {
    float a[16][16], b[16][kN];
    if (lanes[0].a_registers) {
      for (int lane = 0; lane < kWarpSize; ++lane) {
        for (int i = 0; i < 4; ++i) {
          float* element = &a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8];
          element[0] = low_half<T>(lanes[lane].a_registers[i]);
          element[1] = high_half<T>(lanes[lane].a_registers[i]);
        }
      }
    } else {
      WgmmaMatrix<T>(lanes[0].a, major_a).template read<16, false>(first_row, a);
    }
    WgmmaMatrix<T>(lanes[0].b, major_b).template read<kN, true>(0, b);
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

template <class T, int kN>
void wgmma(const WgmmaLane& mine, Major major_a, Major major_b) {
  warp_collective("wgmma", kAllLanes, mine, [=](WgmmaLane* lanes) {
    Warp& warp = this_warp();
    if (!warp.wgmma_fenced) fail("wgmma without wgmma_fence since the last wait");
    Wgmma<T, kN> operation{major_a, major_b, self->warp() % 4 * 16, {}};
    for (int i = 0; i < kWarpSize; ++i) {
      if (!lanes[i].same_operands(lanes[0])) fail("wgmma: operands differ between lanes");
      operation.lanes[i] = lanes[i];
    }
    warp.wgmma.issue(operation);
  });
}

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

template <class T, int kN, Major kMajorA, Major kMajorB>
void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  twin::wgmma<T, kN>({d, nullptr, a, b, accumulate}, kMajorA, kMajorB);
}
template <class T, int kN, Major kMajorB>
void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  twin::wgmma<T, kN>({d, a, 0, b, accumulate}, Major::K, kMajorB);
}

}  // namespace fastattn::cuda
