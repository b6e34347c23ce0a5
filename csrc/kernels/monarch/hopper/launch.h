// Launch functions of the Monarch products' kernels for compute capability 9.0. They return false, without a launch,
// where a problem has to take the kernels for every GPU. hopper_unusable() is the caller's to ask.
#pragma once

#include "monarch/launch.h"

namespace warpform {

bool launch_block_gemm_hopper(const char* op, const BlockGemmParams& params, void* stream);
bool launch_monarch_hopper(const MonarchParams& params, void* stream);

}  // namespace warpform
