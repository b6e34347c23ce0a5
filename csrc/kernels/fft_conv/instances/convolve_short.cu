#include "fft_conv/convolve_launch.cuh"

namespace warpform {
template void launch_fft_conv_size<256>(const char*, const FftConvParams&, void*);
template void launch_fft_conv_size<512>(const char*, const FftConvParams&, void*);
template void launch_fft_conv_size<1024>(const char*, const FftConvParams&, void*);
template void launch_fft_conv_size<2048>(const char*, const FftConvParams&, void*);
}  // namespace warpform
