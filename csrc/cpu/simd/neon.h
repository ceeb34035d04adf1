// NEON of AArch64 (Armv8.0): 4 fp32 lanes, 32 registers. The interface is the one described in scalar.h.
#pragma once

#include <arm_neon.h>

#include "types.h"

namespace fastattn {
namespace {

constexpr int kLanes = 4;
constexpr int kTileVectors = 4;  // a 6 x 4 register tile: 24 accumulators, 4 operands, 1 broadcast

struct F32 {
  float32x4_t v;
};
struct I32 {
  uint32x4_t v;
};
struct Mask {
  uint32x4_t m;
};

FASTATTN_INLINE F32 splat(float x) { return {vdupq_n_f32(x)}; }
FASTATTN_INLINE F32 zero() { return {vdupq_n_f32(0.f)}; }
FASTATTN_INLINE F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
FASTATTN_INLINE F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
FASTATTN_INLINE F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
FASTATTN_INLINE F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
FASTATTN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FASTATTN_INLINE F32 fms(F32 a, F32 b, F32 c) { return {vfmaq_f32(vnegq_f32(c.v), a.v, b.v)}; }
// Not vmaxq: it returns NaN where either is, and the interface wants b.
FASTATTN_INLINE F32 max(F32 a, F32 b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
FASTATTN_INLINE F32 min(F32 a, F32 b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
FASTATTN_INLINE F32 abs(F32 a) { return {vabsq_f32(a.v)}; }
FASTATTN_INLINE F32 sqrt(F32 a) { return {vsqrtq_f32(a.v)}; }
FASTATTN_INLINE F32 round(F32 a) { return {vrndnq_f32(a.v)}; }
// The power is built as a float's exponent field: -127 gives the factor 0, and 128 infinity.
constexpr float kLeastPower = -127;
FASTATTN_INLINE F32 scale_by_power(F32 a, F32 n) {
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}

FASTATTN_INLINE uint32x4_t lane_bits() {
  const uint32_t bits[4] = {1, 2, 4, 8};
  return vld1q_u32(bits);
}

FASTATTN_INLINE Mask operator>(F32 a, F32 b) { return {vcgtq_f32(a.v, b.v)}; }
FASTATTN_INLINE Mask is_nan(F32 a) { return {vmvnq_u32(vceqq_f32(a.v, a.v))}; }
FASTATTN_INLINE Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.m, b.m)}; }
FASTATTN_INLINE bool any(Mask a) { return vmaxvq_u32(a.m) != 0; }
FASTATTN_INLINE uint32_t bits_of(Mask a) { return vaddvq_u32(vandq_u32(a.m, lane_bits())); }
FASTATTN_INLINE Mask mask_of_bits(uint32_t bits) { return {vtstq_u32(vdupq_n_u32(bits), lane_bits())}; }
FASTATTN_INLINE F32 select(Mask m, F32 a, F32 b) { return {vbslq_f32(m.m, a.v, b.v)}; }

FASTATTN_INLINE Mask nonzero_bytes_n(const uint8_t* p, int64_t n) {
  uint32_t lanes[kLanes] = {};
  for (int64_t i = 0; i < n && i < kLanes; ++i) lanes[i] = p[i];
  return {vtstq_u32(vld1q_u32(lanes), vdupq_n_u32(0xff))};
}
FASTATTN_INLINE Mask nonzero_bytes(const uint8_t* p) { return nonzero_bytes_n(p, kLanes); }

FASTATTN_INLINE F32 load(const float* p) { return {vld1q_f32(p)}; }
FASTATTN_INLINE void store(float* p, F32 x) { vst1q_f32(p, x.v); }

FASTATTN_INLINE F32 load(const BFloat16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p), 16))};
}
FASTATTN_INLINE void store(BFloat16* p, F32 x) {
  const uint32x4_t u = vreinterpretq_u32_f32(x.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(u, odd), vdupq_n_u32(0x7fff));
  const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
  vst1_u16((uint16_t*)p, vshrn_n_u32(vbslq_u32(is_nan(x).m, quiet, rounded), 16));
}

FASTATTN_INLINE F32 load(const Half* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)))};
}
FASTATTN_INLINE void store(Half* p, F32 x) {
  vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}

