#include "attention/backward_launch.cuh"

namespace warpform {
template void launch_backward<64>(const AttentionBackwardParams& params, void* stream);
}  // namespace warpform
