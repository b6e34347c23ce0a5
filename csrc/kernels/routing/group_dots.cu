// The gradient of gates where the ungated output was kept: a product for each token and group, a warp each.
//
// Bounds    4 bytes a dimension that is in use, read once.
// Measured  not yet.
#include <climits>

#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/reduce.cuh"
#include "routing/launch.h"

namespace warpform {
namespace {

constexpr int kDotThreads = 256, kDotWarps = kDotThreads / kWarpSize;

template <class T>
__global__ void __launch_bounds__(kDotThreads) group_dots(const __grid_constant__ GroupDotsParams p) {
  const int64_t pairs = p.tokens * p.num_groups;
  for (int64_t i = int64_t{blockIdx.x} * kDotWarps + warp_id(); i < pairs; i += int64_t{gridDim.x} * kDotWarps) {
    const int64_t token = i / p.num_groups;
    const int g = static_cast<int>(i - token * p.num_groups);
    float sum = 0.f;
    if (static_cast<uint64_t>(load_global(p.group_mask + token)) >> g & 1) {
      using Eight = Vec<T, 8>;
      for (int j = 8 * lane_id(); j < p.width; j += 8 * kWarpSize) {
        const auto a = load_global(reinterpret_cast<const Eight*>(static_cast<const T*>(p.a) + i * p.width + j));
        const auto b = load_global(reinterpret_cast<const Eight*>(static_cast<const T*>(p.b) + i * p.width + j));
#pragma unroll
        for (int k = 0; k < 8; ++k) sum += to_float(a[k]) * to_float(b[k]);
      }
    }
    sum = warp_reduce(sum, Sum{});
    if (lane_id() == 0) store_global(p.dots + i, sum);
  }
}

}  // namespace

void launch_group_dots(const char* op, const GroupDotsParams& p, void* stream) {
  const int64_t blocks = std::min(ceil_div(p.tokens * p.num_groups, int64_t{kDotWarps}), int64_t{16} * sm_count());
  const dim3 grid(static_cast<unsigned>(blocks));
  dispatch_half(p.dtype, [&]<class T>() { launch<group_dots<T>>(op, grid, kDotThreads, 0, stream, p); });
}

}  // namespace warpform