template <class T>
FASTATTN_INLINE F32 load_n(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
FASTATTN_INLINE void store_n(T* p, F32 x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  T lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
// A store that passes the caches comes in pairs of registers here, which no caller has.
template <class T>
FASTATTN_INLINE void stream(T* p, F32 x) {
  store(p, x);
}
FASTATTN_INLINE void stream_fence() {}

FASTATTN_INLINE float reduce_add(F32 x) {
  const float32x4_t pairs = vpaddq_f32(x.v, x.v);
  return vgetq_lane_f32(pairs, 0) + vgetq_lane_f32(pairs, 1);
}
FASTATTN_INLINE float reduce_max(F32 x) { return vmaxvq_f32(x.v); }
FASTATTN_INLINE F32 lane_sums(const F32* r) {
  return {vpaddq_f32(vpaddq_f32(r[0].v, r[1].v), vpaddq_f32(r[2].v, r[3].v))};
}

FASTATTN_INLINE I32 splat_int(int32_t x) { return {vdupq_n_u32(uint32_t(x))}; }
FASTATTN_INLINE I32 iota() {
  const uint32_t lanes[4] = {0, 1, 2, 3};
  return {vld1q_u32(lanes)};
}
FASTATTN_INLINE I32 load(const int32_t* p) { return {vreinterpretq_u32_s32(vld1q_s32(p))}; }
FASTATTN_INLINE void store(int32_t* p, I32 x) { vst1q_s32(p, vreinterpretq_s32_u32(x.v)); }
FASTATTN_INLINE I32 operator+(I32 a, I32 b) { return {vaddq_u32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator-(I32 a, I32 b) { return {vsubq_u32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator^(I32 a, I32 b) { return {veorq_u32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator&(I32 a, I32 b) { return {vandq_u32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator|(I32 a, I32 b) { return {vorrq_u32(a.v, b.v)}; }
template <int N>
FASTATTN_INLINE I32 shift_right(I32 a) {
  return {vshrq_n_u32(a.v, N)};
}
FASTATTN_INLINE F32 to_float(I32 a) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.v))}; }
FASTATTN_INLINE I32 bits_of(F32 a) { return {vreinterpretq_u32_f32(a.v)}; }
FASTATTN_INLINE F32 float_of(I32 a) { return {vreinterpretq_f32_u32(a.v)}; }
FASTATTN_INLINE Mask below_unsigned(I32 a, I32 b) { return {vcltq_u32(a.v, b.v)}; }
// The high and low words of the 32 x 32 -> 64 bit products a * m.
FASTATTN_INLINE void multiply_wide(I32 a, uint32_t m, I32* high, I32* low) {
  const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a.v), m));
  const uint32x4_t last = vreinterpretq_u32_u64(vmull_n_u32(vget_high_u32(a.v), m));
  low->v = vuzp1q_u32(first, last);
  high->v = vuzp2q_u32(first, last);
}

// r[i] lane j <-> r[j] lane i.
FASTATTN_INLINE void transpose(F32* r) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r[0].v, r[1].v));
  const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(r[0].v, r[1].v));
  const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r[2].v, r[3].v));
  const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(r[2].v, r[3].v));
  r[0].v = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
  r[1].v = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
  r[2].v = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
  r[3].v = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

// 64 bytes of 0 or 255 to a word of their bits: each byte keeps the bit of its place, neighbours are added.
FASTATTN_INLINE uint64_t word_of_bytes(const uint8x16_t* t) {
  const uint8_t places[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t bits = vld1q_u8(places);
  const uint8x16_t a = vpaddq_u8(vandq_u8(t[0], bits), vandq_u8(t[1], bits));
  const uint8x16_t b = vpaddq_u8(vandq_u8(t[2], bits), vandq_u8(t[3], bits));
  const uint8x16_t c = vpaddq_u8(a, b);
  return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(c, c)), 0);
}

// Bit i: (p[i] & mask) != x, for 64 unsigned integers.
FASTATTN_INLINE uint64_t differing_64(const uint8_t* p, uint8_t x, uint8_t mask) {
  uint8x16_t equal[4];
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    equal[n] = vceqq_u8(vandq_u8(vld1q_u8(p + 16 * n), vdupq_n_u8(mask)), vdupq_n_u8(x));
  }
  return ~word_of_bytes(equal);
}
FASTATTN_INLINE uint8x16_t equal_16(const uint16_t* p, uint16_t x, uint16_t mask) {
  const uint16x8_t a = vceqq_u16(vandq_u16(vld1q_u16(p), vdupq_n_u16(mask)), vdupq_n_u16(x));
  const uint16x8_t b = vceqq_u16(vandq_u16(vld1q_u16(p + 8), vdupq_n_u16(mask)), vdupq_n_u16(x));
  return vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
}
FASTATTN_INLINE uint8x16_t equal_16(const uint32_t* p, uint32_t x, uint32_t mask) {
  uint16x8_t half[2];
#pragma GCC unroll 2
  for (int n = 0; n < 2; ++n, p += 8) {
    const uint32x4_t a = vceqq_u32(vandq_u32(vld1q_u32(p), vdupq_n_u32(mask)), vdupq_n_u32(x));
    const uint32x4_t b = vceqq_u32(vandq_u32(vld1q_u32(p + 4), vdupq_n_u32(mask)), vdupq_n_u32(x));
    half[n] = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
  }
  return vuzp1q_u8(vreinterpretq_u8_u16(half[0]), vreinterpretq_u8_u16(half[1]));
}
template <class U>
FASTATTN_INLINE uint64_t differing_64(const U* p, U x, U mask) {
  uint8x16_t equal[4];
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) equal[n] = equal_16(p + 16 * n, x, mask);
  return ~word_of_bytes(equal);
}

}  // namespace
}  // namespace fastattn
