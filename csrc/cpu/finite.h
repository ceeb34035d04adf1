// Which of up to 64 rows as they are stored hold a number that is not finite.
#pragma once

namespace fastattn {
namespace {

// The exponent's bits of a stored number: all of them, where it is not finite.
inline uint32_t exponent_bits(const float*) { return 0x7f800000; }
inline uint16_t exponent_bits(const BFloat16*) { return 0x7f80; }
inline uint16_t exponent_bits(const Half*) { return 0x7c00; }

template <class T>
bool all_finite(const T* x, int64_t stride, int rows, int64_t width) {
  const auto bits = exponent_bits(x);
  uint64_t finite = ~0ull;
  F32 check = zero();
  for (int r = 0; r < rows; ++r, x += stride) {
    int64_t d = 0;
    for (; d + 64 <= width; d += 64) finite &= differing_64((decltype(&bits))(x + d), bits, bits);
    for (; d < width; d += kLanes) check = fma(load_n(x + d, width - d), zero(), check);
  }
  return finite == ~0ull && !any(is_nan(check));
}

// Which of `rows` rows hold a number that is not finite.
template <class T>
uint64_t rows_not_finite(const T* x, int64_t stride, int rows, int64_t width) {
  if (all_finite(x, stride, rows, width)) return 0;
  uint64_t bad = 0;
  for (int r = 0; r < rows; ++r) bad |= uint64_t(!all_finite(x + r * stride, stride, 1, width)) << r;
  return bad;
}

}  // namespace
}  // namespace fastattn
