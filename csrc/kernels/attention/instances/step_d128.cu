#include "attention/step_launch.cuh"

namespace warpform {
template void launch_step<128>(const AttentionStepParams& params, void* stream);
}  // namespace warpform
