// AVX-512 (F, BW, VL, DQ): 16 fp32 lanes, 32 registers. The interface is the one described in scalar.h.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace fastattn {
namespace {

constexpr int kLanes = 16;
constexpr int kTileVectors = 4;  // a 6 x 4 register tile: 24 accumulators, 4 operands, 1 broadcast

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct Mask {
  __mmask16 m;
};

FASTATTN_INLINE F32 splat(float x) { return {_mm512_set1_ps(x)}; }
FASTATTN_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
FASTATTN_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE F32 fms(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
FASTATTN_INLINE F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
FASTATTN_INLINE F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, 8)}; }
#define FASTATTN_HAS_FRACTION 1
// x - floor(x), and a * 2^floor(x): an instruction each.
FASTATTN_INLINE F32 fraction(F32 x) { return {_mm512_reduce_ps(x.v, 9)}; }
FASTATTN_INLINE F32 scale_by_floor(F32 a, F32 x) { return {_mm512_scalef_ps(a.v, x.v)}; }

FASTATTN_INLINE Mask operator>(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
FASTATTN_INLINE Mask is_nan(F32 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
FASTATTN_INLINE Mask operator|(Mask a, Mask b) { return {__mmask16(a.m | b.m)}; }
FASTATTN_INLINE bool any(Mask a) { return a.m != 0; }
FASTATTN_INLINE uint32_t bits_of(Mask a) { return a.m; }
FASTATTN_INLINE Mask mask_of_bits(uint32_t bits) { return {__mmask16(bits)}; }
FASTATTN_INLINE F32 select(Mask m, F32 a, F32 b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }

FASTATTN_INLINE __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : __mmask16((1u << n) - 1); }

FASTATTN_INLINE Mask nonzero_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {_mm_test_epi8_mask(bytes, bytes)};
}
FASTATTN_INLINE Mask nonzero_bytes_n(const uint8_t* p, int64_t n) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(n), p);
  return {_mm_test_epi8_mask(bytes, bytes)};
}

FASTATTN_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTATTN_INLINE F32 load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
FASTATTN_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
FASTATTN_INLINE void store_n(float* p, F32 x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
FASTATTN_INLINE void stream(float* p, F32 x) { _mm512_stream_ps(p, x.v); }

FASTATTN_INLINE F32 widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
FASTATTN_INLINE F32 load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
FASTATTN_INLINE F32 load_n(const BFloat16* p, int64_t n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
FASTATTN_INLINE __m256i narrow_bf16(F32 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i u = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan(x).m, rounded, quiet), 16));
#endif
}
FASTATTN_INLINE void store(BFloat16* p, F32 x) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(x)); }
FASTATTN_INLINE void store_n(BFloat16* p, F32 x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(x));
}
FASTATTN_INLINE void stream(BFloat16* p, F32 x) { _mm256_stream_si256((__m256i*)p, narrow_bf16(x)); }

