// Gradient of a long convolution's spectrum: for every bin, the sum over the batch of conj(V) D, where V and D are the
// transforms of v = gate u and d = dout_gate dout.
//
// Tile      As convolve.cuh: a CTA stays with its channel and walks over its share of the batch, a pair of sequences at
//           a time. D comes first and is left in L2 in float16. V follows; a lane multiplies its part of V by the part
//           of D that the same lane left, and adds the product in float32 to the CTA's own sums, in L2 too. One CTA and
//           one lane add to a sum, always in the same order. product_sum.cuh adds the CTAs' sums and orders the bins.
// Pairs     With v = v1 + i v2 and d = d1 + i d2, conj(V) D also holds products of one sequence with the other; they
//           cancel in the even part, (P[n - k]* + P[k]) / 2, which is the spectrum of a real sequence. The scales of v
//           are chosen so that their products with those of d are the same for both sequences of a pair.
// Bounds    4 B H L bytes, twice that with gates; as many FLOP as one convolution. L2 moves 24 B H L bytes more, for
//           the sums and for D: that bounds it up to 8192 (1.2 ms at L = 4096, B 64, H 768 and 4 TB/s, FLOP take 0.3).
// Measured  H100 80GB HBM3, L = 4096, B 64, H 768, with gates: 2329 us, 69 % of the memory's rate.
#pragma once

#include "fft_conv/transform.cuh"

namespace warpform {

template <class Plan>
constexpr int fft_conv_gradient_shared_bytes() {
  return Plan::kPlan.slots * Plan::kPlan.slot_bytes() + 2 * magnitude_bytes<Plan>() + Plan::kPlan.threads() * 4;
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

// D of a pass's digits, from their rows, to memory.
template <class Plan>
__device__ __forceinline__ void leave_transforms(uint32_t base, RowValues* transforms, const void* tables, int pass) {
  constexpr FftPlan p = Plan::kPlan;
  const InnerTables<Plan> inner(tables);
#pragma unroll 1
  for (int k1 = warp_id() * p.passes + pass; k1 < p.digits; k1 += p.warps * p.passes) {
#pragma unroll 1
    for (int slot = 0; slot < p.slots; ++slot) {
      RowValues* to = transforms + slot * (p.points / 2);
      const auto nothing = [](int, int, int) { return 0; };
      const auto leave = [&](int i, int j, int h, int, auto& re, auto& im) {
        RowValues d;
#pragma unroll
        for (int e = 0; e < 4; ++e) d[e] = pack2<half_t>(re[e], im[e]);
        const int fragment = k1 * p.fragments() + (i * p.tiles + j) * 2 + h;
        store_global(to + opaque(fragment * kWarpSize + lane_id()), d);
      };
      Square<p.tiles> x;
      transform_inner<Plan, false>(x, RowTile<p.inner>{base + slot * p.slot_bytes()}, k1, inner.dft, inner, nothing,
                                   leave);
    }
  }
}

// conj(V) D of a pass's digits, V from their rows and D from memory, to the CTA's sums.
template <class Plan>
__device__ __forceinline__ void add_products(uint32_t base, uint32_t magnitudes_v, uint32_t magnitudes_d,
                                             const RowValues* transforms, Vec<float, 4>* products, const void* tables,
                                             int pass, bool first) {
  constexpr FftPlan p = Plan::kPlan;
  const InnerTables<Plan> inner(tables);
#pragma unroll 1
  for (int k1 = warp_id() * p.passes + pass; k1 < p.digits; k1 += p.warps * p.passes) {
#pragma unroll 1
    for (int slot = 0; slot < p.slots; ++slot) {
      const float weight = product_scales<Plan>(magnitudes_v, magnitudes_d, slot).weight;
      const RowValues* from = transforms + slot * (p.points / 2);
      const auto fragment = [&](int i, int j, int h) { return k1 * p.fragments() + (i * p.tiles + j) * 2 + h; };
      const auto left = [&](int i, int j, int h) {
        return load_global(from + opaque(fragment(i, j, h) * kWarpSize + lane_id()));
      };
      const auto add = [&](int i, int j, int h, const RowValues& d, auto& re, auto& im) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Vec<float, 4>* at = products + opaque((fragment(i, j, h) * 2 + half) * kWarpSize + lane_id());
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
      Square<p.tiles> x;
      transform_inner<Plan, false>(x, RowTile<p.inner>{base + slot * p.slot_bytes()}, k1, inner.dft, inner, left, add);
    }
  }
}

// blockIdx.x: channel; blockIdx.y: share of the batch.
template <class Plan>
__global__ void __launch_bounds__(Plan::kPlan.threads()) fft_conv_gradient_kernel(
    const __grid_constant__ FftConvGradientParams params) {
  constexpr FftPlan p = Plan::kPlan;
  const FftConvProblem& problem = params.problem;
  const int channel = static_cast<int>(blockIdx.x), share = static_cast<int>(blockIdx.y);
  const int64_t cta = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  const uint32_t base = shared_base(), magnitudes_d = base + p.slots * p.slot_bytes();
  const uint32_t magnitudes_v = magnitudes_d + magnitude_bytes<Plan>();
  const int pairs = (problem.batch + 1) / 2;
  const auto tile = [&](int slot) { return RowTile<p.inner>{base + slot * p.slot_bytes()}; };
  // 16 bytes for each fragment and lane.
  auto* transforms = reinterpret_cast<RowValues*>(params.transforms) + cta * p.slots * (p.points / 2);
  auto* products = reinterpret_cast<Vec<float, 4>*>(params.products) + cta * p.points;
  // The step that a thread is at lies in shared memory, as in convolve.cuh.
  const auto own = [&] { return magnitudes_v + magnitude_bytes<Plan>() + opaque(threadIdx.x) * 4; };
  const auto pair = [&] { return load_shared<int>(own()) / p.passes; };
  const auto pass = [&] { return load_shared<int>(own()) % p.passes; };
  store_shared(own(), share * p.slots * p.passes);

#pragma unroll 1
  while (pair() < pairs) {
    block_sync();
    load_rows<Plan>(problem, params.dout, params.dout_gate, base, magnitudes_d, channel, pair());
    block_sync();
#pragma unroll 1
    for (int slot = 0; slot < p.slots; ++slot) {
      float scale[2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        scale[q] = row_scale(largest_magnitude<Plan>(magnitudes_d, 2 * slot + q), fft_target(p.points), 60).scale;
      }
      transform_outer<Plan>(tile(slot), params.tables, pass(), scale[0], scale[1], problem.bfloat16);
    }
    block_sync();
    leave_transforms<Plan>(base, transforms, params.tables, pass());
    block_sync();
    load_rows<Plan>(problem, params.u, params.gate, base, magnitudes_v, channel, pair());
    block_sync();
#pragma unroll 1
    for (int slot = 0; slot < p.slots; ++slot) {
      const ProductScales scales = product_scales<Plan>(magnitudes_v, magnitudes_d, slot);
      transform_outer<Plan>(tile(slot), params.tables, pass(), scales.v[0], scales.v[1], problem.bfloat16);
    }
    block_sync();
    add_products<Plan>(base, magnitudes_v, magnitudes_d, transforms, products, params.tables, pass(),
                       pair() == share * p.slots);
    const bool last = pass() + 1 == p.passes;
    store_shared(own(), last ? (pair() + problem.shares * p.slots) * p.passes : load_shared<int>(own()) + 1);
  }
}

}  // namespace warpform
