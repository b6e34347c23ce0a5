// Prepares what the transforms of one length need besides the sequences: the filter's spectrum in the order in which
// the transforms leave their bins, in float16 and scaled by a power of two, and tables of DFT matrices and twiddle
// factors.
//
// Bounds    8 points H bytes read (twice, the second time from L2), as many written; the tables are 10 to 70 KB. At
//           batch 64 that is an eighth of what the convolution reads.
// Measured  H100 80GB HBM3, L = 4096, H 768: the spectrum 44 us, the tables 15 us.
#pragma once

#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "fft_conv/rows.cuh"

namespace warpform {

constexpr int kSpectrumThreads = 512;

// Bin of a spectrum of n = 2 points in the whole circle, from its first half; the imaginary parts of bins 0 and points
// are no part of a real filter's spectrum.
__device__ __forceinline__ Vec<float, 2> spectrum_bin(const float* spectrum, int bin, int points) {
  const bool mirrored = bin > points;
  Vec<float, 2> s = load_global(reinterpret_cast<const Vec<float, 2>*>(spectrum) + (mirrored ? 2 * points - bin : bin));
  if (bin % points == 0) s[1] = 0;
  return {{s[0], mirrored ? -s[1] : s[1]}};
}

// blockIdx.x: channel.
static __global__ void __launch_bounds__(kSpectrumThreads) fft_conv_spectrum_kernel(
    const __grid_constant__ FftConvSpectrumParams params) {
  const int points = params.points;
  const FftPlan p = fft_plan(points);
  const int64_t channel = blockIdx.x;
  const float* spectrum = params.spectrum + channel * 2 * (points + 1);
  uint32_t most = 0;
  for (int bin = threadIdx.x; bin <= points; bin += kSpectrumThreads) {
    const Vec<float, 2> s = spectrum_bin(spectrum, bin, points);
    most = max(most, max(magnitude_bits(s[0]), magnitude_bits(s[1])));
  }
  most = block_reduce<kSpectrumThreads>(most, Max{}, shared_base());
  // Bins are divided by the power of two above the largest; what is not finite gives NaN by the factor.
  const int exponent = static_cast<int>(most >> 23);
  const bool zero = exponent == 0 || exponent > 252;
  const float factor = exponent > 252 ? float_of_bits(0x7fc00000u) : float_of_bits(uint32_t(zero ? 0 : exponent) << 23);
  const float inverse = zero ? 0.f : float_of_bits(static_cast<uint32_t>(253 - exponent) << 23);
  if (threadIdx.x == 0) store_global(params.factors + channel, factor);

  auto* bins = reinterpret_cast<Vec<uint32_t, 4>*>(params.bins + channel * 2 * points);
  for (int i = threadIdx.x; i < points / 2; i += kSpectrumThreads) {
    // The inverse of fft_bin_place.
    const int lane = i % 32, fragment = i / 32 % p.fragments(), k1 = i / 32 / p.fragments();
    const int tile = fragment / 2;
    Vec<uint32_t, 4> v;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int k2 = tile / p.tiles * 16 + e / 2 * 8 + lane / 4;
      const int k3 = tile % p.tiles * 16 + fragment % 2 * 8 + lane % 4 * 2 + e % 2;
      const Vec<float, 2> s = spectrum_bin(spectrum, k1 + p.digits * (k2 + p.radix * k3), points);
      v[e] = zero ? 0 : pack2<half_t>(s[0] * inverse, s[1] * inverse);
    }
    store_global(bins + i, v);
  }
}

constexpr int kTableThreads = 256;

// exp(-2 pi i e / n), n a power of two: the quotient is exact.
__device__ __forceinline__ Vec<float, 2> root(int n, int e) {
  const float turns = 2.f * static_cast<float>(e % n) / static_cast<float>(n);
  return {{cos_pi(turns), -sin_pi(turns)}};
}

// Four registers of an operand of mma: entry(row, col) of its tile of 16 x 16.
template <class Entry>
__device__ __forceinline__ void store_operand(void* tables, int offset, int index, Entry&& entry) {
  const int lane = index % 32, tile = index / 32;
  const int g = lane / 4, t = lane % 4;
  Vec<uint32_t, 4> v;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = g + r % 2 * 8, col = 2 * t + r / 2 * 8;
    v[r] = pack2<half_t>(entry(tile, row, col), entry(tile, row, col + 1));
  }
  store_global(reinterpret_cast<Vec<uint32_t, 4>*>(static_cast<unsigned char*>(tables) + offset) + index, v);
}