FASTATTN_INLINE F32 load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
FASTATTN_INLINE F32 load_n(const Half* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
FASTATTN_INLINE void store(Half* p, F32 x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
FASTATTN_INLINE void store_n(Half* p, F32 x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
FASTATTN_INLINE void stream(Half* p, F32 x) {
  _mm256_stream_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
FASTATTN_INLINE void stream_fence() { _mm_sfence(); }

// A fixed tree, written out: the compiler's reduce intrinsics may change their order.
FASTATTN_INLINE float reduce_add(F32 x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
FASTATTN_INLINE float reduce_max(F32 x) { return _mm512_reduce_max_ps(x.v); }

// Adds while it transposes, so that each step has half the registers of the one before.
FASTATTN_INLINE F32 lane_sums(const F32* r) {
  __m512 t[8], u[4], w[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = r[2 * i].v, b = r[2 * i + 1].v;
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = u[2 * i], b = u[2 * i + 1];
    w[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  return {_mm512_add_ps(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd))};
}

FASTATTN_INLINE I32 splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
FASTATTN_INLINE I32 iota() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
FASTATTN_INLINE I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
FASTATTN_INLINE void store(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }
FASTATTN_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator^(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
FASTATTN_INLINE I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
FASTATTN_INLINE I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
// Bits that any lane has.
FASTATTN_INLINE uint32_t any_of(I32 a) { return uint32_t(_mm512_reduce_or_epi32(a.v)); }
#define FASTATTN_HAS_BIT_TRANSPOSE 1
// Bit r of columns[j] is bit j of rows[r], for 32 rows of 64 bits.
inline void transpose_bits_32(const uint64_t* rows, uint32_t* columns) {
  __m512i bytes[4];  // bits of 8 rows a column
  for (int g = 0; g < 4; ++g) {
    bytes[g] = _mm512_setzero_si512();
    for (int r = 0; r < 8; ++r) {
      bytes[g] = _mm512_mask_add_epi8(bytes[g], rows[8 * g + r], bytes[g], _mm512_set1_epi8(char(1 << r)));
    }
  }
  const __m512i l0 = _mm512_unpacklo_epi8(bytes[0], bytes[1]), h0 = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
  const __m512i l1 = _mm512_unpacklo_epi8(bytes[2], bytes[3]), h1 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
  // Within each 128 bits the columns are in order, 4 of them a vector.
  const __m512i q[4] = {_mm512_unpacklo_epi16(l0, l1), _mm512_unpackhi_epi16(l0, l1),
                        _mm512_unpacklo_epi16(h0, h1), _mm512_unpackhi_epi16(h0, h1)};
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128((__m128i*)(columns + 4 * i), _mm512_extracti32x4_epi32(q[i], 0));
    _mm_storeu_si128((__m128i*)(columns + 16 + 4 * i), _mm512_extracti32x4_epi32(q[i], 1));
    _mm_storeu_si128((__m128i*)(columns + 32 + 4 * i), _mm512_extracti32x4_epi32(q[i], 2));
    _mm_storeu_si128((__m128i*)(columns + 48 + 4 * i), _mm512_extracti32x4_epi32(q[i], 3));
  }
}
FASTATTN_INLINE I32 or3(I32 a, I32 b, I32 c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0xfe)}; }
FASTATTN_INLINE bool any_bits(I32 a, int32_t of) {
  return _mm512_test_epi32_mask(a.v, _mm512_set1_epi32(of)) != 0;
}
template <int N>
FASTATTN_INLINE I32 shift_right(I32 a) {
  return {_mm512_srli_epi32(a.v, N)};
}
FASTATTN_INLINE F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
FASTATTN_INLINE I32 bits_of(F32 a) { return {_mm512_castps_si512(a.v)}; }
FASTATTN_INLINE F32 float_of(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
FASTATTN_INLINE Mask below_unsigned(I32 a, I32 b) { return {_mm512_cmplt_epu32_mask(a.v, b.v)}; }
// A word in the low half of 64 bits; the high half may hold anything.
#define FASTATTN_HAS_LOW_WORDS 1
struct LowWords {
  __m512i v;
};
FASTATTN_INLINE LowWords even_words(I32 a) { return {a.v}; }
FASTATTN_INLINE LowWords odd_words(I32 a) { return {_mm512_srli_epi64(a.v, 32)}; }
FASTATTN_INLINE I32 join_words(LowWords even, LowWords odd) {
  return {_mm512_mask_blend_epi32(0xaaaa, even.v, _mm512_slli_epi64(odd.v, 32))};
}
// The 64 bits of the product of the words, and their upper word. (A shuffle and not a shift: shifts have the
// port that products need.)
FASTATTN_INLINE LowWords multiply(LowWords a, LowWords b) { return {_mm512_mul_epu32(a.v, b.v)}; }
FASTATTN_INLINE LowWords high_word(LowWords a) { return {_mm512_shuffle_epi32(a.v, _MM_PERM_DDBB)}; }
FASTATTN_INLINE LowWords xor3(LowWords a, LowWords b, LowWords c) {
  return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x96)};
}

// r[i] lane j <-> r[j] lane i.
FASTATTN_INLINE void transpose(F32* r) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  __m512 u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + 2 + j]);
      u[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#ifdef __AVX512BF16__
#define FASTATTN_HAS_DOT2 1
// acc + a.lo * b.lo + a.hi * b.hi, a and b pairs of bf16 in 32-bit lanes.
FASTATTN_INLINE F32 dot2(I32 a, I32 b, F32 acc) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}
// Lane i: (low[i] as bf16, high[i] as bf16), low in the lower half.
FASTATTN_INLINE I32 pack_pairs(F32 low, F32 high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v))};
}
// The same, but ties go away from zero and NaN may become any number: three instructions that Intel cores run
// on the port which their matrix unit leaves free.
FASTATTN_INLINE I32 pack_pairs_loosely(F32 low, F32 high) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i l = _mm512_add_epi32(_mm512_castps_si512(low.v), half);
  const __m512i h = _mm512_add_epi32(_mm512_castps_si512(high.v), half);
  const __m512i upper_down = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  return {_mm512_mask_shuffle_epi8(h, 0x3333333333333333, l, upper_down)};
}
// The upper halves of `high` and the lower ones of `low`, whose upper are 0.
FASTATTN_INLINE I32 merge_halves(I32 high, I32 low) {
  return {_mm512_ternarylogic_epi32(high.v, _mm512_set1_epi32(int32_t(0xffff0000)), low.v, 0xea)};
}
FASTATTN_INLINE F32 low_of_pairs(I32 x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(x.v, 16))}; }
FASTATTN_INLINE F32 high_of_pairs(I32 x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(x.v, _mm512_set1_epi32(int32_t(0xffff0000))))};
}
// 16 elements of two rows -> 16 pairs (low[i], high[i]).
FASTATTN_INLINE I32 interleave(const BFloat16* low, const BFloat16* high) {
  const __m512i l = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
  const __m512i h = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
  return {_mm512_or_si512(l, _mm512_slli_epi32(h, 16))};
}
// 32 elements of two rows -> pairs (low[i], high[i]) of the first 16 and of the last.
FASTATTN_INLINE void interleave(const BFloat16* low, const BFloat16* high, I32* first, I32* last) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i l = _mm512_loadu_si512(low), h = _mm512_loadu_si512(high);
  first->v = _mm512_permutex2var_epi16(l, order, h);
  last->v = _mm512_permutex2var_epi16(l, _mm512_add_epi16(order, _mm512_set1_epi16(16)), h);
}
#endif

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
// 2^x for x in [-127, 1), two vectors to pairs of bf16, almost all of it by integers: beside tile
// instructions those run on both vector ports of Intel cores, fp32 on one.
//
// x becomes a fixed-point number of 16 bits, 7 before the point: the sum with 2^23 leaves it in the lower
// half of the bits, and the upper half tells whether x was in range. Read as a logarithm it is nearly the
// bf16 it shall be (Schraudolph 1999); what 1 + f is over 2^f comes from a table by 6 bits of the fraction f.
// Relative error 6.3e-3 at most, rms 2.0e-3 with a mean of 0.7e-3, where the rounding to bf16 alone
// has 3.9e-3 and 1.7e-3. Exact for whole x; 0 from -127 down.
class FixedExp2 {
 public:
  static constexpr float kOne = 512;
  static constexpr float kOffset = (1 << 23) + 127 * kOne + 2;  // and half of what is cut off last

