// Storage types of the kernels. Arithmetic is always fp32; these only say how a number lies in memory.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTATTN_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define FASTATTN_INLINE inline __attribute__((always_inline))
#endif

namespace fastattn {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// How a tensor's elements are stored; the order is that of the kernel tables.
enum class Storage : int { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

FASTATTN_INLINE uint32_t as_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FASTATTN_INLINE float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

FASTATTN_INLINE float as_float(float x) { return x; }
FASTATTN_INLINE float as_float(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
FASTATTN_INLINE float as_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1f, mantissa = x.bits & 0x3ff;
  if (exponent == 0x1f) return from_bits(sign | 0x7f800000 | (mantissa << 13));
  if (exponent != 0) return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float subnormal = float(mantissa) * from_bits(0x33800000);  // mantissa * 2^-24
  return from_bits(sign | as_bits(subnormal));
}

// Round to nearest even; NaN stays NaN.
FASTATTN_INLINE void from_float(float x, float* out) { *out = x; }
FASTATTN_INLINE void from_float(float x, BFloat16* out) {
  const uint32_t u = as_bits(x);
  out->bits = (u & 0x7fffffff) > 0x7f800000 ? uint16_t((u >> 16) | 0x40)
                                            : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
FASTATTN_INLINE void from_float(float x, Half* out) {
  const uint32_t u = as_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // at or past the midpoint between 65504 and infinity
    out->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: let the fp32 adder round at 2^-24
    const float shifted = from_bits(magnitude) + from_bits(0x3f000000);
    out->bits = uint16_t(sign | (as_bits(shifted) - 0x3f000000));
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    out->bits = uint16_t(sign | ((rounded - 0x38000000) >> 13));
  }
}

}  // namespace fastattn
