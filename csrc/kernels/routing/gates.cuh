// Gates over a power of two, which is exact: what they multiply stays within 16 bits, however large or small they are.
#pragma once

#include <cstdint>

#include "device/types.cuh"

namespace warpform {

struct PowerOfTwo {
  float value;
  float inverse;
};

// The power of two above x, at most twice as large, and no more than 2^126; 1 for 0, subnormal numbers, infinity and
// NaN.
__device__ __forceinline__ PowerOfTwo power_above(float x) {
  constexpr uint32_t kBias = 127, kSpecial = 255;
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t exponent = bits >> 23;
  const bool ordinary = exponent > 0 && exponent < kSpecial;
  const uint32_t above = ordinary ? min(exponent + 1, 2 * kBias - 1) : kBias;
  const uint32_t power_bits[2] = {above << 23, (2 * kBias - above) << 23};
  PowerOfTwo power;
  __builtin_memcpy(&power.value, &power_bits[0], 4);
  __builtin_memcpy(&power.inverse, &power_bits[1], 4);
  return power;
}

}  // namespace warpform