  // Constants, kept in registers: the compiler would rather make them again for every few vectors.
  FixedExp2()
      : excess_(_mm512_load_si512(kExcess)),
        tag_(_mm512_set1_epi32(kTag)),
        up_(_mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100)),
        index_(_mm512_set1_epi64(0x3b332b231b130b03)),
        ones_(_mm512_set1_epi32(0x3f803f80)),
        upper_(0xcccccccccccccccc),
        even_(0x5555555555555555) {
    __asm__("" : "+v"(excess_), "+v"(tag_), "+v"(up_), "+v"(index_), "+v"(ones_), "+k"(upper_), "+k"(even_));
  }

  // x * scale + offset, where the caller has multiplied both by kOne and added kOffset.
  FASTATTN_INLINE I32 fixed(F32 x, F32 scale, F32 offset) const {
    return {_mm512_max_epu32(bits(x, scale, offset), tag_)};
  }
  // The same, and least where a lane is not in the mask.
  FASTATTN_INLINE I32 fixed(F32 x, F32 scale, F32 offset, Mask m) const {
    return {_mm512_mask_max_epu32(tag_, m.m, bits(x, scale, offset), tag_)};
  }
  // Of numbers from `fixed`, or-ed: lanes in which one was past the range or NaN, and whether there are any.
  FASTATTN_INLINE Mask out_of_range(I32 bits) const {
    return {_mm512_test_epi32_mask(_mm512_xor_si512(bits.v, tag_), _mm512_set1_epi32(int32_t(0xffff0000)))};
  }
  FASTATTN_INLINE bool exceeded(I32 bits) const { return any(out_of_range(bits)); }

  FASTATTN_INLINE I32 pairs(I32 low, I32 high) const {
    const __m512i x = _mm512_mask_shuffle_epi8(low.v, upper_, high.v, up_);
    const __m512i at = _mm512_multishift_epi64_epi8(index_, x);
    const __m512i excess = _mm512_maskz_permutexvar_epi8(even_, at, excess_);
    return {_mm512_srli_epi16(_mm512_sub_epi16(x, excess), 2)};
  }
  // The sum of both halves added.
  FASTATTN_INLINE F32 add_pairs(I32 pairs, F32 sum) const {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)pairs.v, (__m512bh)ones_)};
  }

 private:
  static constexpr int32_t kTag = 0x4b000000;  // the bits of 2^23
  // 512 (1 + f - 2^f), f in the middle of each 64th, less the 2 of kOffset.
  alignas(64) static constexpr uint8_t kExcess[64] = {
      0,  3,  5,  8,  10, 12, 14, 16, 18, 20, 22, 24, 25, 27, 28, 30, 31, 33, 34, 35, 36, 37,
      38, 39, 40, 41, 42, 42, 43, 43, 43, 44, 44, 44, 44, 44, 44, 44, 43, 43, 42, 42, 41, 40,
      39, 38, 37, 36, 35, 33, 32, 30, 28, 27, 25, 23, 21, 18, 16, 14, 11, 8,  5,  2};

  static FASTATTN_INLINE __m512i bits(F32 x, F32 scale, F32 offset) {
    return _mm512_castps_si512(_mm512_fmadd_ps(x.v, scale.v, offset.v));
  }

  __m512i excess_, tag_, up_, index_, ones_;
  __mmask64 upper_, even_;
};
#endif

