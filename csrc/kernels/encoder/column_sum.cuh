// The second stage of a parameter gradient: sums of float32 partial sums over the groups of rows that left them, in a
// fixed order, so that the same partials give the same bits. A block owns 32 columns; its 16 warps take every 16th
// group each and are added through shared memory. Bytes: 4 * groups * cols read, mostly from L2, where the first stage
// has just put them. Not measured on hardware yet.
#pragma once

#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "kernels/dtype.h"

namespace warpform {

constexpr int kColumnSumWarps = 16;

struct ColumnSumParams {
  const float* partials;  // [sums, groups, cols]
  void* out[3];           // `sums` of them, [cols]
  int sums;
  int64_t groups;  // 0 gives zeros
  int64_t cols;
  DType dtype;  // of out
};

// blockIdx.x: 32 columns; blockIdx.y: which sum.
static __global__ void __launch_bounds__(kColumnSumWarps* kWarpSize) column_sum_kernel(const ColumnSumParams p) {
  const int64_t col = int64_t{blockIdx.x} * kWarpSize + lane_id();
  const float* partials = p.partials + static_cast<int64_t>(blockIdx.y) * p.groups * p.cols;
  float sum = 0;
  if (col < p.cols) {
#pragma unroll 4
    for (int64_t g = warp_id(); g < p.groups; g += kColumnSumWarps) sum += load_global(partials + g * p.cols + col);
  }
  const uint32_t shared = shared_base() + lane_id() * 4;
  store_shared(shared + warp_id() * kWarpSize * 4, sum);
  block_sync();
  if (warp_id() != 0 || col >= p.cols) return;
  sum = 0;
#pragma unroll
  for (int w = 0; w < kColumnSumWarps; ++w) sum += load_shared<float>(shared + w * kWarpSize * 4);
  // Indexed by a constant: an array in the parameters that is indexed at run time would be copied to the stack.
  void* out = blockIdx.y == 0 ? p.out[0] : blockIdx.y == 1 ? p.out[1] : p.out[2];
  switch (p.dtype) {
    case DType::kFloat32: return store_global(static_cast<float*>(out) + col, sum);
    case DType::kFloat16: return store_global(static_cast<half_t*>(out) + col, from_float<half_t>(sum));
    case DType::kBFloat16: return store_global(static_cast<bf16_t*>(out) + col, from_float<bf16_t>(sum));
  }
}

inline void launch_column_sum(const char* op, const ColumnSumParams& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.cols, int64_t{kWarpSize})), static_cast<unsigned>(p.sums));
  launch<column_sum_kernel>(op, grid, kColumnSumWarps * kWarpSize, kColumnSumWarps * kWarpSize * 4, stream, p);
}

}  // namespace warpform
