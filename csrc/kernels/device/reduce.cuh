// Reductions over the lanes of a warp and the warps of a block, in a fixed order: repeatable bit for bit.
#pragma once

#include "device/memory.cuh"
#include "device/ptx.cuh"

namespace warpform {

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Every group of kWidth neighbouring lanes gets its own result, in all its lanes.
template <int kWidth = kWarpSize, class T, class Op>
__device__ __forceinline__ T warp_reduce(T v, Op op) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) v = op(v, shuffle_xor(v, offset));
  return v;
}

// All kThreads threads get the result. `scratch` is the shared address of kThreads / 32 values of T that nothing else
// uses until the next barrier after this call.
template <int kThreads, class T, class Op>
__device__ __forceinline__ T block_reduce(T v, Op op, uint32_t scratch) {
  constexpr int kWarps = kThreads / kWarpSize;
  v = warp_reduce(v, op);
  if constexpr (kWarps == 1) return v;
  if (lane_id() == 0) store_shared<T>(scratch + warp_id() * static_cast<int>(sizeof(T)), v);
  block_sync();
  T total = load_shared<T>(scratch);
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total = op(total, load_shared<T>(scratch + w * static_cast<int>(sizeof(T))));
  return total;
}

}  // namespace warpform
