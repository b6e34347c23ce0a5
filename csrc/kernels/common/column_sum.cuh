// The second stage of a parameter gradient: sums of float32 partial sums over the groups of rows that left them, in an
// order that groups and cols alone decide, so that the same partials give the same bits on every GPU.
//
// Tile      four columns a thread, by one of two layouts (adds_whole_columns):
//           whole: 128 threads, 512 columns; a thread adds all groups. Weight gradients: 2 to 8 groups, cols up to
//           millions. No shared memory, no barrier.
//           split: 16 warps, 32 columns; a warp's 8 lanes a group take every 64th group, and the 64 sums are added by
//           shuffles and through shared memory. LayerNorm, GELU: hundreds of groups, cols by the thousand or fewer.
// Loads     16 bytes a lane, 4 groups in flight at once; 4 bytes at a time where cols or a pointer do not allow it (the
//           other three of a sector come from L1 then). Stores of 16 bytes, or 8 of 16-bit elements.
// Bytes     4 * groups * cols read, mostly from L2, where the first stage has just put them; cols elements written.
// Bound     those bytes, where some 15 KiB of loads an SM are in flight: in the whole layout from 128 K columns on.
//           With fewer the latency of groups / 4 rounds of loads, in the split layout groups / 256.
// Measured  H100 80GB HBM3: 6 to 7 us in the whole layout for the weight gradients of a gated MLP of 768 and 3072.
#pragma once

#include "common/column_sum.h"
#include "device/memory.cuh"
#include "device/ptx.cuh"

