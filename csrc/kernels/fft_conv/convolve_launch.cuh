// Instantiation of the convolution for some sizes.
#pragma once

#include "device/launch.cuh"
#include "fft_conv/convolve.cuh"
#include "fft_conv/sizes.h"

namespace warpform {

template <int kPoints>
void launch_fft_conv_size(const char* op, const FftConvParams& params, void* stream) {
  using Size = FftSize<kPoints>;
  const FftConvProblem& p = params.problem;
  launch<fft_conv_kernel<Size>>(op, dim3(p.channels, p.shares), Size::kPlan.threads(), fft_conv_shared_bytes<Size>(),
                                stream, params);
}

}  // namespace warpform
