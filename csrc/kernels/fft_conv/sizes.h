// The kernels are compiled a few sizes at a time, so that the build runs in parallel; launch.cu chooses among them.
#pragma once

#include "fft_conv/launch.h"

namespace warpform {

template <int kPoints>
struct FftSize {
  static constexpr FftPlan kPlan = fft_plan(kPoints);
};

template <int kPoints>
void launch_fft_conv_size(const char* op, const FftConvParams& params, void* stream);
template <int kPoints>
void launch_fft_conv_gradient_size(const char* op, const FftConvGradientParams& params, void* stream);

}  // namespace warpform
