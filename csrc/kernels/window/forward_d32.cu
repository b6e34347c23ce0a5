#include "window/forward_launch.cuh"

namespace warpform {
template void launch_window_forward<32>(const WindowForwardParams& params, void* stream);
}  // namespace warpform
