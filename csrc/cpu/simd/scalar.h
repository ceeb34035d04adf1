// The vector interface of the CPU kernels, in plain C++ with one lane: the portable fallback, and the
// description of what every other header of this folder provides.
//
//   F32, I32, Mask       kLanes numbers in a register; kTileVectors is the width of a matmul tile
//   load, load_n         all lanes, or the first n (the rest 0), from float, BFloat16 or Half
//   store, store_n       the same way back, rounding to nearest even
//   stream, stream_fence stores that go past the caches; the address must be aligned to the vector
//   scale_by_power       a * 2^n for integral n in [kLeastPower, 128]: 0 at the least, infinite at 128
//   max(a, b), min(a, b) b where either is NaN
//   mask_of_bits         bit i of the word is lane i
//   nonzero_bytes(_n)    lane i where byte i (of n) is not 0
//   select(m, a, b)      a where m, else b
//   reduce_add           a fixed order of additions
//   differing_64         which of 64 unsigned integers differ from a pattern, as a word
//   lane_sums            lane i is the sum of the lanes of register i, of kLanes registers; a fixed order
//   transpose            kLanes registers
#pragma once

#include <math.h>

#include "types.h"

namespace fastattn {
namespace {

constexpr int kLanes = 1;
constexpr int kTileVectors = 4;

struct F32 {
  float v;
};
struct I32 {
  uint32_t v;
};
struct Mask {
  bool m;
};

FASTATTN_INLINE F32 splat(float x) { return {x}; }
FASTATTN_INLINE F32 zero() { return {0.f}; }
FASTATTN_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
FASTATTN_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
FASTATTN_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
FASTATTN_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
FASTATTN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
FASTATTN_INLINE F32 fms(F32 a, F32 b, F32 c) { return {a.v * b.v - c.v}; }
FASTATTN_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
FASTATTN_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
FASTATTN_INLINE F32 abs(F32 a) { return {fabsf(a.v)}; }
FASTATTN_INLINE F32 sqrt(F32 a) { return {sqrtf(a.v)}; }
FASTATTN_INLINE F32 round(F32 a) { return {nearbyintf(a.v)}; }
constexpr float kLeastPower = -160;
FASTATTN_INLINE F32 scale_by_power(F32 a, F32 n) { return {ldexpf(a.v, n.v == n.v ? int(n.v) : 0)}; }

FASTATTN_INLINE Mask operator>(F32 a, F32 b) { return {a.v > b.v}; }
FASTATTN_INLINE Mask is_nan(F32 a) { return {a.v != a.v}; }
FASTATTN_INLINE Mask operator|(Mask a, Mask b) { return {a.m || b.m}; }
FASTATTN_INLINE bool any(Mask a) { return a.m; }
FASTATTN_INLINE uint32_t bits_of(Mask a) { return a.m; }
FASTATTN_INLINE Mask mask_of_bits(uint32_t bits) { return {(bits & 1) != 0}; }
FASTATTN_INLINE F32 select(Mask m, F32 a, F32 b) { return m.m ? a : b; }

FASTATTN_INLINE Mask nonzero_bytes(const uint8_t* p) { return {*p != 0}; }
FASTATTN_INLINE Mask nonzero_bytes_n(const uint8_t* p, int64_t n) { return {n > 0 && *p != 0}; }

template <class T>
FASTATTN_INLINE F32 load(const T* p) {
  return {as_float(*p)};
}
template <class T>
FASTATTN_INLINE F32 load_n(const T* p, int64_t n) {
  return {n > 0 ? as_float(*p) : 0.f};
}
template <class T>
FASTATTN_INLINE void store(T* p, F32 x) {
  from_float(x.v, p);
}
template <class T>
FASTATTN_INLINE void store_n(T* p, F32 x, int64_t n) {
  if (n > 0) from_float(x.v, p);
}
template <class T>
FASTATTN_INLINE void stream(T* p, F32 x) {
  from_float(x.v, p);
}
FASTATTN_INLINE void stream_fence() {}

FASTATTN_INLINE float reduce_add(F32 x) { return x.v; }
FASTATTN_INLINE float reduce_max(F32 x) { return x.v; }
FASTATTN_INLINE F32 lane_sums(const F32* r) { return r[0]; }

FASTATTN_INLINE I32 splat_int(int32_t x) { return {uint32_t(x)}; }
FASTATTN_INLINE I32 iota() { return {0}; }
FASTATTN_INLINE I32 load(const int32_t* p) { return {uint32_t(*p)}; }
FASTATTN_INLINE void store(int32_t* p, I32 x) { *p = int32_t(x.v); }
FASTATTN_INLINE I32 operator+(I32 a, I32 b) { return {a.v + b.v}; }
FASTATTN_INLINE I32 operator-(I32 a, I32 b) { return {a.v - b.v}; }
FASTATTN_INLINE I32 operator^(I32 a, I32 b) { return {a.v ^ b.v}; }
FASTATTN_INLINE I32 operator&(I32 a, I32 b) { return {a.v & b.v}; }
FASTATTN_INLINE I32 operator|(I32 a, I32 b) { return {a.v | b.v}; }
template <int N>
FASTATTN_INLINE I32 shift_right(I32 a) {
  return {a.v >> N};
}
FASTATTN_INLINE F32 to_float(I32 a) { return {float(int32_t(a.v))}; }
FASTATTN_INLINE I32 bits_of(F32 a) { return {as_bits(a.v)}; }
FASTATTN_INLINE F32 float_of(I32 a) { return {from_bits(a.v)}; }
FASTATTN_INLINE Mask below_unsigned(I32 a, I32 b) { return {a.v < b.v}; }
FASTATTN_INLINE void multiply_wide(I32 a, uint32_t m, I32* high, I32* low) {
  const uint64_t product = uint64_t(a.v) * m;
  *high = {uint32_t(product >> 32)};
  *low = {uint32_t(product)};
}
FASTATTN_INLINE void transpose(F32*) {}

// Bit i: (p[i] & mask) != x, for 64 unsigned integers.
template <class U>
FASTATTN_INLINE uint64_t differing_64(const U* p, U x, U mask) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= uint64_t(U(p[i] & mask) != x) << i;
  return bits;
}

}  // namespace
}  // namespace fastattn
