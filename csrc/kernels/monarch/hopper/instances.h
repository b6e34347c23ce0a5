// What is compiled in files of its own (instances/): block_gemm_hopper for each layout of the weight.
#pragma once

#include "device/types.cuh"
#include "device/wgmma.cuh"
#include "monarch/launch.h"

namespace warpform {

template <Major kMajorB>
bool launch_block_gemm_hopper_as(const char* op, const BlockGemmParams& params, void* stream);

inline int64_t block_gemm_tiles(const BlockGemmParams& p, int rows, int cols) {
  return ceil_div(p.rows, int64_t{rows}) * ceil_div(p.cols, cols) * p.groups;
}

}  // namespace warpform
