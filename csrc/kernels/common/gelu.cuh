// GELU and its derivative as functions of one float32 value, for every kernel that applies it. erff takes some 25
// float32 operations, the tanh form 10.
#pragma once

#include <cmath>

#include "device/ptx.cuh"

namespace warpform {

// x * Phi(x), Phi the standard normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415).
struct ErfGelu {
  static __device__ __forceinline__ float phi(float x) { return 0.5f + 0.5f * erff(x * 0.7071067811865475f); }
  static __device__ __forceinline__ float value(float x) { return x * phi(x); }
  static __device__ __forceinline__ float derivative(float x) {
    constexpr float kHalfLog2e = 0.7213475204444817f;
    constexpr float kInvSqrt2Pi = 0.3989422804014327f;
    return phi(x) + x * (kInvSqrt2Pi * exp2_approx(-kHalfLog2e * x * x));
  }
};

// The tanh approximation of the same paper, 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), written with
// the logistic function, as 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u)): one exponential, and no cancellation for negative
// x.
struct TanhGelu {
  static constexpr float kScale = -2.302208198144325f;  // -2 sqrt(2 / pi) log2(e)
  static constexpr float kCubic = 0.044715f;

  // exp(-2 u)
  static __device__ __forceinline__ float exponential(float x) {
    return exp2_approx(kScale * x * (1.0f + kCubic * x * x));
  }

  static __device__ __forceinline__ float value(float x) { return x * reciprocal_approx(1.0f + exponential(x)); }
  static __device__ __forceinline__ float derivative(float x) {
    constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;
    // Beyond 10 the result is 0 or 1, and nothing below overflows. NaN stays NaN.
    x = x < -10.0f ? -10.0f : x > 10.0f ? 10.0f : x;
    const float e = exponential(x);
    const float s = reciprocal_approx(1.0f + e);
    // e * s is 1 - s without its cancellation.
    return s + x * (s * (e * s)) * (kTwoSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x));
  }
};

}  // namespace warpform
