// Twin of csrc/cuda/ptx/convert.h.
#pragma once

#include "../../../csrc/cuda/types.h"
#include "../cuda_types.h"

namespace fastattn::cuda {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) { return float(std::bit_cast<_Float16>(x.bits)); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  return {std::bit_cast<uint16_t>(_Float16(x))};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float reciprocal_approx(float x) { return 1.0f / x; }

inline int opaque(int x) { return x; }

}  // namespace fastattn::cuda
