// Instantiation of the spectrum's gradient for some sizes.
#pragma once

#include "device/launch.cuh"
#include "fft_conv/gradient.cuh"
#include "fft_conv/sizes.h"

namespace warpform {

template <int kPoints>
void launch_fft_conv_gradient_size(const char* op, const FftConvGradientParams& params, void* stream) {
  using Size = FftSize<kPoints>;
  const FftConvProblem& p = params.problem;
  launch<fft_conv_gradient_kernel<Size>>(op, dim3(p.channels, p.shares), Size::kPlan.threads(),
                                         fft_conv_gradient_shared_bytes<Size>(), stream, params);
}

}  // namespace warpform