// Bit i: (p[i] & mask) != x, for 64 unsigned integers.
FASTATTN_INLINE uint64_t differing_64(const uint8_t* p, uint8_t x, uint8_t mask) {
  const __m512i v = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(mask)));
  return _mm512_cmpneq_epi8_mask(v, _mm512_set1_epi8(char(x)));
}
FASTATTN_INLINE uint64_t differing_64(const uint16_t* p, uint16_t x, uint16_t mask) {
  const __m512i pattern = _mm512_set1_epi16(short(x)), kept = _mm512_set1_epi16(short(mask));
  const __m512i low = _mm512_and_si512(_mm512_loadu_si512(p), kept);
  const __m512i high = _mm512_and_si512(_mm512_loadu_si512(p + 32), kept);
  return _mm512_cmpneq_epi16_mask(low, pattern) | uint64_t(_mm512_cmpneq_epi16_mask(high, pattern)) << 32;
}
FASTATTN_INLINE uint64_t differing_64(const uint32_t* p, uint32_t x, uint32_t mask) {
  const __m512i pattern = _mm512_set1_epi32(int(x)), kept = _mm512_set1_epi32(int(mask));
  uint64_t bits = 0;
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    const __m512i v = _mm512_and_si512(_mm512_loadu_si512(p + 16 * n), kept);
    bits |= uint64_t(_mm512_cmpneq_epi32_mask(v, pattern)) << 16 * n;
  }
  return bits;
}

}  // namespace
}  // namespace fastattn
