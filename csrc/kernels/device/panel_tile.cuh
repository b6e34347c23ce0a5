// Tiles in shared memory as TMA brings them and wgmma reads them, products of such tiles by a warpgroup, and rings of
// them between a producer and its consumers (sm_90a).
//
// A PanelTile holds 16-bit elements in panels of 64 columns, and a panel its rows of 128 bytes one behind the other with
// the 128-byte swizzle: the layout of SharedTile<64>, whose accesses serve a panel too.
#pragma once

#include "device/bulk.cuh"
#include "device/mbarrier.cuh"
#include "device/mma.cuh"
#include "device/wgmma.cuh"

namespace warpform {

template <int kRows_, int kCols_>
struct PanelTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kPanels = kCols / kPanel;
  static_assert(kRows % 8 == 0 && kCols % kPanel == 0, "whole patterns of the swizzle");
  static constexpr int kPanelBytes = kRows * 128, kBytes = kPanels * kPanelBytes;

  uint32_t base;  // 1024-byte aligned

  __device__ __forceinline__ SharedTile<kPanel> panel(int i) const { return {base + i * kPanelBytes}; }

  // An operand of wgmma whose outer dimension are the rows from `row` (a multiple of 8) on, and whose depth are the 16
  // columns from `col` (a multiple of 16) on.
  __device__ __forceinline__ uint64_t rows_by_depth(int row, int col) const {
    const uint32_t address = base + col / kPanel * kPanelBytes + row * 128 + col % kPanel * 2;
    return wgmma_descriptor(address, 16, 1024, Swizzle::k128);
  }
  // An operand whose depth are the 16 rows from `row` (a multiple of 8) on, and whose outer dimension are the columns from
  // `col` (a multiple of 64) on.
  __device__ __forceinline__ uint64_t depth_by_columns(int row, int col) const {
    return wgmma_descriptor(base + col / kPanel * kPanelBytes + row * 128, kPanelBytes, 1024, Swizzle::k128);
  }
};

// Brings kRows rows from `row` on of a matrix or of a head, as many columns as the tile has from `col` on. The map's box
// is (64, kRows) or (64, 1, kRows). One thread calls it, and announces kBytes.
template <int kRows, int kCols, class... Rest>
__device__ __forceinline__ void load_panels(PanelTile<kRows, kCols> tile, const TensorMap& map, uint32_t barrier,
                                            int col, Rest... rest) {
#pragma unroll
  for (int i = 0; i < kCols / kPanel; ++i)
    tma_load(tile.base + i * tile.kPanelBytes, map, barrier, col + i * kPanel, rest...);
}

// acc[64 x kN] = A B^T, or += where `accumulate`, over kDepth columns of both: 64 rows from `row_a` on of a, kN from
// `row_b` on of b. Issues the products only.
template <class T, int kDepth, int kN, int kRowsA, int kColsA, int kRowsB, int kColsB>
__device__ __forceinline__ void warpgroup_abt(float (&acc)[kN][4], PanelTile<kRowsA, kColsA> a, int row_a,
                                              PanelTile<kRowsB, kColsB> b, int row_b, bool accumulate) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    wgmma<T, 8 * kN>(acc, a.rows_by_depth(row_a, k), b.rows_by_depth(row_b, k), accumulate || k > 0);
  }
}

// acc[64 x kN] = A B, or += where `accumulate`: A [64, 16 kSteps] from registers (pack_accumulators), B's 16 kSteps rows
// from `row` on and its columns from `col` on. Issues the products only.
template <class T, int kSteps, int kN, int kRows, int kCols>
__device__ __forceinline__ void warpgroup_ab(float (&acc)[kN][4], const uint32_t (&a)[kSteps][4],
                                             PanelTile<kRows, kCols> b, int row, int col, bool accumulate) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma<T, 8 * kN, Major::kOuter>(acc, a[step], b.depth_by_columns(row + 16 * step, col), accumulate || step > 0);
  }
}

// Buffers between a producer and its consumers: a barrier for each that says it is full, and one that says it is empty.
template <int kStages>
struct Ring {
  static constexpr int kBytes = 2 * kStages * kBarrierBytes;

  uint32_t barriers;  // 8-byte aligned

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + stage * kBarrierBytes; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + (kStages + stage) * kBarrierBytes; }
  // One thread calls it; the fence and the block's barrier are the caller's. The numbers are those of arrivals.
  __device__ __forceinline__ void init(int producers, int consumers) const {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full(stage), producers);
      mbarrier_init(empty(stage), consumers);
    }
  }
};

// The place of a producer or of a consumer in a ring.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  // The producer waits until the consumers have emptied the stage; the consumers until the producer has filled it.
  __device__ __forceinline__ void wait_empty(Ring<kStages> ring) const { mbarrier_wait(ring.empty(stage), parity ^ 1); }
  __device__ __forceinline__ void wait_full(Ring<kStages> ring) const { mbarrier_wait(ring.full(stage), parity); }
};

}  // namespace warpform
