// _wgmma_product: out[64, 64] = A[64, depth] B[depth, 64] by one warpgroup, for every layout of the operands that wgmma
// reads. A test: the first thing to run on a GPU of compute capability 9.0, as descriptors and swizzles are read from
// documentation.
//
// Tile      64 x 64 x 16 an instruction, depth / 16 of them into the same accumulators; one block of 128 threads.
// Layouts   An operand lies in panels: rows of `span` bytes one behind the other (16 bytes without a swizzle, else 32, 64
//           or 128), which is what one TMA box brings. Contiguous along the depth, a row is an index of the outer
//           dimension, and a panel has 64 of them; contiguous along the outer dimension, a row is an index of the depth.
// Loads     One thread issues a box for each panel, all on one mbarrier. Or all threads store 16 bytes at a time at
//           swizzled addresses, and a proxy fence hands them over. A in registers comes from global memory, 4 bytes at a
//           time.
// Bounds    Nothing that matters: 2^19 FLOP, at most 32 KiB.
// Measured  Not yet on a GPU.
#pragma once

#include "device/bulk.cuh"
#include "device/mbarrier.cuh"
#include "device/memory.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"
#include "wgmma_product/launch.h"

namespace warpform {

struct WgmmaProduct {
  TensorMap a_map, b_map;  // unused where threads store, and of a where it is in registers
  WgmmaProductParams p;
};

constexpr int kProductTileBytes = kProductRows * kProductMaxDepth * 2;
constexpr int kProductSharedBytes = 2 * kProductTileBytes + kBarrierBytes;

// An operand in shared memory; both have 64 indices of the outer dimension.
template <Major kMajor>
struct ProductOperand {
  static constexpr int kOuterSize = 64;

  uint32_t base;  // 1024-byte aligned
  int depth;
  int span;

  __device__ __forceinline__ int rows() const { return kMajor == Major::kDepth ? kOuterSize : depth; }
  // Elements of the dimension along which a row runs.
  __device__ __forceinline__ int cols() const { return kMajor == Major::kDepth ? depth : kOuterSize; }
  __device__ __forceinline__ int panels() const { return (cols() * 2 + span - 1) / span; }
  __device__ __forceinline__ int panel_bytes() const { return rows() * span; }
  __device__ __forceinline__ int bytes() const { return panels() * panel_bytes(); }
  __device__ __forceinline__ Swizzle swizzle() const {
    return span == 128 ? Swizzle::k128 : span == 64 ? Swizzle::k64 : span == 32 ? Swizzle::k32 : Swizzle::kNone;
  }

  // One thread calls it, and announces bytes().
  __device__ __forceinline__ void load(const TensorMap& map, uint32_t barrier) const {
#pragma unroll 1
    for (int i = 0; i < panels(); ++i) tma_load(base + i * panel_bytes(), map, barrier, i * span / 2, 0);
  }

  // All threads of the block store what load() brings, zeros past the last column.
  template <class T>
  __device__ __forceinline__ void store(const T* from) const {
    const int chunks = span / 16;  // of a row
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < panels() * rows() * chunks; i += kWarpgroupSize) {
      const int panel = i / (rows() * chunks), row = i / chunks % rows(), chunk = i % chunks;
      const int col = panel * span / 2 + chunk * 8;
      Vec<uint32_t, 4> v{{0, 0, 0, 0}};
      if (col < cols()) v = load_global(reinterpret_cast<const Vec<uint32_t, 4>*>(from + row * cols() + col));
      const uint32_t linear = panel * panel_bytes() + row * span + chunk * 16;
      store_shared(base + (linear ^ (linear >> 3 & static_cast<uint32_t>(span - 16))), v);
    }
  }

