#include "fft_conv/gradient_launch.cuh"

namespace warpform {
template void launch_fft_conv_gradient_size<16384>(const char*, const FftConvGradientParams&, void*);
template void launch_fft_conv_gradient_size<32768>(const char*, const FftConvGradientParams&, void*);
}  // namespace warpform
