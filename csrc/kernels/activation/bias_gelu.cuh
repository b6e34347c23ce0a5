// GELU(x + bias), forward and backward, elementwise over [rows, cols] with bias [cols].
//
// Tile      A block of 256 threads is a tile of `width` threads across (a power of two), each with kVec neighbouring
//           columns, by 256 / width rows. A thread stays in its columns while it walks down the rows, so it reads its
//           bias once and, backward, adds up its columns' gradients in registers. A block leaves one float32 partial
//           sum a column, which column_sum.cuh adds up.
// Loads     16 bytes a lane straight to registers, kGeluRows rows in flight.
// Bounds    2 (forward) or 3 (backward) times rows * cols * sizeof(T) bytes, once each. Memory bandwidth bounds it, but
//           not by much: erff takes some 25 float32 operations, and an H200 has about 24 for each float16 element of
//           the forward pass in the time that its 4 bytes take; the tanh form takes 10.
// Measured  H100 80GB HBM3, bfloat16, 9531 x 3072: forward 50.7 us, 2311 GB/s, 77 % of the floor; backward 75.8 us,
//           2319 GB/s, 77 %.
#pragma once

#include "activation/launch.h"
#include "common/elements.cuh"
#include "common/gelu.cuh"
#include "device/ptx.cuh"

namespace warpform {

constexpr int kGeluThreads = 256;
constexpr int kGeluForwardBlocksPerSm = 4;   // 64 registers a thread
constexpr int kGeluBackwardBlocksPerSm = 3;  // 80
constexpr int kGeluRows = 2;                 // rows that a thread loads at once

// The tiles into which the launch has cut [rows, cols].
struct GeluTiles {
  int log2_width;    // threads across a tile
  int col_tiles;     // tiles across the columns; block b is tile b % col_tiles of row group b / col_tiles
  int64_t row_step;  // rows of all row groups together: the distance between two rows of a thread
};

template <class Params>
struct Tiled {
  Params p;
  GeluTiles tiles;
};

// The place of a thread in the tensor.
struct GeluThread {
  int64_t col;
  int64_t row;    // its first row
  int64_t group;  // of rows

  template <int kVec>
  static __device__ __forceinline__ GeluThread of(const GeluTiles& tiles) {
    const int block = static_cast<int>(blockIdx.x);
    const int thread = static_cast<int>(threadIdx.x);
    const int x = thread & ((1 << tiles.log2_width) - 1);
    const int64_t group = block / tiles.col_tiles;
    const int64_t col = ((int64_t{block % tiles.col_tiles} << tiles.log2_width) + x) * kVec;
    return {col, group * (kGeluThreads >> tiles.log2_width) + (thread >> tiles.log2_width), group};
  }
};

template <class T, int kVec, class Gelu>
__global__ void __launch_bounds__(kGeluThreads, kGeluForwardBlocksPerSm) bias_gelu_kernel(
    const Tiled<BiasGeluParams> params) {
  const BiasGeluParams& p = params.p;
  const GeluThread me = GeluThread::of<kVec>(params.tiles);
  if (me.col >= p.cols) return;
  float bias[kVec] = {};
  if (p.bias != nullptr) load_parameter<T>(bias, p.bias, p.float_parameters, me.col);

  constexpr int kRows = kGeluRows;
  const int64_t step = params.tiles.row_step;
  for (int64_t row = me.row; row < p.rows; row += kRows * step) {
    float v[kRows][kVec];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * step < p.rows) load_floats(v[r], static_cast<const T*>(p.x) + (row + r * step) * p.cols + me.col);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * step >= p.rows) break;
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[r][j] = Gelu::value(v[r][j] + bias[j]);
      store_floats(static_cast<T*>(p.out) + (row + r * step) * p.cols + me.col, v[r]);
    }
  }
}

template <class T, int kVec, class Gelu>
__global__ void __launch_bounds__(kGeluThreads, kGeluBackwardBlocksPerSm) bias_gelu_backward_kernel(
    const Tiled<BiasGeluBackwardParams> params) {
  const BiasGeluBackwardParams& p = params.p;
  const GeluThread me = GeluThread::of<kVec>(params.tiles);
  const bool inside = me.col < p.cols;
  float bias[kVec] = {};
  if (inside && p.bias != nullptr) load_parameter<T>(bias, p.bias, p.float_parameters, me.col);
  float dbias[kVec] = {};

  constexpr int kRows = kGeluRows;
  const int64_t step = params.tiles.row_step;
  for (int64_t row = inside ? me.row : p.rows; row < p.rows; row += kRows * step) {
    float dx[kRows][kVec], v[kRows][kVec];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * step >= p.rows) break;
      load_floats(dx[r], static_cast<const T*>(p.dout) + (row + r * step) * p.cols + me.col);
      load_floats(v[r], static_cast<const T*>(p.x) + (row + r * step) * p.cols + me.col);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * step >= p.rows) break;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        dx[r][j] *= Gelu::derivative(v[r][j] + bias[j]);
        dbias[j] += dx[r][j];
      }
      store_floats(static_cast<T*>(p.dx) + (row + r * step) * p.cols + me.col, dx[r]);
    }
  }
  if (p.bias == nullptr) return;

  // The rows of the tile are added up in shared memory, [rows of the tile][columns of the tile], which is thread order.
  const uint32_t sums = shared_base();
#pragma unroll
  for (int j = 0; j < kVec; ++j) store_shared(sums + (static_cast<int>(threadIdx.x) * kVec + j) * 4, dbias[j]);
  block_sync();
  const int tile_cols = kVec << params.tiles.log2_width;
  const int64_t first = static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(params.tiles.col_tiles)) * tile_cols;
  for (int c = static_cast<int>(threadIdx.x); c < tile_cols && first + c < p.cols; c += kGeluThreads) {
    float sum = 0;
    for (int at = c; at < kGeluThreads * kVec; at += tile_cols) sum += load_shared<float>(sums + at * 4);
    store_global(p.partials + me.group * p.cols + first + c, sum);
  }
}

}  // namespace warpform
