// What the checks of selftest.cpp share: their count, random numbers, storage types, scratch.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

#include "../../csrc/cpu/simd/types.h"

namespace {

using namespace fastattn;

int failures = 0, checks = 0;

void check(bool right, const std::string& what) {
  ++checks;
  if (right) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// xorshift64*
class Random {
 public:
  uint64_t bits() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1dull;
  }
  double uniform() { return double(bits() >> 11) * 0x1p-53; }
  double signed_unit() { return 2 * uniform() - 1; }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }

 private:
  uint64_t state_ = 0x9e3779b97f4a7c15ull;
} rng;

template <class T>
T narrow(double x) {
  T out;
  from_float(float(x), &out);
  return out;
}
template <class T>
constexpr Storage kStorage = Storage::kFloat;
template <>
constexpr Storage kStorage<BFloat16> = Storage::kBFloat16;
template <>
constexpr Storage kStorage<Half> = Storage::kHalf;

// Of the largest magnitude; several roundings of the storage type, or of fp32 sums.
template <class T>
constexpr double kTolerance = 2e-5;
template <>
constexpr double kTolerance<BFloat16> = 2e-2;
template <>
constexpr double kTolerance<Half> = 3e-3;

const float kNan = std::numeric_limits<float>::quiet_NaN();

struct Scratch {
  explicit Scratch(int64_t bytes) : size((bytes + 4095) / 4096 * 4096) {
    data = std::aligned_alloc(4096, size_t(size > 0 ? size : 4096));
    std::memset(data, 0xff, size_t(size));  // NaN: what a kernel reads before writing shows
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
  void* data;
  int64_t size;
};

}  // namespace
