#include "attention/step_launch.cuh"

namespace warpform {
template void launch_step<64>(const AttentionStepParams& params, void* stream);
}  // namespace warpform
