// Epilogue that adds accumulators to sums in global memory, which several blocks add to.
#pragma once

#include "device/mma.cuh"
#include "device/reduction.cuh"

namespace warpform {

// Adds the accumulators of one warp, times `factor`, to 16 rows of float32 sums in global memory, as far as `rows` and
// `cols` (a multiple of 8) reach: dst is where row 0, column 0 goes, 8-byte aligned; rows are `stride` elements (an
// even number) apart. The order of additions is not defined. All lanes of the warp call it; it overwrites acc.
//
// L2 adds by sectors of 32 bytes, and one instruction fills those that it touches: four lanes of a row with two columns
// each; or, where an instruction takes no more than one float a lane, eight lanes of two neighbouring rows, which
// exchange a column so that first the even and then the odd row is theirs.
template <bool kPaired = kPairedReductions, int kN>
__device__ __forceinline__ void add_accumulators_global(float* dst, int stride, int rows, int cols, float (&acc)[kN][4],
                                                        float factor) {
  const int lane = opaque_lane(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if constexpr (kPaired) {
      if (8 * r + g >= rows) continue;
      float* to = dst + (8 * r + g) * stride + 2 * t;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (8 * n < cols) red_add_global(to + 8 * n, acc[n][2 * r] * factor, acc[n][2 * r + 1] * factor);
      }
    } else {
      const bool odd = g % 2 != 0;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        float &left = acc[n][2 * r], &right = acc[n][2 * r + 1];
        const float other = shuffle_xor(odd ? left : right, 4);
        left = odd ? other : left;
        right = odd ? right : other;
      }
      // It holds one row's address at a time: there are no registers for both.
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int row = 8 * r + (g & ~1) + upper;
        if (row >= rows) continue;
        float* to = dst + row * stride + 2 * t + (odd ? 1 : 0);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          if (8 * n < cols) atomic_add_global(to + 8 * n, acc[n][2 * r + upper] * factor);
        }
      }
    }
  }
}

}  // namespace warpform
