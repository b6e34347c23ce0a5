// Copies of boxes of tensors from global to shared memory by one thread (TMA, sm_90), and the fence between them and
// plain accesses.
//
// Shared memory is read and written by threads (the generic proxy) and by bulk copies and wgmma (the asynchronous
// proxy). What a thread stored is seen by the other proxy after fence_proxy_async, by that thread, and a barrier.
#pragma once

#include "device/tensor_map.cuh"

namespace warpform {

// Copies the box whose first element has these coordinates; elements outside of the tensor arrive as zeros, and count as
// bytes like the others. `to` is 128-byte aligned, and aligned to the pattern of the swizzle (1024 bytes for k128) where
// its rows are to begin one. All bytes of the box complete on the barrier.
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x) {
  asm volatile(
      "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x)
      : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Brings the description into the cache that copies read it from.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace warpform