namespace warpform {

constexpr int kColumnSumVec = 4;    // columns a thread
constexpr int kColumnSumDepth = 4;  // groups that a thread loads at once: ptxas makes two rounds of eight

constexpr int kWholeThreads = 128;
constexpr int kWholeCols = kWholeThreads * kColumnSumVec;

constexpr int kSplitWarps = 16;
constexpr int kSplitCols = 32;
constexpr int kSplitLanes = kSplitCols / kColumnSumVec;                // threads that share a group
constexpr int kSplitPlaces = kSplitWarps * (kWarpSize / kSplitLanes);  // groups at once
constexpr int kSplitBytes = kSplitWarps * kSplitCols * 4;

// Few groups need no more than two rounds of loads, and many columns fill the GPU by themselves.
constexpr bool adds_whole_columns(int64_t groups, int64_t cols) {
  return groups <= 2 * kColumnSumDepth || cols >= 1024 * groups;
}

using FourSums = Vec<float, kColumnSumVec>;

// Adds kGroups groups of the columns from `col` on, `stride` elements apart, with all loads in flight at once.
// kAligned: there are four columns, 16-byte aligned.
template <int kGroups, bool kAligned>
__device__ __forceinline__ void add_groups(FourSums& sum, const float*& from, int64_t stride, int64_t cols_left) {
  FourSums part[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const float* at = from + i * stride;
    if constexpr (kAligned) {
      part[i] = load_global(reinterpret_cast<const FourSums*>(at));
    } else {
#pragma unroll
      for (int c = 0; c < kColumnSumVec; ++c) part[i][c] = c < cols_left ? load_global(at + c) : 0.f;
    }
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
#pragma unroll
    for (int c = 0; c < kColumnSumVec; ++c) sum[c] += part[i][c];
  }
  from += kGroups * stride;
}

// Every kStep-th group from `first` on, in their order.
template <int kStep, bool kAligned>
__device__ __forceinline__ FourSums sum_groups(const ColumnSumParams& p, int64_t col, int first) {
  const float* from = p.partials + (static_cast<int64_t>(blockIdx.y) * p.groups + first) * p.cols + col;
  const int64_t stride = kStep * p.cols, cols_left = p.cols - col;
  int64_t left = first < p.groups ? ceil_div(p.groups - first, int64_t{kStep}) : 0;
  FourSums sum{};
#pragma unroll 1
  for (; left >= kColumnSumDepth; left -= kColumnSumDepth) {
    add_groups<kColumnSumDepth, kAligned>(sum, from, stride, cols_left);
  }
  static_assert(kColumnSumDepth == 4, "what is left is one of 0 to 3");
  if (left & 2) add_groups<2, kAligned>(sum, from, stride, cols_left);
  if (left & 1) add_groups<1, kAligned>(sum, from, stride, cols_left);
  return sum;
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_sums(const ColumnSumParams& p, void* out, int64_t col, const FourSums& sum) {
  T* to = static_cast<T*>(out) + col;
  Vec<T, kColumnSumVec> rounded;
#pragma unroll
  for (int c = 0; c < kColumnSumVec; ++c) rounded[c] = from_float<T>(sum[c]);
  if constexpr (kAligned) {
    store_global(reinterpret_cast<Vec<T, kColumnSumVec>*>(to), rounded);
  } else {
#pragma unroll
    for (int c = 0; c < kColumnSumVec; ++c) {
      if (col + c < p.cols) store_global(to + c, rounded[c]);
    }
  }
}

template <bool kAligned>
__device__ __forceinline__ void store_sums(const ColumnSumParams& p, int64_t col, const FourSums& sum) {
  // Indexed by a constant: an array in the parameters that is indexed at run time would be copied to the stack.
  void* out = blockIdx.y == 0 ? p.out[0] : blockIdx.y == 1 ? p.out[1] : p.out[2];
  switch (p.dtype) {
    case DType::kFloat32: return store_sums<kAligned, float>(p, out, col, sum);
    case DType::kFloat16: return store_sums<kAligned, half_t>(p, out, col, sum);
    case DType::kBFloat16: return store_sums<kAligned, bf16_t>(p, out, col, sum);
  }
}

// blockIdx.x: kWholeCols columns; blockIdx.y: which sum.
template <bool kAligned>
__global__ void __launch_bounds__(kWholeThreads) column_sum_whole(const __grid_constant__ ColumnSumParams p) {
  const int64_t col = int64_t{blockIdx.x} * kWholeCols + static_cast<int>(threadIdx.x) * kColumnSumVec;
  if (col >= p.cols) return;
  store_sums<kAligned>(p, col, sum_groups<1, kAligned>(p, col, 0));
}

// blockIdx.x: kSplitCols columns; blockIdx.y: which sum.
template <bool kAligned>
__global__ void __launch_bounds__(kSplitWarps* kWarpSize) column_sum_split(const __grid_constant__ ColumnSumParams p) {
  const int lane = lane_id() % kSplitLanes;
  const int64_t col = int64_t{blockIdx.x} * kSplitCols + lane * kColumnSumVec;
  FourSums sum{};
  if (col < p.cols) {
    sum = sum_groups<kSplitPlaces, kAligned>(p, col, static_cast<int>(threadIdx.x) / kSplitLanes);
  }
#pragma unroll
  for (int offset = kSplitLanes; offset < kWarpSize; offset *= 2) {
#pragma unroll
    for (int c = 0; c < kColumnSumVec; ++c) sum[c] += shuffle_xor(sum[c], offset);
  }
  const uint32_t shared = shared_base() + lane * static_cast<int>(sizeof(FourSums));
  if (lane_id() < kSplitLanes) store_shared(shared + warp_id() * kSplitCols * 4, sum);
  block_sync();
  if (static_cast<int>(threadIdx.x) >= kSplitLanes || col >= p.cols) return;
#pragma unroll
  for (int warp = 1; warp < kSplitWarps; ++warp) {
    const auto part = load_shared<FourSums>(shared + warp * kSplitCols * 4);
#pragma unroll
    for (int c = 0; c < kColumnSumVec; ++c) sum[c] += part[c];
  }
  store_sums<kAligned>(p, col, sum);
}

}  // namespace warpform
