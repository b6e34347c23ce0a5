// The second stage of a spectrum's gradient: adds the sums that the CTAs of gradient.cuh left and brings them into the
// order of bins.
//
// Bounds    16 points H bytes read for each share of the batch, in 8-byte pieces, and 8 points H written: an eighth of
//           what the first stage reads at batch 64.
// Measured  H100 80GB HBM3, L = 4096, B 64, H 768: 61 us, L2 at 93 % of its rate.
#pragma once

#include "device/memory.cuh"
#include "fft_conv/launch.h"

namespace warpform {

constexpr int kProductSumThreads = 256;

// The gradient in order of bins, from the CTAs' products, [shares, channels, digits, fragments, 2, 32, 2, 2].
// blockIdx.x: channel and kProductSumThreads bins.
static __global__ void __launch_bounds__(kProductSumThreads) fft_conv_product_sum_kernel(
    const __grid_constant__ FftConvGradientParams params) {
  const FftConvProblem& problem = params.problem;
  const FftPlan p = fft_plan(problem.points);
  const int blocks = p.points / kProductSumThreads + 1;
  const int channel = static_cast<int>(blockIdx.x) / blocks;
  const int bin = static_cast<int>(blockIdx.x) % blocks * kProductSumThreads + static_cast<int>(threadIdx.x);
  if (bin > p.points) return;
  const auto* products = reinterpret_cast<const Vec<float, 2>*>(params.products);
  const auto sum = [&](int k) {
    const int place = fft_bin_place(p, k);  // there the two halves of a tile are neighbours, here the lanes
    const int64_t at = place / 128 * 128 + place % 4 / 2 * 64 + place / 4 % 32 * 2 + place % 2;
    Vec<float, 2> total = {{0, 0}};
    for (int share = 0; share < problem.shares; ++share) {
      const int64_t cta = int64_t{share} * problem.channels + channel;
      const Vec<float, 2> x = load_global(products + cta * 2 * p.points + at);
      total[0] += x[0], total[1] += x[1];
    }
    return total;
  };
  const Vec<float, 2> a = sum(bin), b = sum((2 * p.points - bin) % (2 * p.points));
  // Transforms were divided by outer * radix. Bins between the ends count twice.
  const bool end = bin % p.points == 0;
  const float square = static_cast<float>(p.outer * p.radix) * static_cast<float>(p.outer * p.radix);
  const float factor = square / static_cast<float>(p.points) * (end ? 0.25f : 0.5f);
  const Vec<float, 2> g = {{factor * (a[0] + b[0]), end ? 0.f : factor * (a[1] - b[1])}};
  store_global(reinterpret_cast<Vec<float, 2>*>(params.dspectrum) + int64_t{channel} * (p.points + 1) + bin, g);
}

}  // namespace warpform
