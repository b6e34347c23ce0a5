#include "fft_conv/convolve_launch.cuh"

namespace warpform {
template void launch_fft_conv_size<4096>(const char*, const FftConvParams&, void*);
template void launch_fft_conv_size<8192>(const char*, const FftConvParams&, void*);
}  // namespace warpform
