// GELU and its derivative, by erf and by tanh.
#pragma once

#include "simd.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

constexpr float kDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)
constexpr float kTanhScale = 0.7978845608028654f;
constexpr float kTanhCube = 0.044715f;

// The standard normal distribution function within 2.6e-7, and exp(-x^2 / 2). Its tail is t Q(t) exp(-x^2 / 2) with t = 1 /
// (1 + 0.26 |x|), Q a polynomial of degree 8 (2.0e-8 off).
WARPFORM_INLINE Vec normal_cdf(Vec x, Vec& density) {
  const Vec t = 1.f / (abs(x) * 0.26f + 1.f);
  density = exp2(x * x * -0.72134752044448170f);
  Vec q = broadcast(3.089608396e-02f);
  q = q * t - 1.547401928e-01f;
  q = q * t + 2.554665831e-01f;
  q = q * t - 1.555358786e-01f;
  q = q * t + 1.641524469e-01f;
  q = q * t + 4.964248256e-02f;
  q = q * t + 1.033913416e-01f;
  q = q * t + 1.029649322e-01f;
  q = q * t + 1.037621909e-01f;
  const Vec tail = q * t * density;
  return x >= 0.f ? 1.f - tail : tail;
}

// -2 u of the tanh form in powers of 2, where u = sqrt(2 / pi) (x + 0.044715 x^3).
WARPFORM_INLINE Vec tanh_exponent(Vec x) { return x * (kTanhScale + kTanhScale * kTanhCube * x * x) * (-2.f * kLog2e); }

template <bool kTanh>
WARPFORM_INLINE Vec gelu(Vec x) {
  if constexpr (kTanh) {
    const Vec exponent = tanh_exponent(x);
    const Vec sigmoid = 1.f / (1.f + exp2(min(broadcast(127.f), exponent)));
    return x * (exponent > 127.f ? Vec{} : sigmoid);
  }
  Vec density;
  return x * normal_cdf(x, density);
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
  Vec density;
  const Vec cdf = normal_cdf(x, density);
  return cdf + x * density * kDensity;
}

}  // namespace
}  // namespace warpform::cpu::WARPFORM_CPU_ISA
