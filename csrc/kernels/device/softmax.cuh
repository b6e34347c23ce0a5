// The online softmax of FlashAttention-2 (Dao, arXiv 2307.08691) on the accumulators of a product, in base 2.
#pragma once

#include "device/ptx.cuh"
#include "device/reduce.cuh"

namespace warpform {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float negative_infinity() { return -INFINITY; }

// One step of the online softmax over the scores of a row, elements 2 r and 2 r + 1 of s: they become the unnormalised
// probabilities. Returns the factor by which what was summed under the old maximum shrinks. row_sum stays partial to
// the lane until the end.
template <int kN>
__device__ __forceinline__ float online_softmax_row(float (&s)[kN][4], int r, float& row_max, float& row_sum,
                                                    float factor) {
  float top = row_max;
#pragma unroll
  for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
  top = warp_reduce<4>(top, Max{});
  // A row that has seen no key yet keeps -inf: measured from 0, its exponentials are 0 and not NaN.
  const float base = top == negative_infinity() ? 0.f : top * factor;
  const float rescale = exp2_approx(row_max * factor - base);
  row_max = top;
  float sum = row_sum * rescale;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 2 * r; e < 2 * r + 2; ++e) {
      s[n][e] = exp2_approx(s[n][e] * factor - base);
      sum += s[n][e];
    }
  }
  row_sum = sum;
  return rescale;
}

// The same over the scores of 16 kM rows; `o` and the sums are rescaled to the new maxima.
template <int kM, int kN, int kO>
__device__ __forceinline__ void online_softmax(float (&s)[kM][kN][4], float (&o)[kM][kO][4], float (&row_max)[kM][2],
                                               float (&row_sum)[kM][2], float factor) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float rescale = online_softmax_row(s[m], r, row_max[m][r], row_sum[m][r], factor);
#pragma unroll
      for (int n = 0; n < kO; ++n) {
        o[m][n][2 * r] *= rescale;
        o[m][n][2 * r + 1] *= rescale;
      }
    }
  }
}

}  // namespace warpform
