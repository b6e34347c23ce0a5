// Long convolution with a filter given by its spectrum, gates and skip connection fused: the Monarch-factored FFT on
// tensor cores (Monarch Mixer, Fu et al., arXiv 2310.12109; FlashFFTConv, Fu et al., arXiv 2311.05908).
//
// Tile      a pair of sequences of one channel (several pairs up to 1024 points): the filter is real, so two real
//           sequences are the real and imaginary part of one complex one and never get apart. A CTA stays with its
//           channel and walks over its share of the batch.
// Factors   plan.h: three stages forward, product with the spectrum, three back. Zero padding is never stored: the
//           first stage makes `digits` rows of half as many, the last undoes it. Stages are rounded to float16 and
//           accumulated in float32, for bfloat16 too: each sequence is scaled by a power of two, exactly, so that it
//           fits and so that its partner does not disturb it.
// Loads     all threads, 16 bytes each; sequences that are no multiples of 16 bytes value by value. The spectrum comes
//           from L2 in operand order, 4 bytes a bin; u is read again where there is a skip connection.
// Passes    32768 points take two, even and odd digits, as 256 KB would be needed for one: the sum of the first stays
//           in L2, 2 points in float16 for each sequence.
// Bounds    by batch B and channels H at length L = points: 4 B H L bytes, and 4 B H L more with two gates; 16 L (outer +
//           2 radix) MMA-FLOP a sequence. B 64, H 768 on an H200 (4.3 TB/s, 490 TFLOP/s by mma.sync), microseconds:
//           L        256   512   1024  2048  4096  8192   16384  32768
//           bytes    12    23    47    94    187   375    749    1498   (twice that with gates)
//           FLOP     14    28    59    132   315   946    2103   5047
//           A product over less than 16 rows counts as 16, so up to 1024 points take some more.
// Measured  not yet: no GPU run so far.
#pragma once

#include "fft_conv/transform.cuh"

namespace warpform {

template <class Plan>
constexpr int fft_conv_shared_bytes() {
  return Plan::kPlan.slots * Plan::kPlan.slot_bytes() + magnitude_bytes<Plan>();
}

// The middle of the convolution: every row to bins, times the spectrum, and back.
template <class Plan>
__device__ __forceinline__ void convolve_rows(uint32_t base, const FftConvParams& params, int channel, int pass) {
  constexpr FftPlan p = Plan::kPlan;
  const InnerTables<Plan> inner(params.tables);
  const uint32_t conjugate = params.correlate ? 0x80000000u : 0;
#pragma unroll 1
  for (int branch = warp_id(); branch < p.branches; branch += p.warps) {
    const int64_t digit = int64_t{channel} * p.digits + branch * p.passes + pass;
    const auto* bins = reinterpret_cast<const RowValues*>(params.bins) + digit * p.fragments() * kWarpSize + lane_id();
#pragma unroll 1
    for (int slot = 0; slot < p.slots; ++slot) {
      const RowTile<p.inner> tile{base + slot * p.slot_bytes()};
      Square<p.tiles> z;
      transform_inner<Plan>(tile, branch, inner.dft, inner, [&](int i, int j, int h, float (&re)[4], float (&im)[4]) {
        const RowValues s = load_global(bins + ((i * p.tiles + j) * 2 + h) * kWarpSize);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Complex y = multiply({{re[e], im[e]}}, unpack_pair<half_t>(s[e] ^ conjugate));
          re[e] = y[0], im[e] = y[1];
        }
        keep(z, i, j, h, re, im);
      });
      inverse_inner<Plan>(tile, branch, pass, inner.dft, params.tables, inner, z);
    }
  }
}

