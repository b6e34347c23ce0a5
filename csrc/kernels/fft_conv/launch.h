// Launch functions of the long convolution's kernels: pointers into device memory, sizes, an opaque stream. They launch
// and return; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/supported.h"
#include "fft_conv/plan.h"

namespace warpform {

// Sequences up to this length; longer ones have no kernel.
inline constexpr int kMaxFftConvLength = 32768;

// The points that a sequence is padded to; its spectrum has points + 1 bins.
constexpr int fft_conv_points(int length) {
  int points = 256;
  while (points < length) points *= 2;
  return points;
}

// The arguments that the kernels of one call share. Tensors are contiguous and 16-byte aligned.
struct FftConvProblem {
  bool bfloat16;  // else float16
  int batch;
  int channels;
  int length;
  int points;  // fft_conv_points(length)
  int shares;  // CTAs of a channel, each with its part of the batch: fft_conv_shares
};
int fft_conv_shares(const FftConvProblem& problem);

// The spectrum in the transform's order and in float16, and the tables that the transforms of its length need.
struct FftConvSpectrumParams {
  const float* spectrum;  // [channels, points + 1, 2]
  uint32_t* bins;         // [channels, 2 points]: pairs of float16, fft_bin_place
  float* factors;         // [channels]: half of what the bins were divided by
  void* tables;           // fft_plan(points).table_bytes
  int channels;
  int points;
};
void launch_fft_conv_spectrum(const FftConvSpectrumParams& params, void* stream);

// y = conv(v) + skip v with v = gate u, or the correlation; out = out_gate y, second_out = second_gate y.
struct FftConvParams {
  FftConvProblem problem;
  const void* u;         // [batch, channels, length], as all that follow
  const void* gate;      // or null
  const void* out_gate;  // or null
  void* out;
  const void* second_gate;  // or null
  void* second_out;         // or null
  const void* skip;         // [channels], or null
  bool skip_is_float;       // float32, else as u
  bool correlate;           // with the filter turned around: the conjugate spectrum
  const uint32_t* bins;
  const float* factors;
  const void* tables;
  void* half_sums;  // fft_conv_half_sum_bytes, workspace
  float* dot;       // [shares, channels], or null: sums of v second_gate out_gate over a CTA's part of the batch
};
int64_t fft_conv_half_sum_bytes(const FftConvProblem& problem);
void launch_fft_conv(const char* op, const FftConvParams& params, void* stream);

// dspectrum, from v = gate u and d = dout_gate dout.
struct FftConvGradientParams {
  FftConvProblem problem;
  const void* u;
  const void* gate;  // or null
  const void* dout;
  const void* dout_gate;  // or null
  const void* tables;
  uint32_t* transforms;  // [shares, channels, slots, 2 points], workspace
  float* products;       // [shares, channels, 2 points, 2], workspace
  float* dspectrum;      // [channels, points + 1, 2]
};
void launch_fft_conv_gradient(const char* op, const FftConvGradientParams& params, void* stream);

// Adds up FftConvParams::dot in a fixed order.
void launch_fft_conv_dot_sum(const char* op, const FftConvProblem& problem, const float* dot, void* dskip, DType dtype,
                             void* stream);

// Null if a kernel serves sequences of this length on the current device, else why none does.
const char* fft_conv_unsupported(int64_t length, int64_t batch, int64_t channels);

// ---- supported configurations ----

inline constexpr SizeLimit kFftConvLength{
    .name = "length", .max = kMaxFftConvLength, .otherwise = "sequences of more than 32768 values"};

inline constexpr SupportedConfig kFftConvConfigs[] = {
    {.op = "spectral_conv", .dtypes = kHalfTypes, .limits = {kFftConvLength}},
    {.op = "spectral_conv_backward", .dtypes = kHalfTypes, .limits = {kFftConvLength}},
};

}  // namespace warpform