  // The 16 of the depth from 16 step on.
  __device__ __forceinline__ uint64_t descriptor(int step) const {
    constexpr int kEight = 8;
    if constexpr (kMajor == Major::kDepth) {
      const int byte = step * 32;
      if (span == 16) return wgmma_descriptor(base + byte / 16 * panel_bytes(), panel_bytes(), kEight * 16, swizzle());
      return wgmma_descriptor(base + byte / span * panel_bytes() + byte % span, 16, kEight * span, swizzle());
    } else {
      const uint32_t address = base + step * 16 * span;
      if (span == 16) return wgmma_descriptor(address, kEight * 16, panel_bytes(), swizzle());
      return wgmma_descriptor(address, panel_bytes(), kEight * span, swizzle());
    }
  }
};

// A's fragment of the 16 columns from 16 step on, of this warp's 16 rows.
template <class T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* from, int depth, int step) {
  const T* at = from + (warp_id() * 16 + lane_id() / 4) * depth + step * 16 + lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = load_global(reinterpret_cast<const uint32_t*>(at + i % 2 * 8 * depth + i / 2 * 8));
}

// acc = the product over 16 kSteps of the depth.
template <class T, ProductLeft kLeft, int kSteps, Major kA, Major kB>
__device__ __forceinline__ void multiply(float (&acc)[kProductCols / 8][4], const T* left, const ProductOperand<kA>& a,
                                         const ProductOperand<kB>& b) {
#pragma unroll
  for (int n = 0; n < kProductCols / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0;
  }
  // Straight code, and no branch from the fence on: at each ptxas would add a fence of its own.
  uint64_t descriptor_b[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) descriptor_b[step] = b.descriptor(step);
  if constexpr (kLeft == ProductLeft::kRegisters) {
    uint32_t fragments[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_left(fragments[step], left, b.depth, step);
    wgmma_fence(acc, fragments);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma<T, kProductCols, kB>(acc, fragments[step], descriptor_b[step], step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>(acc, fragments);
  } else {
    uint64_t descriptor_a[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) descriptor_a[step] = a.descriptor(step);
    wgmma_fence(acc);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma<T, kProductCols, kA, kB>(acc, descriptor_a[step], descriptor_b[step], step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>(acc);
  }
}

template <class T, ProductLeft kLeft, Major kB>
__global__ void __launch_bounds__(kWarpgroupSize) wgmma_product_hopper(const __grid_constant__ WgmmaProduct g) {
  constexpr bool kRegisters = kLeft == ProductLeft::kRegisters;
  constexpr Major kA = kLeft == ProductLeft::kOuter ? Major::kOuter : Major::kDepth;
  const WgmmaProductParams& p = g.p;
  const ProductOperand<kA> a{shared_base(), p.depth, p.span};
  const ProductOperand<kB> b{shared_base() + kProductTileBytes, p.depth, p.span};
  const T* const left = static_cast<const T*>(p.a);

  if (p.by_stores) {
    if constexpr (!kRegisters) a.store(left);
    b.store(static_cast<const T*>(p.b));
    fence_proxy_async();
    block_sync();
  } else {
    const uint32_t barrier = shared_base() + 2 * kProductTileBytes;
    if (threadIdx.x == 0) {
      mbarrier_init(barrier, 1);
      fence_mbarrier_init();
    }
    block_sync();
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barrier, (kRegisters ? 0 : a.bytes()) + b.bytes());
      if constexpr (!kRegisters) a.load(g.a_map, barrier);
      b.load(g.b_map, barrier);
    }
    mbarrier_wait(barrier, 0);
  }

  float acc[kProductCols / 8][4];
  switch (p.depth / 16) {
    case 1: multiply<T, kLeft, 1>(acc, left, a, b); break;
    case 2: multiply<T, kLeft, 2>(acc, left, a, b); break;
    case 3: multiply<T, kLeft, 3>(acc, left, a, b); break;
    default: multiply<T, kLeft, 4>(acc, left, a, b); break;
  }

  const int row = warp_id() * 16 + lane_id() / 4, col = lane_id() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kProductCols / 8; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      store_global(reinterpret_cast<Vec<float, 2>*>(p.out + (row + 8 * r) * kProductCols + 8 * n + col),
                   Vec<float, 2>{{acc[n][2 * r], acc[n][2 * r + 1]}});
    }
  }
}

}  // namespace warpform
