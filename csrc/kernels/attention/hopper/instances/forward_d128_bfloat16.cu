#include "attention/hopper/forward_launch.cuh"

namespace warpform {
template bool launch_forward_hopper<128, bf16_t>(const AttentionForwardParams& params, void* stream);
}  // namespace warpform
