// wgmma: asynchronous products of a warpgroup (four warps). The right operand lies in shared memory, the left
// one there or in registers; the sums are fp32 in registers.
#pragma once

#include <type_traits>

#include "../layout.h"

namespace fastattn::cuda {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Orders the registers of accumulators and left operands before the wgmma that follow; needed before the
// first of a batch.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most this many groups are under way. The accumulators are operands so that the compiler
// cannot read them before; name those that are done, and no others.
template <int kGroupsInFlight, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&d)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsInFlight) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a * b + (accumulate ? d : 0) for 64 rows, kN columns (64, 128 or 256), k = 16. Warp w of the warpgroup
// holds rows 16 w to 16 w + 15: lane l, in d[4 i + 2 j + e], row l / 4 + 8 j and column 8 i + l % 4 * 2 + e.
// Registers are operands by number, so each width spells its own list.
#define FASTATTN_D8(i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTATTN_D32(i) FASTATTN_D8(i), FASTATTN_D8(i + 8), FASTATTN_D8(i + 16), FASTATTN_D8(i + 24)
#define FASTATTN_D64(i) FASTATTN_D32(i), FASTATTN_D32(i + 32)
#define FASTATTN_D128(i) FASTATTN_D64(i), FASTATTN_D64(i + 64)
#define FASTATTN_R10(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define FASTATTN_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " FASTATTN_R10(1) ", " FASTATTN_R10(2) ", %30, %31"
#define FASTATTN_R64 \
  FASTATTN_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, " FASTATTN_R10(4) ", " FASTATTN_R10(5) ", %60, %61, " \
               "%62, %63"
#define FASTATTN_R128                                                                                     \
  FASTATTN_R64 ", %64, %65, %66, %67, %68, %69, " FASTATTN_R10(7) ", " FASTATTN_R10(8) ", " FASTATTN_R10( \
      9) ", " FASTATTN_R10(10) ", " FASTATTN_R10(11) ", %120, %121, %122, %123, %124, %125, %126, %127"

// SS: a, b, accumulate, major of a, major of b. RS: four registers of a, b, accumulate, major of b.
#define FASTATTN_WGMMA_SS(kWidth, kType, kSums, kRegisters, kA, kB, kPredicate, kMajorAText, kMajorBText)  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " kPredicate                                              \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" kWidth "k16.f32." kType "." kType " {" kRegisters \
               "}, " kA ", " kB ", p, 1, 1, " kMajorAText ", " kMajorBText ";\n}"                          \
               : kSums(0)                                                                                  \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kMajorA)), "n"(int(kMajorB)))
#define FASTATTN_WGMMA_RS(kWidth, kType, kSums, kRegisters, kA, kB, kPredicate, kMajorBText)          \
  asm volatile(                                                                                       \
      "{\n.reg .pred p;\nsetp.ne.b32 p, " kPredicate ", 0;\nwgmma.mma_async.sync.aligned.m64n" kWidth \
      "k16.f32." kType "." kType " {" kRegisters "}, {" kA "}, " kB ", p, 1, 1, " kMajorBText ";\n}"  \
      : kSums(0)                                                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kMajorB)))

// a and b in shared memory, by descriptors.
template <class T, int kN, Major kMajorA, Major kMajorB>
__device__ __forceinline__ void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256, "the widths the kernels use");
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kN == 64 && kBf16) {
    FASTATTN_WGMMA_SS("64", "bf16", FASTATTN_D32, FASTATTN_R32, "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (kN == 64) {
    FASTATTN_WGMMA_SS("64", "f16", FASTATTN_D32, FASTATTN_R32, "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (kN == 128 && kBf16) {
    FASTATTN_WGMMA_SS("128", "bf16", FASTATTN_D64, FASTATTN_R64, "%64", "%65", "%66", "%67", "%68");
  } else if constexpr (kN == 128) {
    FASTATTN_WGMMA_SS("128", "f16", FASTATTN_D64, FASTATTN_R64, "%64", "%65", "%66", "%67", "%68");
  } else if constexpr (kBf16) {
    FASTATTN_WGMMA_SS("256", "bf16", FASTATTN_D128, FASTATTN_R128, "%128", "%129", "%130", "%131", "%132");
  } else {
    FASTATTN_WGMMA_SS("256", "f16", FASTATTN_D128, FASTATTN_R128, "%128", "%129", "%130", "%131", "%132");
  }
}

// a in registers, as mma_m16n8k16's a: of a warp's 16 rows, neighbouring pairs of accumulators, rounded. They
// are read while the product runs: unchanged until it has been waited for.
template <class T, int kN, Major kMajorB>
__device__ __forceinline__ void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                         bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256, "the widths the kernels use");
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kN == 64 && kBf16) {
    FASTATTN_WGMMA_RS("64", "bf16", FASTATTN_D32, FASTATTN_R32, "%32, %33, %34, %35", "%36", "%37", "%38");
  } else if constexpr (kN == 64) {
    FASTATTN_WGMMA_RS("64", "f16", FASTATTN_D32, FASTATTN_R32, "%32, %33, %34, %35", "%36", "%37", "%38");
  } else if constexpr (kN == 128 && kBf16) {
    FASTATTN_WGMMA_RS("128", "bf16", FASTATTN_D64, FASTATTN_R64, "%64, %65, %66, %67", "%68", "%69", "%70");
  } else if constexpr (kN == 128) {
    FASTATTN_WGMMA_RS("128", "f16", FASTATTN_D64, FASTATTN_R64, "%64, %65, %66, %67", "%68", "%69", "%70");
  } else if constexpr (kBf16) {
    FASTATTN_WGMMA_RS("256", "bf16", FASTATTN_D128, FASTATTN_R128, "%128, %129, %130, %131", "%132", "%133",
                      "%134");
  } else {
    FASTATTN_WGMMA_RS("256", "f16", FASTATTN_D128, FASTATTN_R128, "%128, %129, %130, %131", "%132", "%133",
                      "%134");
  }
}

#undef FASTATTN_WGMMA_SS
#undef FASTATTN_WGMMA_RS
#undef FASTATTN_R128
#undef FASTATTN_R64
#undef FASTATTN_R32
#undef FASTATTN_R10
#undef FASTATTN_D128
#undef FASTATTN_D64
#undef FASTATTN_D32
#undef FASTATTN_D8

#endif

}  // namespace fastattn::cuda
