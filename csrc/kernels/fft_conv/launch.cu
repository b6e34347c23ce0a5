// Dispatch of the long convolution: size, CTAs, and what is supported.
#include "fft_conv/launch.h"

#include <algorithm>

#include "common/column_sum.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "fft_conv/convolve.cuh"
#include "fft_conv/gradient.cuh"
#include "fft_conv/prepare.cuh"
#include "fft_conv/product_sum.cuh"
#include "fft_conv/sizes.h"

namespace warpform {
namespace {

// Calls f<kPoints>().
template <class F>
decltype(auto) dispatch_points(int points, F&& f) {
  return dispatch_bucket<256, 512, 1024, 2048, 4096, 8192, 16384, 32768>(points, std::forward<F>(f));
}

}  // namespace

int fft_conv_shares(const FftConvProblem& p) {
  const FftPlan plan = fft_plan(p.points);
  const int64_t steps = ceil_div(ceil_div(int64_t{p.batch}, int64_t{2}), int64_t{plan.slots});
  if (steps == 0 || p.channels == 0) return 0;
  // An SM holds as many CTAs as its registers (64 or 128 a thread) and its shared memory allow.
  const int threads = plan.tiles == 1 ? 1024 : 512;
  const int per_sm = std::max(1, std::min(threads / plan.threads(), (200 << 10) / (plan.slots * plan.slot_bytes())));
  const int64_t most = std::max<int64_t>(1, static_cast<int64_t>(sm_count()) * per_sm / p.channels);
  const int64_t rounds = ceil_div(steps, most);
  return static_cast<int>(ceil_div(steps, rounds));
}

void launch_fft_conv_spectrum(const FftConvSpectrumParams& params, void* stream) {
  launch<fft_conv_spectrum_kernel>("spectral_conv", dim3(params.channels), kSpectrumThreads,
                                   kSpectrumThreads / kWarpSize * 4, stream, params);
  launch<fft_conv_table_kernel>("spectral_conv", dim3(16), kTableThreads, 0, stream, params);
}

int64_t fft_conv_half_sum_bytes(const FftConvProblem& p) {
  const FftPlan plan = fft_plan(p.points);
  return plan.passes == 1 ? 0 : int64_t{p.shares} * p.channels * plan.slots * p.points * 4;
}

void launch_fft_conv(const char* op, const FftConvParams& params, void* stream) {
  dispatch_points(params.problem.points, [&]<int kPoints>() { launch_fft_conv_size<kPoints>(op, params, stream); });
}

void launch_fft_conv_gradient(const char* op, const FftConvGradientParams& params, void* stream) {
  const FftConvProblem& p = params.problem;
  dispatch_points(p.points, [&]<int kPoints>() { launch_fft_conv_gradient_size<kPoints>(op, params, stream); });
  const unsigned blocks = p.points / kProductSumThreads + 1;
  launch<fft_conv_product_sum_kernel>(op, dim3(blocks * p.channels), kProductSumThreads, 0, stream, params);
}

void launch_fft_conv_dot_sum(const char* op, const FftConvProblem& p, const float* dot, void* dskip, DType dtype,
                             void* stream) {
  const ColumnSumParams sum{
      .partials = dot, .out = {dskip}, .sums = 1, .groups = p.shares, .cols = p.channels, .dtype = dtype};
  launch_column_sum(op, sum, stream);
}

const char* fft_conv_unsupported(int64_t length, int64_t batch, int64_t channels) {
  if (const char* reason = kFftConvLength.why_not(length)) return reason;
  // Grids of one dimension: CTAs, and blocks of bins.
  if (batch > 1 << 24 || channels > 1 << 22) return "more than 2^24 sequences or 2^22 channels";
  const int points = fft_conv_points(static_cast<int>(length));
  const int bytes = dispatch_points(points, [&]<int kPoints>() {
    return std::max(fft_conv_shared_bytes<FftSize<kPoints>>(), fft_conv_gradient_shared_bytes<FftSize<kPoints>>());
  });
  return bytes <= shared_memory_limit() ? nullptr
                                        : "sequences of this length need more shared memory than this GPU has";
}

}  // namespace warpform
