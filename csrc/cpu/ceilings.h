// What one core can do at most with this instruction set: loops that only multiply and add, or only move
// memory. A benchmark prints its share of these, measured in the same run, beside its ratio to a rival: a
// ratio says who is faster, a share says how much is left.
//
// Include after one of the headers of simd/. The data must be random numbers: multipliers draw less power on
// zeros and constants, and clock higher than any real input lets them.
#pragma once

#include "ceiling_kinds.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#endif

namespace fastattn {
namespace {

// AVX2 has 16 registers; the others can keep more chains in flight than their multiply-add latency needs.
constexpr int kCeilingChains = kLanes == 8 ? 10 : 16;

inline double fma_ceiling(int64_t rounds, const float* data, float* sink) {
  F32 chain[kCeilingChains];
#pragma GCC unroll 16
  for (int i = 0; i < kCeilingChains; ++i) chain[i] = load(data + 64 + i * kLanes);
  // |factor| < 1 keeps the chains finite; two pairs keep them from settling at a fixed point.
  const F32 factor0 = load(data), term0 = load(data + 16), factor1 = load(data + 32), term1 = load(data + 48);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kCeilingChains; ++i) chain[i] = fma(chain[i], factor0, term0);
#pragma GCC unroll 16
    for (int i = 0; i < kCeilingChains; ++i) chain[i] = fma(chain[i], factor1, term1);
  }
  F32 sum = zero();
#pragma GCC unroll 16
  for (int i = 0; i < kCeilingChains; ++i) sum = sum + chain[i];
  store(sink, sum);
  return 2. * 2. * double(rounds) * kCeilingChains * kLanes;
}

#ifdef FASTATTN_HAS_DOT2
inline double dot_ceiling(int64_t rounds, const int32_t* data, float* sink) {
  F32 chain[kCeilingChains];
#pragma GCC unroll 16
  for (int i = 0; i < kCeilingChains; ++i) chain[i] = load((const float*)data + 64 + i * kLanes);
  const I32 a = load(data), b = load(data + 16), minus_b = b ^ splat_int(int32_t(0x80008000));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kCeilingChains; ++i) chain[i] = dot2(a, b, chain[i]);
#pragma GCC unroll 16
    for (int i = 0; i < kCeilingChains; ++i) chain[i] = dot2(a, minus_b, chain[i]);
  }
  F32 sum = zero();
#pragma GCC unroll 16
  for (int i = 0; i < kCeilingChains; ++i) sum = sum + chain[i];
  store(sink, sum);
  return 2. * 4. * double(rounds) * kCeilingChains * kLanes;
}
#endif

#ifdef __AMX_BF16__
struct CeilingTiles {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Two by two output tiles, four tile loads to four products: the densest use that eight tiles allow.
inline double tile_ceiling(int64_t rounds, const char* data, float* sink) {
  alignas(64) CeilingTiles shape = {};
  shape.palette = 1;
  for (int t = 0; t < 8; ++t) {
    shape.row_bytes[t] = 64;
    shape.rows[t] = 16;
  }
  // GCC 12 does not see that the load below reads the structure, and may drop the stores above.
  asm volatile("" ::"r"(&shape) : "memory");
  _tile_loadconfig(&shape);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t r = 0; r < rounds; ++r) {
    const char* tiles = data + (r & 3) * 4096;
    _tile_loadd(4, tiles, 64);
    _tile_loadd(6, tiles + 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, tiles + 2048, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, tiles + 3072, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sink, 64);
  _tile_release();
  return 4. * (2. * 16 * 16 * 32) * double(rounds);
}
#endif

inline double read_ceiling(int64_t rounds, const char* source, float* sink, int64_t bytes) {
  constexpr int kWords = 8;
  I32 sum[kWords];
#pragma GCC unroll 8
  for (int i = 0; i < kWords; ++i) sum[i] = splat_int(0);
  const int64_t words = bytes / kCeilingBlock * kCeilingBlock / 4;
  const int32_t* data = (const int32_t*)source;
  for (int64_t r = 0; r < rounds; ++r) {
    for (int64_t n = 0; n < words; n += kWords * kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < kWords; ++i) sum[i] = sum[i] ^ load(data + n + i * kLanes);
    }
    asm volatile("" ::: "memory");
  }
#pragma GCC unroll 8
  for (int i = 0; i < kWords; ++i) store((int32_t*)sink + i * kLanes, sum[i]);
  return double(rounds) * double(words) * 4;
}

template <bool kStream>
double copy_ceiling(int64_t rounds, const char* source, char* destination, int64_t bytes) {
  constexpr int kWords = 4;
  const int64_t words = bytes / kCeilingBlock * kCeilingBlock / 4;
  const float* from = (const float*)source;
  float* to = (float*)destination;
  for (int64_t r = 0; r < rounds; ++r) {
    for (int64_t n = 0; n < words; n += kWords * kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kWords; ++i) {
        const F32 x = load(from + n + i * kLanes);
        if constexpr (kStream) {
          stream(to + n + i * kLanes, x);
        } else {
          store(to + n + i * kLanes, x);
        }
      }
    }
    if constexpr (kStream) stream_fence();
    asm volatile("" ::: "memory");
  }
  return 2. * double(rounds) * double(words) * 4;
}

// A CeilingLoop.
double run_ceiling(int kind, int64_t rounds, const void* source, void* destination, int64_t bytes) {
  switch (Ceiling(kind)) {
    case Ceiling::kFmaF32: return fma_ceiling(rounds, (const float*)source, (float*)destination);
    case Ceiling::kDotBf16:
#ifdef FASTATTN_HAS_DOT2
      return dot_ceiling(rounds, (const int32_t*)source, (float*)destination);
#else
      return 0;
#endif
    case Ceiling::kTileBf16:
#ifdef __AMX_BF16__
      return tile_ceiling(rounds, (const char*)source, (float*)destination);
#else
      return 0;
#endif
    case Ceiling::kRead: return read_ceiling(rounds, (const char*)source, (float*)destination, bytes);
    case Ceiling::kCopy: return copy_ceiling<false>(rounds, (const char*)source, (char*)destination, bytes);
    case Ceiling::kCopyStream:
      return copy_ceiling<true>(rounds, (const char*)source, (char*)destination, bytes);
  }
  return 0;
}

}  // namespace
}  // namespace fastattn
