// Elementary functions on vectors. Polynomials are minimax in relative error on the reduced range.
#pragma once

namespace fastattn {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLn2Low = float(0.693147180559945309 - double(kLn2));

// 2^x; exactly 0 for x <= -160, so also for -inf; exactly 1 for 0; inf from 128 on; NaN stays NaN.
// DEGREE 3: 1.0e-4, 4: 3.4e-6, 5: 1.1e-7 relative error before rounding.
template <int DEGREE>
FASTATTN_INLINE F32 exp2(F32 x) {
  static_assert(DEGREE >= 3 && DEGREE <= 5, "no polynomial of that degree");
#ifdef FASTATTN_HAS_FRACTION
  // 2^x = 2^floor(x) * 2^r. The polynomials are exact at both ends of [0, 1], so that it is continuous.
  const F32 r = fraction(x);
  F32 p;
  if constexpr (DEGREE == 3) {
    p = fma(splat(7.826736569e-02f), r, splat(2.263087928e-01f));
    p = fma(p, r, splat(6.954238415e-01f));
  } else if constexpr (DEGREE == 4) {
    p = fma(splat(1.355576422e-02f), r, splat(5.203234777e-02f));
    p = fma(p, r, splat(2.413797677e-01f));
    p = fma(p, r, splat(6.930321455e-01f));
  } else {
    p = fma(splat(1.879682066e-03f), r, splat(8.990081958e-03f));
    p = fma(p, r, splat(5.581947044e-02f));
    p = fma(p, r, splat(2.401589900e-01f));
    p = fma(p, r, splat(6.931517720e-01f));
  }
  return scale_by_floor(fma(p, r, splat(1.f)), x);
#else
  x = min(splat(128.f), max(splat(kLeastPower), x));
  const F32 n = round(x), r = x - n;
  F32 p;
  if constexpr (DEGREE == 3) {
    p = fma(splat(5.500892177e-02f), r, splat(2.422109842e-01f));
    p = fma(p, r, splat(6.932829022e-01f));
  } else if constexpr (DEGREE == 4) {
    p = fma(splat(9.582852945e-03f), r, splat(5.590642989e-02f));
    p = fma(p, r, splat(2.402409911e-01f));
    p = fma(p, r, splat(6.931241751e-01f));
  } else {
    p = fma(splat(1.326472615e-03f), r, splat(9.671512991e-03f));
    p = fma(p, r, splat(5.550733581e-02f));
    p = fma(p, r, splat(2.402224243e-01f));
    p = fma(p, r, splat(6.931470037e-01f));
  }
  return scale_by_power(fma(p, r, splat(1.f)), n);
#endif
}

// log2(x) as a whole number and what is left, at most 1/2, for normal x > 0, to 2.7e-8 of it before rounding.
// 0 gives -inf and 0, NaN stays NaN.
struct Log2 {
  F32 whole, rest;
};
FASTATTN_INLINE Log2 log2(F32 x) {
  // x = 2^n * f with f in [sqrt(1/2), sqrt(2)): the offset moves the exponent's carry to sqrt(1/2).
  const I32 u = bits_of(x) - splat_int(0x3f3504f3);
  const I32 exponent = shift_right<23>(u + splat_int(0x40000000)) - splat_int(128);
  const F32 f = float_of((u & splat_int(0x007fffff)) + splat_int(0x3f3504f3));
  const F32 t = f - splat(1.f);
  F32 p = fma(splat(1.258369684e-01f), t, splat(-2.072697729e-01f));
  p = fma(p, t, splat(2.157156318e-01f));
  p = fma(p, t, splat(-2.389448285e-01f));
  p = fma(p, t, splat(2.879162431e-01f));
  p = fma(p, t, splat(-3.607036769e-01f));
  p = fma(p, t, splat(4.809106290e-01f));
  p = fma(p, t, splat(-7.213473320e-01f));
  p = fma(p, t, splat(1.442695022e+00f));
  const Mask normal = x > zero();
  return {select(normal, to_float(exponent), select(is_nan(x), x, splat(-__builtin_inff()))),
          select(normal, p * t, zero())};
}

// x + y = sum + rest exactly (Knuth's two-sum), where they are finite.
FASTATTN_INLINE F32 two_sum(F32 x, F32 y, F32* rest) {
  const F32 sum = x + y, of_y = sum - x, of_x = sum - of_y;
  *rest = (x - of_x) + (y - of_y);
  return sum;
}

FASTATTN_INLINE F32 finite_or_0(F32 x) { return select(is_nan(x - x), zero(), x); }

// tanh(x): a polynomial near 0, where 1 - 2 / (1 + e^2x) would cancel.
FASTATTN_INLINE F32 tanh(F32 x) {
  const F32 a = abs(x), z = x * x;
  // x - x^3/3 + ... to x^11 on |x| < 0.4; the remainder is below 2e-7 relative.
  F32 p = fma(splat(-8.863235530e-03f), z, splat(2.186948854e-02f));
  p = fma(p, z, splat(-5.396825397e-02f));
  p = fma(p, z, splat(1.333333333e-01f));
  p = fma(p, z, splat(-3.333333333e-01f));
  const F32 near_zero = fma(p * z, x, x);
  const F32 e = exp2<5>(min(splat(126.f), a * splat(2.f * kLog2E)));
  const F32 magnitude = splat(1.f) - splat(2.f) / (e + splat(1.f));
  const F32 far = select(zero() > x, zero() - magnitude, magnitude);
  return select(splat(0.4f) > a, near_zero, far);
}

// gelu(x) = x * P(normal <= x), to 7e-7 of itself from x = -3 up, 8e-6 below; NaN for -inf, as torch has it.
//
// The tail Q(a) = P(normal > a) is e^(-a^2 / 2) by a polynomial in t = 1 / (1 + 0.35 a), of relative error
// 7e-8 for all a >= 0: x (1 + erf) / 2 would cancel for negative x.
FASTATTN_INLINE F32 gelu(F32 x) {
  const F32 a = abs(x), t = splat(1.f) / fma(splat(0.35f), a, splat(1.f));
  F32 p = fma(splat(-2.916364744e-02f), t, splat(1.440595388e-01f));
  p = fma(p, t, splat(-2.558994293e-01f));
  p = fma(p, t, splat(1.593903601e-01f));
  p = fma(p, t, splat(-2.326222695e-02f));
  p = fma(p, t, splat(1.055741832e-01f));
  p = fma(p, t, splat(1.198156402e-01f));
  p = fma(p, t, splat(1.398643255e-01f));
  p = fma(p, t, splat(1.396212578e-01f));
  const F32 tail = p * t * exp2<5>(a * a * splat(-0.5f * kLog2E));
  return x * select(x > zero(), splat(1.f) - tail, tail);
}

}  // namespace
}  // namespace fastattn
