#include <climits>

#include "device/launch.cuh"
#include "monarch/hopper/instances.h"
#include "monarch/hopper/launch.h"

namespace warpform {
namespace {

// By counts, unmeasured. A step is 64 deep and a tile at least 128 columns wide: below 64 of either more than half of a
// product is for nothing. Where there are fewer tiles than half of the SMs, four times as many of 64 x 64 on mma.sync
// finish as soon.
bool takes(const BlockGemmParams& p) {
  constexpr int kLeast = 64, kRows = 128, kCols = 128;
  if (p.depth < kLeast || p.cols < kLeast || p.rows > INT_MAX - kRows) return false;
  return 2 * block_gemm_tiles(p, kRows, kCols) >= sm_count();
}

}  // namespace

bool launch_block_gemm_hopper(const char* op, const BlockGemmParams& params, void* stream) {
  if (!takes(params)) return false;
  return params.b_transposed ? launch_block_gemm_hopper_as<Major::kOuter>(op, params, stream)
                             : launch_block_gemm_hopper_as<Major::kDepth>(op, params, stream);
}

}  // namespace warpform
