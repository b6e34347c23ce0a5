// Gradient of a block-diagonal weight: dw[g] = a_g^T b_g over all rows, and dbias = the sums of a's columns.
//
// Tile      128 x 128 elements of one block by four warps of 64 x 64, or 64 x 64 by four of 32 x 32; 64 rows at a time.
// Loads     All threads copy with 16-byte cp.async, three (four) stages. Transposing ldmatrix reads both operands. The
//           sums of a's columns are a product with ones, of the warps that have the first columns of b.
// Sums      In float32. Rows are split into ranges, as many as fill the GPU, of 512 rows or more each; a range leaves a
//           partial sum and column_sum.cuh adds these in a fixed order. Partial sums are 4 m n splits bytes a block
//           twice, 2 (m + n) rows are read: with 512 rows a range at most as much again for blocks of 256 x 256.
// Bounds    As the product (block_gemm.cuh), with rows in the place of depth: 2 rows m n groups FLOP.
// Measured  H100 80GB HBM3, bfloat16, 16384 rows, 4 blocks of 1024 x 1024: 394 us, 349 TFLOP/s, tensor pipe 65 %.
#pragma once

#include "device/block_tile.cuh"
#include "monarch/launch.h"

namespace warpform {

struct WeightGradientWork {
  WeightGradientParams p;
  int64_t range;  // rows of a split, a multiple of Tile::kDepth
  int tiles_m;
  int tiles_n;
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas) block_weight_gradient(
    const __grid_constant__ WeightGradientWork work) {
  constexpr int kWarpM = Tile::kWarpM / 16, kWarpN = Tile::kWarpN / 8, kDepth = Tile::kDepth;
  const WeightGradientParams& p = work.p;
  using TileA = SharedTile<Tile::kM>;
  using TileB = SharedTile<Tile::kN>;
  const auto tile_a = [](int stage) { return TileA{shared_base() + stage * Tile::kStageBytes}; };
  const auto tile_b = [](int stage) { return TileB{shared_base() + stage * Tile::kStageBytes + TileA::bytes(kDepth)}; };

  // CTAs of one range and group are neighbours: its rows stay in L2.
  int block = static_cast<int>(blockIdx.x);
  const int tile_n = block % work.tiles_n;
  block /= work.tiles_n;
  const int tile_m = block % work.tiles_m;
  block /= work.tiles_m;
  const int group = block % p.groups, split = block / p.groups;
  const int first_m = tile_m * Tile::kM, first_n = tile_n * Tile::kN;
  const int64_t first_row = split * work.range;
  const int64_t rows = min(work.range, p.rows - first_row);
  const int steps = static_cast<int>(ceil_div(max(rows, int64_t{0}), int64_t{kDepth}));

  const int warp_m = Tile::warp_row(), warp_n = Tile::warp_col();
  // Sums of a's columns: neighbouring warps, which read the same ones, take a part of them each.
  constexpr int kSums = kWarpM / Tile::kWarpsN;
  const int sums_part = p.dbias != nullptr && tile_n == 0 ? warp_n / Tile::kWarpN : -1;
  const uint32_t ones = pack2<T>(1.f, 1.f);
  float acc[kWarpM][kWarpN][4] = {};
  float sums[kSums][4] = {};
  const auto load = [&](int step, int stage) {
    const int64_t row = first_row + int64_t{step} * kDepth;
    const int count = static_cast<int>(min(first_row + rows - row, int64_t{kDepth}));
    const T* a = static_cast<const T*>(p.a) + row * p.a_stride + int64_t{group} * p.m + first_m;
    const T* b = static_cast<const T*>(p.b) + row * p.b_stride + int64_t{group} * p.n + first_n;
    copy_tile_async<kDepth, Tile::kM, Tile::kThreads>(tile_a(stage), a, p.a_stride, count, p.m - first_m);
    copy_tile_async<kDepth, Tile::kN, Tile::kThreads>(tile_b(stage), b, p.b_stride, count, p.n - first_n);
  };
  pipeline<Tile::kStages>(steps, load, [&](int stage) {
    const uint32_t lane = opaque(lane_offset_quarters<Tile::kM>());
    mma_ab<T, kDepth / 16>(
        acc,
        [&](int m, int step, uint32_t (&a)[4]) {
          load_a_transposed(a, tile_a(stage), lane, 16 * step, warp_m + 16 * m);
          if (m / kSums == sums_part) mma_m16n8k16<T>(sums[m % kSums], a, ones, ones);
        },
        tile_b(stage), 0, warp_n, Tile::kN);
  });

  const int left_m = p.m - first_m - warp_m, left_n = p.n - first_n - warp_n;
  const int64_t at = (int64_t{group} * p.m + first_m + warp_m) * p.n + first_n + warp_n;
  const int lane = opaque_lane(), g = lane / 4, t = lane % 4;
  if (p.splits == 1) {
    write_accumulators<T>(acc, static_cast<T*>(p.dw) + at, p.n, left_m, left_n);
  } else {
    float* dw = p.dw_partials + int64_t{split} * p.groups * p.m * p.n + at;
#pragma unroll
    for (int m = 0; m < kWarpM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int lane_again = opaque_lane();  // one row's address at a time: there are no registers for all
        const int row = 16 * m + 8 * r + lane_again / 4;
        const int col = lane_again % 4 * 2;
        float* to = dw + int64_t{row} * p.n + col;
#pragma unroll
        for (int n = 0; n < kWarpN; ++n) {
          if (row < left_m && col + 8 * n < left_n) {
            store_global(reinterpret_cast<Vec<float, 2>*>(to + 8 * n),
                         Vec<float, 2>{{acc[m][n][2 * r], acc[m][n][2 * r + 1]}});
          }
        }
      }
    }
  }
  if (sums_part < 0 || t != 0) return;
#pragma unroll
  for (int m = 0; m < kSums; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * (sums_part * kSums + m) + 8 * r + g;
      if (row >= left_m) continue;
      const int64_t col = int64_t{group} * p.m + first_m + warp_m + row;
      if (p.splits == 1) {
        store_global(static_cast<T*>(p.dbias) + col, from_float<T>(sums[m][2 * r]));
      } else {
        store_global(p.dbias_partials + int64_t{split} * p.groups * p.m + col, sums[m][2 * r]);
      }
    }
  }
}

}  // namespace warpform
