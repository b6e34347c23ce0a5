// Pieces of products of large matrices by a CTA: tile sizes, the pipeline of cp.async, and the epilogue that stores
// accumulators.
#pragma once

#include "common/plan.h"
#include "device/mma.cuh"

namespace warpform {

// A CTA's tile of the output, the warps over it, and how far loads run ahead.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_>
struct BlockTile {
  static constexpr int kM = kM_, kN = kN_, kDepth = 64, kStages = kStages_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kThreads = kWarpsM_ * kWarpsN_ * 32;
  static constexpr int kWarpM = kM / kWarpsM_, kWarpN = kN / kWarpsN_;
  static constexpr int kStageBytes = (kM + kN) * kDepth * 2;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kCtas = 2;  // an SM, where it has the shared memory: the registers are for as many

  static __device__ __forceinline__ int warp_row() { return warp_id() / kWarpsN * kWarpM; }
  static __device__ __forceinline__ int warp_col() { return warp_id() % kWarpsN * kWarpN; }
};

// Warps of 64 x 64 read 8 fragments of 512 bytes for 32 products: 32 cycles of shared memory where mma.sync takes some
// 50. Three stages of it are 96 KiB, so that two CTAs fit an SM of Hopper, one an SM of Ampere or Ada.
using LargeTile = BlockTile<128, 128, 2, 2, 3>;
// The tile for blocks of up to 64 columns, and for problems with too few large tiles to fill the GPU.
using SmallTile = BlockTile<64, 64, 2, 2, 4>;

// For plans.
template <class Tile>
constexpr TileShape tile_shape(int splits) {
  return {.m = Tile::kM, .n = Tile::kN, .k = Tile::kDepth, .stages = Tile::kStages, .splits = splits};
}

// load(step, stage) and work(stage) for all steps, kStages - 1 loads ahead of the work. Loads are cp.async and begin in
// order; work may read what all threads loaded, and what other warps wrote to shared memory in the step before.
// meanwhile() is called once, when the first loads are in flight; work may read what it wrote.
template <int kStages, class Load, class Work, class Meanwhile>
__device__ __forceinline__ void pipeline(int steps, Load&& load, Work&& work, Meanwhile&& meanwhile) {
#pragma unroll
  for (int step = 0; step + 1 < kStages; ++step) {
    if (step < steps) load(step, step);
    cp_async_commit();  // an empty group where nothing is left, so that the waits count the same
  }
  meanwhile();
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    block_sync();  // this step has landed; all warps are done with the previous one, so its buffers may be refilled
    if (step + kStages - 1 < steps) load(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    cp_async_commit();
    work(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  cp_async_wait<0>();
}
template <int kStages, class Load, class Work>
__device__ __forceinline__ void pipeline(int steps, Load&& load, Work&& work) {
  pipeline<kStages>(steps, load, work, [] {});
}

// After it lane t of a quad has in v[i] what lane i had in v[t].
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane_id() & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = shuffle_xor(upper ? v[i] : v[i | bit], bit);
      v[i] = upper ? got : v[i];
      v[i | bit] = upper ? v[i | bit] : got;
    }
  }
}

// Adds the bias of each column, as far as cols reaches; bias points at the first one's.
template <class T, int kM, int kN>
__device__ __forceinline__ void add_bias(float (&acc)[kM][kN][4], const T* bias, int cols) {
  const int t = lane_id() % 4;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int col = 8 * n + 2 * t;
    if (col >= cols) continue;
    const auto two = load_global(reinterpret_cast<const Vec<T, 2>*>(bias + col));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] += to_float(two[e % 2]);
    }
  }
}

// Rounds a warp's accumulators to T and gives them to write(row, col, v), eight neighbours in four registers at a time:
// lanes of a quad exchange what they have of four 8-column tiles, so that each has 16 bytes of a row and the quad 64.
// No shared memory is used, which the next loads may be filling. All lanes of the warp make every call.
template <class T, int kM, int kN, class Write>
__device__ __forceinline__ void for_each_vector(const float (&acc)[kM][kN][4], Write&& write) {
  static_assert(kN % 4 == 0, "four tiles of 8 columns at a time");
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int lane = opaque_lane(), t = lane % 4;  // one row's address at a time: there are no registers for all
      const int row = 16 * m + 8 * r + lane / 4;
#pragma unroll
      for (int n = 0; n < kN; n += 4) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = pack2<T>(acc[m][n + i][2 * r], acc[m][n + i][2 * r + 1]);
        transpose_quad(v);
        write(row, 8 * (n + t), v);
      }
    }
  }
}

// Writes a warp's accumulators, rounded to T, where c points, rows `stride` elements apart, as far as rows and cols (a
// multiple of 8) reach.
template <class T, int kM, int kN>
__device__ __forceinline__ void write_accumulators(const float (&acc)[kM][kN][4], T* c, int64_t stride, int64_t rows,
                                                   int cols) {
  for_each_vector<T>(acc, [&](int row, int col, const uint32_t (&v)[4]) {
    if (row < rows && col < cols) {
      store_global(reinterpret_cast<Vec<uint32_t, 4>*>(c + row * stride + col),
                   Vec<uint32_t, 4>{{v[0], v[1], v[2], v[3]}});
    }
  });
}

}  // namespace warpform
