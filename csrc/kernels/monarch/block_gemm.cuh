// Product of [rows, groups * depth] with a block-diagonal matrix of `groups` blocks, stored [cols, depth] or, for the
// gradient of the left factor, [depth, cols]: the same weight is read either way, no copy of it is transposed.
//
// Tile      128 x 128 outputs of one block by four warps of 64 x 64, or 64 x 64 by four of 32 x 32; 64 deep.
// Loads     All threads copy with 16-byte cp.async, three (four) stages; a CTA walks over several (block, column tile)
//           items where blocks are shallow, and loads the next one's operands while it still works on one.
// Stores    From registers, 16 bytes a lane (block_tile.cuh).
// Bounds    2 rows depth cols groups FLOP against 2 rows (depth + cols) groups bytes: a block of n x n has n / 2 FLOP a
//           byte, so that bytes bound it below n = 230 on an H200 at mma.sync's 490 TFLOP/s. Floors, ns a token: 1024
//           wide with blocks of 32 0.95 (bytes), 4096 with blocks of 1024 17 (FLOP; mma.sync).
// Measured  H100 80GB HBM3, bfloat16, 16384 rows, 4 blocks of 1024 x 1024: 341 us, 403 TFLOP/s, 51 % of the floor.
#pragma once

#include "device/block_tile.cuh"
#include "monarch/launch.h"

namespace warpform {

struct BlockGemmWork {
  BlockGemmParams p;
  int items;     // (column tile, group) pairs, groups fastest
  int share;     // items of a CTA
  Divisor ctas;  // of a tile of rows; they are neighbours, so that its rows stay in L2
};

// The place of a CTA: the group, the first column and the first depth of a step.
template <class Tile>
struct BlockGemmStep {
  int group, col, depth;

  __device__ __forceinline__ void advance(const BlockGemmParams& p) {
    depth += Tile::kDepth;
    if (depth < p.depth) return;
    depth = 0;
    if (++group < p.groups) return;
    group = 0;
    col += Tile::kN;
  }
};

template <class T, class Tile, bool kTransposed>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas) block_gemm(const __grid_constant__ BlockGemmWork work) {
  constexpr int kWarpM = Tile::kWarpM / 16, kWarpN = Tile::kWarpN / 8, kDepth = Tile::kDepth;
  const BlockGemmParams& p = work.p;
  using TileA = SharedTile<kDepth>;
  using TileB = SharedTile<kTransposed ? Tile::kN : kDepth>;
  const auto tile_a = [](int stage) { return TileA{shared_base() + stage * Tile::kStageBytes}; };
  const auto tile_b = [](int stage) {
    return TileB{shared_base() + stage * Tile::kStageBytes + TileA::bytes(Tile::kM)};
  };

  const int block = static_cast<int>(blockIdx.x);
  const int row_tile = work.ctas.quotient(block);
  const int64_t first_row = static_cast<int64_t>(row_tile) * Tile::kM;
  const int rows = static_cast<int>(min(p.rows - first_row, static_cast<int64_t>(Tile::kM)));
  const int first_item = (block - row_tile * work.ctas.divisor) * work.share;
  const int steps =
      min(work.share, work.items - first_item) * max(1, (p.depth + kDepth - 1) / kDepth);  // no depth: zeros
  BlockGemmStep<Tile> now{first_item % p.groups, first_item / p.groups * Tile::kN, 0};
  BlockGemmStep<Tile> ahead = now;

  const auto load = [&](int /*step*/, int stage) {
    const T* a = static_cast<const T*>(p.a) + first_row * p.a_stride + int64_t{ahead.group} * p.depth + ahead.depth;
    copy_tile_async<Tile::kM, kDepth, Tile::kThreads>(tile_a(stage), a, p.a_stride, rows, p.depth - ahead.depth);
    const T* b = static_cast<const T*>(p.b) + int64_t{ahead.group} * p.depth * p.cols;
    if constexpr (kTransposed) {
      b += int64_t{ahead.depth} * p.cols + ahead.col;
      copy_tile_async<kDepth, Tile::kN, Tile::kThreads>(tile_b(stage), b, p.cols, p.depth - ahead.depth,
                                                        p.cols - ahead.col);
    } else {
      b += int64_t{ahead.col} * p.depth + ahead.depth;
      copy_tile_async<Tile::kN, kDepth, Tile::kThreads>(tile_b(stage), b, p.depth, p.cols - ahead.col,
                                                        p.depth - ahead.depth);
    }
    ahead.advance(p);
  };
  const int warp_row = Tile::warp_row(), warp_col = Tile::warp_col();
  float acc[kWarpM][kWarpN][4] = {};
  pipeline<Tile::kStages>(steps, load, [&](int stage) {
    const auto multiply = [&]<int kSteps>() {
      if constexpr (kTransposed) {
        const uint32_t lane = opaque(lane_offset_halves<kDepth>());
        mma_ab<T, kSteps>(
            acc, [&](int m, int k, uint32_t (&a)[4]) { load_a(a, tile_a(stage), lane, warp_row + 16 * m, 16 * k); },
            tile_b(stage), 0, warp_col, Tile::kN);
      } else {
        mma_abt<T, 16 * kSteps>(acc, tile_a(stage), warp_row, tile_b(stage), warp_col, kDepth);
      }
    };
    if (p.depth - now.depth > kDepth / 2) {
      multiply.template operator()<kDepth / 16>();
    } else {
      multiply.template operator()<kDepth / 32>();  // blocks of 32, and tails
    }
    if (now.depth + kDepth >= p.depth) {
      const int first_col = now.col + warp_col;
      const int64_t at = int64_t{now.group} * p.cols + first_col;
      if (p.bias != nullptr) add_bias(acc, static_cast<const T*>(p.bias) + at, p.cols - first_col);
      const int64_t c_stride = int64_t{p.groups} * p.cols;
      write_accumulators<T>(acc, static_cast<T*>(p.c) + (first_row + warp_row) * c_stride + at, c_stride,
                            rows - warp_row, p.cols - first_col);
      for_each_accumulator<kWarpM, kWarpN>([&](int m, int n, int e) { acc[m][n][e] = 0.f; });
    }
    now.advance(p);
  });
}

}  // namespace warpform
