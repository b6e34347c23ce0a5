// Long convolution with a filter given by its spectrum, gates and skip connection fused: the Monarch-factored FFT on
// tensor cores (Monarch Mixer, Fu et al., arXiv 2310.12109; FlashFFTConv, Fu et al., arXiv 2311.05908).
//
// Tile      a pair of sequences of one channel (several pairs up to 1024 points): the filter is real, so two real
//           sequences are the real and imaginary part of one complex one and stay so. A CTA stays with its
//           channel and walks over its share of the batch.
// Factors   plan.h: three stages forward, product with the spectrum, three back. Zero padding is never stored: the
//           first stage makes `digits` rows of half as many, the last undoes it. Stages are rounded to float16 and
//           accumulated in float32, for bfloat16 too: each sequence is scaled by a power of two, exactly, so that it
//           fits and so that its partner does not disturb it.
// Loads     all threads, 16 bytes each; sequences that are no multiples of 16 bytes value by value. The spectrum comes
//           from L2 in operand order, 4 bytes a bin; u is read again where there is a skip connection.
// Passes    32768 points take two, even and odd digits, as 256 KB would be needed for one: the sum of the first stays
//           in L2, 2 points in float16 for each sequence.
// Bounds    by batch B and channels H at length L = points: 4 B H L bytes, 4 B H L more with two gates and 2 B H L with
//           a skip connection; 16 B H L (outer + 2 radix) FLOP, a product over fewer than 16 rows counting as 16. B 64,
//           H 768 on an H200 (4.3 TB/s, 490 TFLOP/s by mma.sync), microseconds without gates and skip connection:
//           L        256   512   1024  2048  4096  8192  16384  32768
//           bytes    12    23    47    94    187   375   749    1498
//           FLOP     26    39    66    131   316   947   2104   5049
//           So FLOP bound it, and the twiddle factors beside them; with both gates bytes do up to 4096.
// Measured  H100 80GB HBM3, B 64, H 768, with the spectrum's preparation: L = 256 208 us, 8 % of the floor; 4096 1338
//           us, 21 %; 32768 20060 us, 11 %; with gates 228 us, 15 %; 1620 us, 34 %; 26270 us, 17 %.
#pragma once

#include "fft_conv/transform.cuh"

namespace warpform {

template <class Plan>
constexpr int fft_conv_shared_bytes() {
  return Plan::kPlan.slots * Plan::kPlan.slot_bytes() + magnitude_bytes<Plan>() + Plan::kPlan.threads() * 8;
}

// The middle of the convolution: every row to bins, times the spectrum, and back.
template <class Plan>
__device__ __forceinline__ void convolve_rows(uint32_t base, const FftConvParams& params, int channel, int pass) {
  constexpr FftPlan p = Plan::kPlan;
  const InnerTables<Plan> inner(params.tables);
  const auto* bins = reinterpret_cast<const RowValues*>(params.bins) + int64_t{channel} * (p.points / 2);
  const uint32_t conjugate = params.correlate ? 0x80000000u : 0;
#pragma unroll 1
  for (int k1 = warp_id() * p.passes + pass; k1 < p.digits; k1 += p.warps * p.passes) {
#pragma unroll 1
    for (int slot = 0; slot < p.slots; ++slot) {
      const RowTile<p.inner> tile{base + slot * p.slot_bytes()};
      Square<p.tiles> x;
      const auto spectrum = [&](int i, int j, int h) {
        const int fragment = k1 * p.fragments() + (i * p.tiles + j) * 2 + h;
        return load_global(bins + opaque(fragment * kWarpSize + lane_id()));
      };
      const auto times = [&](int, int, int, const RowValues& s, auto& re, auto& im) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Complex y = multiply({{re[e], im[e]}}, unpack_pair<half_t>(s[e] ^ conjugate));
          re[e] = y[0], im[e] = y[1];
        }
      };
      transform_inner<Plan, true>(x, tile, k1, inner.dft, inner, spectrum, times);
      inverse_inner<Plan>(tile, k1, inner.dft, params.tables, inner, x);
    }
  }
}

// Adds what the first pass left, where there are two; or leaves it.
template <class Plan>
__device__ __forceinline__ void pass_half_sums(uint32_t base, const FftConvParams& params, bool first) {
  using Walk = RowWalk<Plan>;
  constexpr FftPlan p = Plan::kPlan;
  auto* sums = static_cast<RowValues*>(params.half_sums) +
               (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * 2 * p.slots * (p.points / kRowChunk);
  Walk::for_each([&](int row) {
#pragma unroll 1
    for (int step = 0; step < Walk::kSteps; ++step) {
      const int col = Walk::column(step);
      RowValues* at = sums + (row * p.points + col) / kRowChunk;
      RowValues v = load_shared<RowValues>(Walk::address(base, row, col));
      if (!first) {
        const RowValues other = load_global(at);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Vec<float, 2> x = unpack_pair<half_t>(v[j]), y = unpack_pair<half_t>(other[j]);
          v[j] = pack2<half_t>(x[0] + y[0], x[1] + y[1]);
        }
        store_shared(Walk::address(base, row, col), v);
      } else {
        store_global(at, v);
      }
    }
  });
}

// Eight values of a sequence times eight of a gate; as they are without one.
__device__ __forceinline__ Vec<float, 8> gated(const Vec<float, 8>& x, const void* gate, int64_t begin, int col,
                                               const FftConvProblem& p) {
  if (gate == nullptr) return x;
  const RowValues g = load_row(gate, begin, col, p.length);
  Vec<float, 8> y;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Vec<float, 2> f = unpack_pair(g[j], p.bfloat16);
    y[2 * j] = x[2 * j] * f[0], y[2 * j + 1] = x[2 * j + 1] * f[1];
  }
  return y;
}
__device__ __forceinline__ RowValues packed(const Vec<float, 8>& x, bool bfloat16) {
  RowValues v;
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = pack_pair(x[2 * j], x[2 * j + 1], bfloat16);
  return v;
}

