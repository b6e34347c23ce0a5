#include "window/backward_launch.cuh"

namespace warpform {
template void launch_window_backward<32>(const WindowBackwardParams& params, void* stream);
}  // namespace warpform
