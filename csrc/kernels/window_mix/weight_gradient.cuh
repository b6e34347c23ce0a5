// The gradient of the mixing weight, dW = D N(x)^T, and of its bias, the sums of D's rows, where D is dout, times the
// gate where there is one. The sums run over the columns of tile.cuh, all channels of all windows.
//
// Tile      64 x 64 elements of dW a CTA, and a share of the tiles of columns, 64 a step. A share leaves float32 sums,
//           which column_sum.cuh adds up: their order follows from the sizes and the number of SMs alone.
// Loads     as in product.cuh: 64 places of D and 64 of x a step, into one of two buffers, with one barrier a step. All
//           CTAs together read dout, the gate and x n / 64 times, all but the first from L2.
// Bounds    2 n FLOP and 6 bytes an element of 16 bits; with windows of 256 tokens 24 bytes pass L2. A step waits for
//           its loads, which the two CTAs of an SM hide from each other.
// Measured  not yet.
#pragma once

#include "device/reduce.cuh"
#include "window_mix/tile.cuh"

namespace warpform {

template <class T>
constexpr int kMixWeightBytes = 4 * MixShape<T>::kTileBytes;  // two buffers of two tiles

// Grid: blocks of dW, row by row; shares.
template <class T>
__global__ void __launch_bounds__(kMixThreads, 3) window_mix_weight_gradient(
    const __grid_constant__ WindowMixBackwardParams params) {
  using Shape = MixShape<T>;
  using Tile = typename Shape::Tile;
  const WindowMixProblem& p = params.problem;
  const int blocks = ceil_div(p.tokens, kMixRows);
  const int row_block = static_cast<int>(blockIdx.x) / blocks, col_block = static_cast<int>(blockIdx.x) % blocks;
  const int first_row = row_block * kMixRows, first_col = col_block * kMixRows;
  const int64_t tiles = p.tiles, share = blockIdx.y;
  const int begin = static_cast<int>(share * tiles / params.shares);
  const int end = static_cast<int>((share + 1) * tiles / params.shares);

  MixProduct<T> product;
  product.clear();
  float bias_sums[Shape::kPasses] = {};
  for (int tile = begin; tile < end; ++tile) {
    const uint32_t buffer = shared_base() + (tile & 1) * (2 * Shape::kTileBytes);
    const Tile d{buffer}, n{buffer + Shape::kTileBytes};
    const MixColumns<T> columns(p, tile);
    load_gradient<T>(d, 0, params, columns, first_row, bias_sums);
    load_normalised<T, /*kMakes=*/false>(n, 0, p, columns, first_col);
    block_sync();  // both have landed, and all warps are done with the other buffer
    product.add_abt(d, n);
  }

  if (params.dbias != nullptr && col_block == 0) {
#pragma unroll
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
      const float sum = warp_reduce<Shape::kLanes>(bias_sums[pass], Sum{});
      const int row = first_row + pass * Shape::kRowsAtOnce + Shape::row();
      if (Shape::lane() == 0 && row < p.tokens) store_global(params.bias_sums + share * p.tokens + row, sum);
    }
  }
  product.visit([&](int r, auto& v) {
    const int row = first_row + r;
    if (row >= p.tokens) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int col = first_col + (h * Shape::kLanes + Shape::lane()) * Shape::kVec;
      store_chunk(params.weight_sums + (share * p.tokens + row) * p.tokens + col, v[h], p.tokens - col,
                  p.weight_vectors && col < p.tokens);
    }
  });
}

}  // namespace warpform
