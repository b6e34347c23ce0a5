#include "attention/step_launch.cuh"

namespace warpform {
template void launch_step_backward<128>(const AttentionStepBackwardParams& params, void* stream);
}  // namespace warpform