// Adds what the first pass left, where there are two; or leaves it.
template <class Plan>
__device__ __forceinline__ void pass_half_sums(uint32_t base, const FftConvParams& params, bool first) {
  using Walk = RowWalk<Plan>;
  constexpr FftPlan p = Plan::kPlan;
  auto* sums = static_cast<RowValues*>(params.half_sums) + int64_t{blockIdx.x} * 2 * p.slots * (p.points / kRowChunk);
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

// The results of a step, from the sequences in shared memory. Returns this thread's part of FftConvParams::dot.
template <class Plan>
__device__ __forceinline__ float write_rows(uint32_t base, uint32_t magnitudes, const FftConvParams& params,
                                            int channel, int pair) {
  using Walk = RowWalk<Plan>;
  const FftConvProblem& p = params.problem;
  const bool bf16 = p.bfloat16;
  float skip = 0;
  if (params.skip != nullptr) {
    skip = params.skip_is_float ? load_global(static_cast<const float*>(params.skip) + channel)
                                : unpack_pair(load_global(static_cast<const uint16_t*>(params.skip) + channel), bf16)[0];
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
      const bool reads_v = params.skip != nullptr || params.dot != nullptr;
      RowValues u = {{0, 0, 0, 0}}, gate, out_gate, second_gate;
      if (reads_v) u = load_row(params.u, begin, col, p.length);
      if (reads_v && params.gate != nullptr) gate = load_row(params.gate, begin, col, p.length);
      if (params.out_gate != nullptr) out_gate = load_row(params.out_gate, begin, col, p.length);
      if (params.second_gate != nullptr) second_gate = load_row(params.second_gate, begin, col, p.length);
      const RowValues conv = load_shared<RowValues>(Walk::address(base, row, col));
      RowValues out, second;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Vec<float, 2> y = unpack_pair<half_t>(conv[j]), v = unpack_pair(u[j], bf16), a, b;
        const Vec<float, 2> one = {{1, 1}};
        const Vec<float, 2> g = reads_v && params.gate != nullptr ? unpack_pair(gate[j], bf16) : one;
        const Vec<float, 2> o = params.out_gate != nullptr ? unpack_pair(out_gate[j], bf16) : one;
        const Vec<float, 2> s = params.second_gate != nullptr ? unpack_pair(second_gate[j], bf16) : one;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          v[e] *= g[e];
          y[e] = y[e] * scale.inverse * spectrum;
          if (params.skip != nullptr) y[e] += skip * v[e];
          a[e] = y[e] * o[e];
          b[e] = y[e] * s[e];
          dot += v[e] * o[e] * s[e];
        }
        out[j] = pack_pair(a[0], a[1], bf16);
        second[j] = pack_pair(b[0], b[1], bf16);
      }
      store_row(params.out, begin, col, p.length, out);
      if (params.second_out != nullptr) store_row(params.second_out, begin, col, p.length, second);
    }
  });
  return dot;
}

// blockIdx.x: share * channels + channel.
template <class Plan>
__global__ void __launch_bounds__(Plan::kPlan.threads()) fft_conv_kernel(const __grid_constant__ FftConvParams params) {
  constexpr FftPlan p = Plan::kPlan;
  const FftConvProblem& problem = params.problem;
  const int channel = static_cast<int>(blockIdx.x) % problem.channels;
  const int share = static_cast<int>(blockIdx.x) / problem.channels;
  const uint32_t base = shared_base(), magnitudes = base + p.slots * p.slot_bytes();
  const int pairs = (problem.batch + 1) / 2;
  float dot = 0;
#pragma unroll 1
  for (int pair = share * p.slots; pair < pairs; pair += problem.shares * p.slots) {
#pragma unroll 1
    for (int pass = 0; pass < p.passes; ++pass) {
      block_sync();
      load_rows<Plan>(problem, params.u, params.gate, base, magnitudes, channel, pair);
      block_sync();
#pragma unroll 1
      for (int slot = 0; slot < p.slots; ++slot) {
        const RowTile<p.inner> tile{base + slot * p.slot_bytes()};
        float scale[2];
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          scale[q] = row_scale(largest_magnitude<Plan>(magnitudes, 2 * slot + q), fft_target(p.points), 100).scale;
        }
        transform_outer<Plan>(tile, params.tables, pass, scale[0], scale[1], problem.bfloat16);
      }
      block_sync();
      convolve_rows<Plan>(base, params, channel, pass);
      block_sync();
#pragma unroll 1
      for (int slot = 0; slot < p.slots; ++slot) {
        inverse_outer<Plan>(RowTile<p.inner>{base + slot * p.slot_bytes()}, params.tables, pass);
      }
      block_sync();
      if constexpr (p.passes > 1) pass_half_sums<Plan>(base, params, pass == 0);
    }
    dot += write_rows<Plan>(base, magnitudes, params, channel, pair);
  }
  if (params.dot != nullptr) {
    block_sync();
    dot = block_reduce<p.threads()>(dot, Sum{}, base);
    if (threadIdx.x == 0) store_global(params.dot + int64_t{share} * problem.channels + channel, dot);
  }
}

}  // namespace warpform
