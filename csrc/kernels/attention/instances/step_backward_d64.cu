#include "attention/step_launch.cuh"

namespace warpform {
template void launch_step_backward<64>(const AttentionStepBackwardParams& params, void* stream);
}  // namespace warpform
