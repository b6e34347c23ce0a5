// Sets of groups, as the bits of a 64-bit number.
#pragma once

#include "device/ptx.cuh"

namespace warpform {

__device__ __forceinline__ int popcount(uint64_t x) {
  return popcount(static_cast<uint32_t>(x)) + popcount(static_cast<uint32_t>(x >> 32));
}

// The place of the lowest bit that is set; 64 for none.
__device__ __forceinline__ int lowest_bit(uint64_t x) { return popcount((x & (0 - x)) - 1); }

// The place of the bit that is set and has n bits set below it.
__device__ __forceinline__ int nth_bit(uint64_t x, int n) {
  for (; n > 0; --n) x &= x - 1;
  return lowest_bit(x);
}

}  // namespace warpform
