// Gradient of a long convolution's spectrum: for every bin, the sum over the batch of conj(V) D, where V and D are the
// transforms of v = gate u and d = dout_gate dout.
//
// Tile      as convolve.cuh: a CTA stays with its channel and walks over its share of the batch, a pair of sequences at
//           a time. D comes first and is left in L2 in float16; V follows, and what a lane holds of it is multiplied by
//           what the same lane left of D and added, in float32, to the CTA's own sums, in L2 too: one CTA and one lane
//           add to a sum, always in the same order. Then the CTAs' sums are added and brought into the order of bins.
// Pairs     with v = v1 + i v2 and d = d1 + i d2, conj(V) D also holds products of one sequence with the other; they
//           cancel in the even part, (P[n - k]* + P[k]) / 2, which is the spectrum of a real sequence. The scales of v
//           are chosen so that their products with those of d are the same for both sequences of a pair.
// Bounds    4 B H L bytes, twice that with gates, and 28 MMA-FLOP ... see convolve.cuh: half of a convolution's for each
//           of the two transforms. L2 moves 12 B H points more for the sums: that bounds it.
// Measured  not yet: no GPU run so far.
#pragma once

#include "fft_conv/transform.cuh"

namespace warpform {

template <class Plan>
constexpr int fft_conv_gradient_shared_bytes() {
  return Plan::kPlan.slots * Plan::kPlan.slot_bytes() + 2 * magnitude_bytes<Plan>();
}

// Scales of the two sequences of v, and what their products with d's transforms are multiplied by.
struct ProductScales {
  float v[2];
  float weight;
};
template <class Plan>
__device__ __forceinline__ ProductScales product_scales(uint32_t magnitudes_v, uint32_t magnitudes_d, int slot) {
  constexpr int kTarget = fft_target(Plan::kPlan.points), kLimit = 60;
  float inverse[2], common = INFINITY;
  ProductScales s = {{0, 0}, 0};
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const RowScale v = row_scale(largest_magnitude<Plan>(magnitudes_v, 2 * slot + q), kTarget, kLimit);
    const RowScale d = row_scale(largest_magnitude<Plan>(magnitudes_d, 2 * slot + q), kTarget, kLimit);
    const bool both = v.scale > 0 && d.scale > 0;
    inverse[q] = both ? d.inverse : 0;
    if (both) common = fminf(common, v.scale * d.scale);
    s.weight += 0 * v.inverse + 0 * d.inverse;  // NaN where a sequence is not finite
  }
  if (common < INFINITY) {
    s.v[0] = common * inverse[0], s.v[1] = common * inverse[1];
    s.weight += 1 / common;
  }
  return s;
}

// blockIdx.x: share * channels + channel.
template <class Plan>
__global__ void __launch_bounds__(Plan::kPlan.threads())
    fft_conv_gradient_kernel(const __grid_constant__ FftConvGradientParams params) {
  constexpr FftPlan p = Plan::kPlan;
  constexpr int kFragments = p.fragments();
  const FftConvProblem& problem = params.problem;
  const int channel = static_cast<int>(blockIdx.x) % problem.channels;
  const int share = static_cast<int>(blockIdx.x) / problem.channels;
  const uint32_t base = shared_base(), magnitudes_d = base + p.slots * p.slot_bytes();
  const uint32_t magnitudes_v = magnitudes_d + magnitude_bytes<Plan>();
  const int pairs = (problem.batch + 1) / 2;
  const auto tile = [&](int slot) { return RowTile<p.inner>{base + slot * p.slot_bytes()}; };
  // What a lane keeps of a digit's bins: index of the first of its 16 bytes.
  const auto place = [&](int branch, int pass) { return (branch * p.passes + pass) * kFragments * kWarpSize + lane_id(); };
  auto* transforms =
      reinterpret_cast<RowValues*>(params.transforms) + int64_t{blockIdx.x} * p.slots * (p.points / 2);
  auto* products = reinterpret_cast<Vec<float, 4>*>(params.products) + int64_t{blockIdx.x} * p.points;

#pragma unroll 1
  for (int pair = share * p.slots; pair < pairs; pair += problem.shares * p.slots) {
    const bool first = pair == share * p.slots;
#pragma unroll 1
    for (int pass = 0; pass < p.passes; ++pass) {
      block_sync();
      load_rows<Plan>(problem, params.dout, params.dout_gate, base, magnitudes_d, channel, pair);
      block_sync();
#pragma unroll 1
      for (int slot = 0; slot < p.slots; ++slot) {
        float scale[2];
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          scale[q] = row_scale(largest_magnitude<Plan>(magnitudes_d, 2 * slot + q), fft_target(p.points), 60).scale;
        }
        transform_outer<Plan>(tile(slot), params.tables, pass, scale[0], scale[1], problem.bfloat16);
      }
      block_sync();
      {
        const InnerTables<Plan> inner(params.tables);
#pragma unroll 1
        for (int branch = warp_id(); branch < p.branches; branch += p.warps) {
#pragma unroll 1
          for (int slot = 0; slot < p.slots; ++slot) {
            RowValues* to = transforms + slot * (p.points / 2) + place(branch, pass);
            const auto leave = [&](int i, int j, int h, float (&re)[4], float (&im)[4]) {
              RowValues d;
#pragma unroll
              for (int e = 0; e < 4; ++e) d[e] = pack2<half_t>(re[e], im[e]);
              store_global(to + ((i * p.tiles + j) * 2 + h) * kWarpSize, d);
            };
            transform_inner<Plan>(tile(slot), branch, inner.dft, inner, leave);
          }
        }
      }
      block_sync();
      load_rows<Plan>(problem, params.u, params.gate, base, magnitudes_v, channel, pair);
      block_sync();
#pragma unroll 1
      for (int slot = 0; slot < p.slots; ++slot) {
        const ProductScales scales = product_scales<Plan>(magnitudes_v, magnitudes_d, slot);
        transform_outer<Plan>(tile(slot), params.tables, pass, scales.v[0], scales.v[1], problem.bfloat16);
      }
      block_sync();
      const InnerTables<Plan> inner(params.tables);
#pragma unroll 1
      for (int branch = warp_id(); branch < p.branches; branch += p.warps) {
#pragma unroll 1
        for (int slot = 0; slot < p.slots; ++slot) {
          const float weight = product_scales<Plan>(magnitudes_v, magnitudes_d, slot).weight;
          const RowValues* from = transforms + slot * (p.points / 2) + place(branch, pass);
          Vec<float, 4>* sums = products + 2 * (place(branch, pass) - lane_id()) + lane_id();
          const auto add = [&](int i, int j, int h, float (&re)[4], float (&im)[4]) {
            const int fragment = (i * p.tiles + j) * 2 + h;
            const RowValues d = load_global(from + fragment * kWarpSize);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              Vec<float, 4>* at = sums + (fragment * 2 + half) * kWarpSize;
              Vec<float, 4> sum = {{0, 0, 0, 0}};
              if (!first || slot > 0) sum = load_global(at);
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int a = 2 * half + e;
                const Complex y = multiply_conjugate(unpack_pair<half_t>(d[a]), {{re[a], im[a]}});
                sum[2 * e] += weight * y[0];
                sum[2 * e + 1] += weight * y[1];
              }
              store_global(at, sum);
            }
          };
          transform_inner<Plan>(tile(slot), branch, inner.dft, inner, add);
        }
      }
    }
  }
}

}  // namespace warpform
