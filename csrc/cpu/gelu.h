// GELU and its derivative, by erf and by tanh.
#pragma once

#include "simd.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

constexpr float kDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)
constexpr float kTanhScale = 0.7978845608028654f;
constexpr float kTanhCube = 0.044715f;

// The standard normal distribution function, 0.5 + 0.5 erf(x / sqrt(2)). erf(x / sqrt(2)) / x is a quotient of polynomials
// of degree 5 in x^2 on [-5.5, 5.5], 1.7e-8 off. No coefficient is negative, so that nothing cancels: erf is within 2 units
// in its last place. Beyond, it is 1 or -1.
WARPFORM_INLINE Vec normal_cdf(Vec x) {
  const Vec square = x * x;
  Vec p = broadcast(2.293114062e-08f);
  p = p * square + 6.301588131e-06f;
  p = p * square + 1.645737301e-04f;
  p = p * square + 4.651482000e-03f;
  p = p * square + 3.345889215e-02f;
  p = p * square + 3.989422738e-01f;
  Vec q = broadcast(1.199027697e-06f);
  q = q * square + 7.216701647e-05f;
  q = q * square + 1.860645883e-03f;
  q = q * square + 2.841612967e-02f;
  q = q * square + 2.505354065e-01f;
  q = q * square + 1.0f;
  const Vec half_erf = x * p / q;
  const Vec limit = as_float((as_int(x) & INT32_MIN) | as_int(broadcast(0.5f)));
  // Just inside, rounding may give less than 0.
  return max(Vec{}, 0.5f + (abs(x) > 5.5f ? limit : half_erf));
}

// exp(-x^2 / 2)
WARPFORM_INLINE Vec bell(Vec x) { return exp2(x * x * (-0.5f * kLog2e)); }

// -2 u of the tanh form in powers of 2, where u = sqrt(2 / pi) (x + 0.044715 x^3).
WARPFORM_INLINE Vec tanh_exponent(Vec x) { return x * (kTanhScale + kTanhScale * kTanhCube * x * x) * (-2.f * kLog2e); }

template <bool kTanh>
WARPFORM_INLINE Vec gelu(Vec x) {
  if constexpr (kTanh) {
    const Vec exponent = tanh_exponent(x);
    const Vec sigmoid = 1.f / (1.f + exp2(min(broadcast(127.f), exponent)));
    return x * (exponent > 127.f ? Vec{} : sigmoid);
  }
  return x * normal_cdf(x);
}

template <bool kTanh>
WARPFORM_INLINE Vec gelu_slope(Vec x) {
  if constexpr (kTanh) {
    // From -10 and 10 on the slope is 0 and 1 to float32; x^2 would overflow.
    x = max(broadcast(-10.f), min(broadcast(10.f), x));
    const Vec power = exp2(min(broadcast(127.f), tanh_exponent(x))), sigmoid = 1.f / (1.f + power);
    const Vec du = kTanhScale + 3.f * kTanhScale * kTanhCube * x * x;
    // power * sigmoid is 1 - sigmoid without its cancellation.
    return sigmoid + x * 2.f * sigmoid * (power * sigmoid) * du;
  }
  return normal_cdf(x) + x * bell(x) * kDensity;
}

}  // namespace
}  // namespace warpform::cpu::WARPFORM_CPU_ISA
