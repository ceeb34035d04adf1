// AVX2 with FMA and F16C: 8 fp32 lanes, 16 registers. The interface is the one described in scalar.h.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace fastattn {
namespace {

constexpr int kLanes = 8;
constexpr int kTileVectors = 2;  // a 6 x 2 register tile: 12 accumulators, 2 operands, 1 broadcast

struct F32 {
  __m256 v;
};
struct I32 {
  __m256i v;
};
struct Mask {
  __m256 m;
};

FASTATTN_INLINE F32 splat(float x) { return {_mm256_set1_ps(x)}; }
FASTATTN_INLINE F32 zero() { return {_mm256_setzero_ps()}; }
FASTATTN_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE F32 fms(F32 a, F32 b, F32 c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
FASTATTN_INLINE F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
FASTATTN_INLINE F32 round(F32 a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// The power is built as a float's exponent field: -127 gives the factor 0, and 128 infinity.
constexpr float kLeastPower = -127;
FASTATTN_INLINE F32 scale_by_power(F32 a, F32 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

FASTATTN_INLINE Mask operator>(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
FASTATTN_INLINE Mask is_nan(F32 a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
FASTATTN_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
FASTATTN_INLINE bool any(Mask a) { return _mm256_movemask_ps(a.m) != 0; }
FASTATTN_INLINE uint32_t bits_of(Mask a) { return uint32_t(_mm256_movemask_ps(a.m)); }
FASTATTN_INLINE Mask mask_of_bits(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(int32_t(bits)), lane);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, lane))};
}
FASTATTN_INLINE F32 select(Mask m, F32 a, F32 b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }

FASTATTN_INLINE Mask nonzero_bytes(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}
FASTATTN_INLINE Mask nonzero_bytes_n(const uint8_t* p, int64_t n) {
  uint8_t bytes[8] = {};
  for (int64_t i = 0; i < n && i < 8; ++i) bytes[i] = p[i];
  return nonzero_bytes(bytes);
}

FASTATTN_INLINE __m256i first_lanes(int64_t n) {
  const __m256i count = _mm256_set1_epi32(n > 8 ? 8 : int32_t(n));
  return _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FASTATTN_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
FASTATTN_INLINE F32 load_n(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
FASTATTN_INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
FASTATTN_INLINE void store_n(float* p, F32 x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x.v); }
FASTATTN_INLINE void stream(float* p, F32 x) { _mm256_stream_ps(p, x.v); }

FASTATTN_INLINE F32 widen(__m128i h, BFloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
FASTATTN_INLINE F32 widen(__m128i h, Half) { return {_mm256_cvtph_ps(h)}; }
FASTATTN_INLINE __m128i narrow(F32 x, BFloat16) {
  const __m256i u = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan(x).m));
  const __m256i half = _mm256_srli_epi32(chosen, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
FASTATTN_INLINE __m128i narrow(F32 x, Half) { return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }

template <class T>
FASTATTN_INLINE F32 load(const T* p) {
  return widen(_mm_loadu_si128((const __m128i*)p), T{});
}
template <class T>
FASTATTN_INLINE F32 load_n(const T* p, int64_t n) {
  if (n >= 8) return load(p);
  alignas(16) T lanes[8] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
FASTATTN_INLINE void store(T* p, F32 x) {
  _mm_storeu_si128((__m128i*)p, narrow(x, T{}));
}
template <class T>
FASTATTN_INLINE void store_n(T* p, F32 x, int64_t n) {
  if (n >= 8) return store(p, x);
  alignas(16) T lanes[8];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
template <class T>
FASTATTN_INLINE void stream(T* p, F32 x) {
  _mm_stream_si128((__m128i*)p, narrow(x, T{}));
}
FASTATTN_INLINE void stream_fence() { _mm_sfence(); }

FASTATTN_INLINE float reduce_add(F32 x) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
FASTATTN_INLINE float reduce_max(F32 x) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

// Adds while it transposes, so that each step has half the registers of the one before.
FASTATTN_INLINE F32 lane_sums(const F32* r) {
  __m256 t[4], u[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) t[i] = _mm256_hadd_ps(r[2 * i].v, r[2 * i + 1].v);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) u[i] = _mm256_hadd_ps(t[2 * i], t[2 * i + 1]);
  return {_mm256_add_ps(_mm256_permute2f128_ps(u[0], u[1], 0x20), _mm256_permute2f128_ps(u[0], u[1], 0x31))};
}

FASTATTN_INLINE I32 splat_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
FASTATTN_INLINE I32 iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
FASTATTN_INLINE I32 load(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
FASTATTN_INLINE void store(int32_t* p, I32 x) { _mm256_storeu_si256((__m256i*)p, x.v); }
FASTATTN_INLINE I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator^(I32 a, I32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
FASTATTN_INLINE I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
FASTATTN_INLINE I32 operator|(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
template <int N>
FASTATTN_INLINE I32 shift_right(I32 a) {
  return {_mm256_srli_epi32(a.v, N)};
}
FASTATTN_INLINE F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
FASTATTN_INLINE I32 bits_of(F32 a) { return {_mm256_castps_si256(a.v)}; }
FASTATTN_INLINE F32 float_of(I32 a) { return {_mm256_castsi256_ps(a.v)}; }
FASTATTN_INLINE Mask below_unsigned(I32 a, I32 b) {
  const __m256i flip = _mm256_set1_epi32(INT32_MIN);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_xor_si256(b.v, flip), _mm256_xor_si256(a.v, flip)))};
}
// The high and low words of the 32 x 32 -> 64 bit products a * m.
FASTATTN_INLINE void multiply_wide(I32 a, uint32_t m, I32* high, I32* low) {
  const __m256i factor = _mm256_set1_epi32(int32_t(m));
  const __m256i even = _mm256_mul_epu32(a.v, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor);
  low->v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high->v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

// r[i] lane j <-> r[j] lane i.
FASTATTN_INLINE void transpose(F32* r) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      u[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0x44);
      u[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

// Bit i: (p[i] & mask) != x, for 64 unsigned integers.
FASTATTN_INLINE uint64_t differing_64(const uint8_t* p, uint8_t x, uint8_t mask) {
  const __m256i pattern = _mm256_set1_epi8(char(x)), kept = _mm256_set1_epi8(char(mask));
  uint64_t equal = 0;
#pragma GCC unroll 2
  for (int n = 0; n < 2; ++n) {
    const __m256i v = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(p + 32 * n)), kept);
    equal |= uint64_t(uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, pattern)))) << 32 * n;
  }
  return ~equal;
}
FASTATTN_INLINE uint64_t differing_64(const uint16_t* p, uint16_t x, uint16_t mask) {
  const __m256i pattern = _mm256_set1_epi16(short(x)), kept = _mm256_set1_epi16(short(mask));
  uint64_t equal = 0;
#pragma GCC unroll 2
  for (int n = 0; n < 2; ++n) {
    const __m256i a = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(p + 32 * n)), kept);
    const __m256i b = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(p + 32 * n + 16)), kept);
    const __m256i both = _mm256_packs_epi16(_mm256_cmpeq_epi16(a, pattern), _mm256_cmpeq_epi16(b, pattern));
    const __m256i ordered = _mm256_permute4x64_epi64(both, 0xd8);  // packs works within halves
    equal |= uint64_t(uint32_t(_mm256_movemask_epi8(ordered))) << 32 * n;
  }
  return ~equal;
}
FASTATTN_INLINE uint64_t differing_64(const uint32_t* p, uint32_t x, uint32_t mask) {
  const __m256i pattern = _mm256_set1_epi32(int(x)), kept = _mm256_set1_epi32(int(mask));
  uint64_t equal = 0;
#pragma GCC unroll 8
  for (int n = 0; n < 8; ++n) {
    const __m256i v = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(p + 8 * n)), kept);
    const __m256 same = _mm256_castsi256_ps(_mm256_cmpeq_epi32(v, pattern));
    equal |= uint64_t(uint32_t(_mm256_movemask_ps(same))) << 8 * n;
  }
  return ~equal;
}

}  // namespace
}  // namespace fastattn
