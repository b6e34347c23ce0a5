// All buckets in one file: reading the headers takes as long as compiling one.
#include "window/forward_launch.cuh"

namespace warpform {
template void launch_window_forward<32>(const WindowForwardParams& params, void* stream);
template void launch_window_forward<64>(const WindowForwardParams& params, void* stream);
template void launch_window_forward<128>(const WindowForwardParams& params, void* stream);
}  // namespace warpform