static __global__ void __launch_bounds__(kTableThreads) fft_conv_table_kernel(
    const __grid_constant__ FftConvSpectrumParams params) {
  const FftPlan p = fft_plan(params.points);
  void* tables = params.tables;
  const int begin = static_cast<int>(blockIdx.x * kTableThreads + threadIdx.x);
  const int step = static_cast<int>(gridDim.x) * kTableThreads;
  // The outer matrices are real. Tiles of 16 rows hold the real parts of 8 results, then the imaginary ones; columns
  // are the rows of the slot in shared memory.
  for (int i = begin; i < p.passes * p.forward_m * p.forward_k * 32; i += step) {
    store_operand(tables, p.forward_matrix, i, [&](int tile, int row, int col) {
      const int branch = tile / p.forward_k % p.forward_m * 8 + row % 8;
      const int source = tile % p.forward_k * 16 + col, j1 = source % p.outer;
      if (branch >= p.branches || source >= 2 * p.outer) return 0.f;
      const int k1 = branch * p.passes + tile / p.forward_k / p.forward_m;
      const Vec<float, 2> w = root(p.digits, j1 * k1);
      // (x + i y) w: the part by x, then by y; each stage is divided by its number of terms.
      const bool imaginary = row >= 8, of_y = source >= p.outer;
      const float entry = imaginary == of_y ? w[0] : imaginary ? w[1] : -w[1];
      return entry / static_cast<float>(p.outer);
    });
  }
  for (int i = begin; i < p.passes * p.inverse_m * p.inverse_k * 32; i += step) {
    store_operand(tables, p.inverse_matrix, i, [&](int tile, int row, int col) {
      const int j1 = tile / p.inverse_k % p.inverse_m * 8 + row % 8;
      const int source = tile % p.inverse_k * 16 + col, branch = source % p.branches;
      if (j1 >= p.outer || source >= p.rows) return 0.f;
      const int k1 = branch * p.passes + tile / p.inverse_k / p.inverse_m;
      const Vec<float, 2> w = root(p.digits, j1 * k1);
      const bool imaginary = row >= 8, of_y = source >= p.branches;
      return imaginary == of_y ? w[0] : imaginary ? -w[1] : w[1];
    });
  }
  for (int i = begin; i < 2 * p.tiles * 32; i += step) {
    store_operand(tables, p.square, i, [&](int tile, int row, int col) {
      const Vec<float, 2> w = root(p.radix, row * (tile % p.tiles * 16 + col));
      return tile < p.tiles ? w[0] : -w[1];
    });
  }
  const auto at = [&](int offset, int i) {
    return reinterpret_cast<Vec<float, 2>*>(static_cast<unsigned char*>(tables) + offset) + i;
  };
  for (int i = begin; i < p.inner; i += step) {
    const int e = i % 2, lane = i / 2 % 32, half = i / 64 % 2, h = i / 128 % 2, tile = i / 256;
    const int row = tile / p.tiles * 16 + half * 8 + lane / 4, col = tile % p.tiles * 16 + h * 8 + lane % 4 * 2 + e;
    const Vec<float, 2> w = root(p.inner, row * col);
    const float scale = 1.f / static_cast<float>(p.radix);
    store_global(at(p.inner_twiddles, i), Vec<float, 2>{{w[0] * scale, w[1] * scale}});
  }
  const int n = 2 * p.points;
  const auto fill = [&](int offset, int count, auto&& factor) {
    for (int i = begin; i < count * p.digits; i += step) {
      store_global(at(offset, i), root(n, factor(i / p.digits) * (i % p.digits)));
    }
  };
  fill(p.column_twiddles, 4, [](int t) { return 2 * t; });
  fill(p.begin_twiddles, p.groups * p.warps,
       [&](int i) { return 16 * (i % p.warps + i / p.warps * p.forward_strips * p.warps); });
  fill(p.row_twiddles, 8, [&](int g) { return p.radix * g; });
  fill(p.step_twiddles, 4, [&](int i) { return i == 0 ? 1 : i == 1 ? 8 : i == 2 ? 16 * p.warps : 8 * p.radix; });
}

}  // namespace warpform