// The results of a step, from the sequences in shared memory. Returns this thread's part of FftConvParams::dot.
template <class Plan>
__device__ __forceinline__ float write_rows(uint32_t base, uint32_t magnitudes, const FftConvParams& params,
                                            int channel, int pair) {
  using Walk = RowWalk<Plan>;
  const FftConvProblem& p = params.problem;
  float skip = 0;
  if (params.skip != nullptr) {
    skip = params.skip_is_float
               ? load_global(static_cast<const float*>(params.skip) + channel)
               : unpack_pair(load_global(static_cast<const uint16_t*>(params.skip) + channel), p.bfloat16)[0];
  }
  const float spectrum = load_global(params.factors + channel);
  float dot = 0;
  Walk::for_each([&](int row) {
    const int64_t begin = row_begin(p, channel, pair, row);
    if (begin < 0) return;
    const RowScale scale = row_scale(largest_magnitude<Plan>(magnitudes, row), fft_target(Plan::kPlan.points), 100);
#pragma unroll 1
    for (int step = 0; step < Walk::kSteps; ++step) {
      const int col = Walk::column(step);
      if (col >= p.length) break;
      Vec<float, 8> v, y;
      const RowValues conv = load_shared<RowValues>(Walk::address(base, row, col));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v[j] = 1;
        y[j] = unpack_pair<half_t>(conv[j / 2])[j % 2] * scale.inverse * spectrum;
      }
      if (params.skip != nullptr || params.dot != nullptr) {
        v = gated(gated(v, params.u, begin, col, p), params.gate, begin, col, p);
#pragma unroll
        for (int j = 0; j < 8; ++j) y[j] += skip * v[j];
      }
      store_row(params.out, begin, col, p.length, packed(gated(y, params.out_gate, begin, col, p), p.bfloat16));
      if (params.second_out != nullptr) {
        store_row(params.second_out, begin, col, p.length,
                  packed(gated(y, params.second_gate, begin, col, p), p.bfloat16));
      }
      if (params.dot != nullptr) {
        v = gated(gated(v, params.out_gate, begin, col, p), params.second_gate, begin, col, p);
#pragma unroll
        for (int n = 4; n > 0; n /= 2) {
#pragma unroll
          for (int j = 0; j < n; ++j) v[j] += v[j + n];
        }
        dot += v[0];
      }
    }
  });
  return dot;
}

// blockIdx.x: channel; blockIdx.y: share of the batch.
template <class Plan>
__global__ void __launch_bounds__(Plan::kPlan.threads()) fft_conv_kernel(const __grid_constant__ FftConvParams params) {
  constexpr FftPlan p = Plan::kPlan;
  const FftConvProblem& problem = params.problem;
  const int channel = static_cast<int>(blockIdx.x), share = static_cast<int>(blockIdx.y);
  const uint32_t base = shared_base(), magnitudes = base + p.slots * p.slot_bytes();
  const int pairs = (problem.batch + 1) / 2;
  // A thread's part of the dot product and the number of its step lie in shared memory from one step to the next: at
  // radix 32 there is no register left for them.
  const auto own = [&] { return magnitudes + magnitude_bytes<Plan>() + opaque(threadIdx.x) * 8; };
  store_shared(own(), 0.f);
  store_shared(own() + 4, share * p.slots * p.passes);
  const auto pair = [&] { return load_shared<int>(own() + 4) / p.passes; };
  const auto pass = [&] { return load_shared<int>(own() + 4) % p.passes; };
#pragma unroll 1
  while (pair() < pairs) {
    block_sync();
    load_rows<Plan>(problem, params.u, params.gate, base, magnitudes, channel, pair());
    block_sync();
#pragma unroll 1
    for (int slot = 0; slot < p.slots; ++slot) {
      const RowTile<p.inner> tile{base + slot * p.slot_bytes()};
      float scale[2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        scale[q] = row_scale(largest_magnitude<Plan>(magnitudes, 2 * slot + q), fft_target(p.points), 100).scale;
      }
      transform_outer<Plan>(tile, params.tables, pass(), scale[0], scale[1], problem.bfloat16);
    }
    block_sync();
    convolve_rows<Plan>(base, params, channel, pass());
    block_sync();
#pragma unroll 1
    for (int slot = 0; slot < p.slots; ++slot) {
      inverse_outer<Plan>(RowTile<p.inner>{base + slot * p.slot_bytes()}, params.tables, pass());
    }
    block_sync();
    if constexpr (p.passes > 1) {
      pass_half_sums<Plan>(base, params, pass() == 0);
      if (pass() + 1 < p.passes) {
        store_shared(own() + 4, load_shared<int>(own() + 4) + 1);
        continue;
      }
    }
    const float part = write_rows<Plan>(base, magnitudes, params, channel, pair());
    store_shared(own(), load_shared<float>(own()) + part);
    store_shared(own() + 4, (pair() + problem.shares * p.slots) * p.passes);
  }
  if (params.dot != nullptr) {
    block_sync();
    const float sum = block_reduce<p.threads()>(load_shared<float>(own()), Sum{}, base);
    if (threadIdx.x == 0) store_global(params.dot + int64_t{share} * problem.channels + channel, sum);
  }
}

}  // namespace warpform
