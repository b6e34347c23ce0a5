// Gradient of the bias table from sums of the scores' gradients, [shares, heads, N, N]: an entry is a difference of two
// places, so its gradient is the sum along a diagonal of the N x N pairs, over all shares.
//
// Tile      32 neighbouring entries of one head a CTA, a lane each: lanes read neighbouring keys. A line is the queries
//           of one share that differ in their last axis only; warp w of 16 takes lines w, w + 16, ... of all shares.
//           The warps' sums are added in their order: the same partial sums give the same bits.
// Bounds    4 N^2 bytes a share and head, mostly from L2, where the previous kernels have just put them.
// Measured  H100 80GB HBM3, windows of 7 x 7, 3 heads: 77 us, 1.5 % of the memory's rate; few CTAs and latency bound
//           it.
#pragma once

#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "window/launch.h"

namespace warpform {

constexpr int kTableGradientWarps = 16;
constexpr int kTableGradientBytes = kTableGradientWarps * kWarpSize * 4;

template <class T>
__global__ void __launch_bounds__(kTableGradientWarps* kWarpSize) window_attention_table_gradient(
    const __grid_constant__ WindowBackwardParams params) {
  const WindowProblem& p = params.problem;
  const int entry = static_cast<int>(blockIdx.x) * kWarpSize + lane_id(), head = static_cast<int>(blockIdx.y);
  const int w0 = p.window[0], w1 = p.window[1], w2 = p.window[2], tokens = p.tokens;
  // Query minus key, per axis.
  const int stride1 = 2 * w2 - 1, stride0 = stride1 * (2 * w1 - 1);
  const int apart0 = entry / stride0 - (w0 - 1), apart1 = entry % stride0 / stride1 - (w1 - 1);
  const int apart2 = entry % stride1 - (w2 - 1);
  const int first = max(apart2, 0), last = min(w2, w2 + apart2);  // queries of a line whose keys are in the window

  float sum = 0.f;
  const int64_t lines = static_cast<int64_t>(params.table_shares) * w0 * w1;
  for (int64_t line = warp_id(); line < lines; line += kTableGradientWarps) {
    const int i1 = static_cast<int>(line % w1), i0 = static_cast<int>(line / w1 % w0);
    const int j1 = i1 - apart1, j0 = i0 - apart0;
    if (entry >= p.table_entries || j1 < 0 || j1 >= w1 || j0 < 0 || j0 >= w0) continue;
    const int64_t i = static_cast<int64_t>(i0 * w1 + i1) * w2, j = (j0 * w1 + j1) * w2 - apart2;
    const float* from = params.table_sums + ((line / w1 / w0 * p.heads + head) * tokens + i) * tokens + j;
#pragma unroll 4
    for (int k = first; k < last; ++k) sum += load_global(from + static_cast<int64_t>(k) * (tokens + 1));
  }
  const uint32_t shared = shared_base() + lane_id() * 4;
  store_shared(shared + warp_id() * kWarpSize * 4, sum);
  block_sync();
  if (warp_id() != 0 || entry >= p.table_entries) return;
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < kTableGradientWarps; ++w) sum += load_shared<float>(shared + w * kWarpSize * 4);
  store_global(static_cast<T*>(params.dtable) + static_cast<int64_t>(entry) * p.heads + head, from_float<T>(sum));
}

}  // namespace warpform
