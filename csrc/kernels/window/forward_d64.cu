#include "window/forward_launch.cuh"

namespace warpform {
template void launch_window_forward<64>(const WindowForwardParams& params, void* stream);
}  // namespace warpform
