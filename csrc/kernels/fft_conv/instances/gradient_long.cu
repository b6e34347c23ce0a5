#include "fft_conv/gradient_launch.cuh"

namespace warpform {
template void launch_fft_conv_gradient_size<4096>(const char*, const FftConvGradientParams&, void*);
template void launch_fft_conv_gradient_size<8192>(const char*, const FftConvGradientParams&, void*);
}  // namespace warpform
