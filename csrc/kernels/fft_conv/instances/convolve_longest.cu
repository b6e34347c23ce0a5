#include "fft_conv/convolve_launch.cuh"

namespace warpform {
template void launch_fft_conv_size<16384>(const char*, const FftConvParams&, void*);
template void launch_fft_conv_size<32768>(const char*, const FftConvParams&, void*);
}  // namespace warpform
