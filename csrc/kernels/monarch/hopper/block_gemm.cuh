// Product of [rows, groups * depth] with a block-diagonal matrix of `groups` blocks (block_gemm.cuh) on wgmma and TMA.
//
// Tile      128 x 256 or 128 x 128 outputs of one block, 64 deep (warpgroup_gemm.cuh). Weights are read as they lie,
//           [cols, depth] or [depth, cols].
// Loads     One box of x and one of the weight (of [depth, cols] one for 64 columns) a step. Both are described as
//           tensors of three dimensions, one of them the blocks: what a box reaches past a block's depth or columns
//           arrives as zeros, not as the next block's values, which may be NaN.
// Walk      As many CTAs as SMs; CTA c takes the items c, c + CTAs, .. of a list: groups fastest, then tiles of
//           columns, then of rows. CTAs that run at a time share rows of x, and the weight, in L2.
// Stores    From registers, 16 bytes a lane, while the producer loads the next item. The exchange within quads is 64
//           shuffles a thread for 128 x 256, 512 clocks of an SM; by way of shared memory (stmatrix) it would be 128
//           KiB of it, 1,024 clocks, which the other loads need.
// Bounds    As block_gemm.cuh: blocks of n x n have n / 2 FLOP a byte, so that bytes bound them below n = 370 on an
//           H200 at wgmma's 790 TFLOP/s. Floors, ns a token: 1024 wide with blocks of 64 0.95 (bytes), 4096 with blocks
//           of 1024 10.6 (FLOP). Of the latter, an item has 16 steps of 1,024 clocks and an epilogue of some 900 that
//           no product of its CTA covers: 5 %.
// Measured  not yet on a GPU.
#pragma once

#include "device/block_tile.cuh"
#include "device/warpgroup_gemm.cuh"
#include "monarch/launch.h"

namespace warpform {

struct BlockGemmHopperWork {
  TensorMap a;  // (depth, group, row), boxes of 64 x 1 x 128
  TensorMap b;  // (depth, col, group), boxes of 64 x kN x 1, or (col, depth, group), boxes of 64 x 64 x 1
  BlockGemmParams p;
  int share, extra;   // items of a CTA: the first `extra` take one more
  Divisor row_items;  // items of a tile of rows
  Divisor groups;
};

template <class Tile>
struct BlockGemmItems {
  static constexpr bool kMayBeEmpty = false;
  struct Item {
    int row, group, col;  // the first row and column of the tile
    int steps;
  };

  const BlockGemmHopperWork& work;

  __device__ __forceinline__ int count() const {
    return work.share + (static_cast<int>(blockIdx.x) < work.extra ? 1 : 0);
  }
  __device__ __forceinline__ Item at(int i) const {
    const int item = static_cast<int>(blockIdx.x) + i * static_cast<int>(gridDim.x);
    const int row_tile = work.row_items.quotient(item), place = item - row_tile * work.row_items.divisor;
    const int col_tile = work.groups.quotient(place);
    return {.row = row_tile * Tile::kM,
            .group = place - col_tile * work.groups.divisor,
            .col = col_tile * Tile::kN,
            .steps = ceil_div(work.p.depth, Tile::kDepth)};
  }
};

template <class Tile>
struct BlockGemmLoad {
  static constexpr int kBoxBytes = Tile::kStageBytes;
  static constexpr bool kCopies = false;
  using Item = typename BlockGemmItems<Tile>::Item;

  const BlockGemmHopperWork& work;

  __device__ __forceinline__ void begin(const Item& /*item*/) const {}
  __device__ __forceinline__ void boxes(const Item& item, int step, typename Tile::A a, typename Tile::B b,
                                        uint32_t barrier) const {
    const int depth = step * Tile::kDepth;
    load_panels(a, work.a, barrier, depth, item.group, item.row);
    if constexpr (Tile::kMajorB == Major::kDepth) {
      load_panels(b, work.b, barrier, depth, item.col, item.group);
    } else {
      load_panels(b, work.b, barrier, item.col, depth, item.group);
    }
  }
};

template <class T, class Tile>
struct BlockGemmStore {
  using Item = typename BlockGemmItems<Tile>::Item;

  const BlockGemmParams& p;

  __device__ __forceinline__ void operator()(const Item& item, float (&acc)[1][Tile::kN / 8][4], int row) const {
    const int64_t first_row = int64_t{item.row} + row;
    if (first_row >= p.rows) return;
    const int cols = p.cols - item.col;
    const int64_t at = int64_t{item.group} * p.cols + item.col, stride = int64_t{p.groups} * p.cols;
    // Without a branch around it, of whose two sides the compiler would make two epilogues.
    add_bias(acc, static_cast<const T*>(p.bias) + at, p.bias != nullptr ? cols : 0);
    write_accumulators<T>(acc, static_cast<T*>(p.c) + first_row * stride + at, stride, p.rows - first_row, cols);
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas) block_gemm_hopper(
    const __grid_constant__ BlockGemmHopperWork work) {
  if (threadIdx.x == 0) {
    prefetch_tensor_map(work.a);
    prefetch_tensor_map(work.b);
  }
  warpgroup_gemm<T, Tile>(BlockGemmItems<Tile>{work}, BlockGemmLoad<Tile>{work}, BlockGemmStore<T, Tile>{work.p});
}

}  // namespace warpform
