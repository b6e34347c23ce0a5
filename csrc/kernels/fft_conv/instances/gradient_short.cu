#include "fft_conv/gradient_launch.cuh"

namespace warpform {
template void launch_fft_conv_gradient_size<256>(const char*, const FftConvGradientParams&, void*);
template void launch_fft_conv_gradient_size<512>(const char*, const FftConvGradientParams&, void*);
template void launch_fft_conv_gradient_size<1024>(const char*, const FftConvGradientParams&, void*);
template void launch_fft_conv_gradient_size<2048>(const char*, const FftConvGradientParams&, void*);
}  // namespace warpform
