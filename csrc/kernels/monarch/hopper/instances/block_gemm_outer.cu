#include "monarch/hopper/block_gemm_launch.cuh"

namespace warpform {
template bool launch_block_gemm_hopper_as<Major::kOuter>(const char* op, const BlockGemmParams& params, void* stream);
}  // namespace warpform
