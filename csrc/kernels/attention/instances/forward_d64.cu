#include "attention/forward_launch.cuh"

namespace warpform {
template void launch_forward<64>(const AttentionForwardParams& params, void* stream);
}  // namespace warpform
