// Additions to global memory of more than one number by one instruction.
#pragma once

#include "device/types.cuh"

namespace warpform {

// True if one instruction can add two floats (red_add_global).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kPairedReductions = true;
#else
constexpr bool kPairedReductions = false;
#endif

// p[0] += x, p[1] += y, each by itself, in no order between threads; p 8-byte aligned. sm_90.
__device__ __forceinline__ void red_add_global(float* p, float x, float y) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "f"(x), "f"(y)
               : "memory");
}

}  // namespace warpform
