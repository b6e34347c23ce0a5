// The products of window mixing with the weight: y = W N(x) + b in the forward, and in the backward dgate, which takes
// that y again, and dn = W^T (dout gate), of which dx is made.
//
// Tile      64 columns (tile.cuh) by all places: X is in shared memory whole, 32 KiB for 256 places of 16-bit elements
//           and 64 of float32, and results are made 64 places at a time by four warps of 16 rows each.
// Loads     X passes registers, where it is normalised or multiplied by the gate: 16 bytes a lane, 64 places in flight
//           (elements one by one where a row is no multiple of 16 bytes). W comes by cp.async in slabs of 64 x 64,
//           which every CTA reads, from L2; the first ones are asked for before X. The epilogue reads the gate or dout,
//           and x again for a LayerNorm's backward, 16 bytes a lane.
// LayerNorm A token whose chunks are a power of two and fit a tile (up to 64 channels) is shared by neighbouring lanes:
//           its mean and rstd, and in the backward its two sums, are shuffles. Wider tokens take statistics.cuh before
//           and LayerNorm's backward (norm/) behind, one more pass over x each, from L2 where the map is not large; the
//           latter takes a copy of x where its tokens are parts of wider rows.
// Bounds    Forward 6 bytes an element of 16 bits (x, gate, out) and 2 n FLOP; backward 10 bytes (dout, x, gate, dx,
//           dgate) and 4 n FLOP. On an H200 (4.3 TB/s; mma.sync at half of 990 TFLOP/s) a map of 256 x 256 with 32
//           channels and windows of 256 is 2.9 us of bytes and 2.2 us of products forward. The slabs of W are 128 CTAs
//           of 128 KiB, 16 MB through L2, which is more than the 12.6 MB of the map. Four ldmatrix of X and one of W
//           feed 8 mma.sync: a step of four warps is 80 cycles of shared memory, where its products take 64.
// Measured  not yet.
#pragma once

#include "window_mix/tile.cuh"

namespace warpform {

// Shared memory of a CTA.
template <class T>
int64_t mix_shared_bytes(int tokens) {
  using Shape = MixShape<T>;
  const int blocks = ceil_div(tokens, kMixRows);
  const int stages = blocks == 1 ? 1 : Shape::kStages;
  return int64_t{blocks + stages} * Shape::kTileBytes;
}

template <class T>
TileShape mix_tile_shape(int tokens) {
  return {.m = kMixRows, .n = kMixCols, .k = kMixRows, .stages = tokens <= kMixRows ? 1 : MixShape<T>::kStages};
}

// ---- policies: what is loaded as X, whether W is transposed, and what becomes of a row of the product ----

template <class T>
struct MixForward {
  using Params = WindowMixParams;
  static constexpr bool kTransposed = false;
  const Params& params;
  const MixColumns<T>& columns;

  __device__ __forceinline__ MixForward(const Params& params, const MixColumns<T>& columns)
      : params(params), columns(columns) {}
  __device__ __forceinline__ void load(const typename MixShape<T>::Tile& x, int first) {
    load_normalised<T, /*kMakes=*/true>(x, first, params.problem, columns, first);
  }
  template <int kVec>
  __device__ __forceinline__ void row(int place, float (&v)[2][kVec]) {
    const WindowMixProblem& p = params.problem;
    if (place >= p.tokens) return;
    const float bias = p.bias == nullptr ? 0.0f : to_float(load_global(static_cast<const T*>(p.bias) + place));
    const int64_t offset = place_offset(p, place);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const MixColumn& column = columns[h];
      const int64_t token = column.token + offset;
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[h][e] += bias;
      if (p.gate != nullptr) {
        const auto gate =
            load_chunk(static_cast<const T*>(p.gate) + token * p.gate_stride + column.channel, column.count, p.vectors);
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[h][e] = to_float(gate[e]) * (v[h][e] + 1.0f);
      }
      store_chunk(static_cast<T*>(params.out) + token * p.channels + column.channel, v[h], column.count, p.vectors);
    }
  }
  __device__ __forceinline__ void finish(int) {}
};

template <class T>
struct MixGateGradient {
  using Params = WindowMixBackwardParams;
  static constexpr bool kTransposed = false;
  const Params& params;
  const MixColumns<T>& columns;

  __device__ __forceinline__ MixGateGradient(const Params& params, const MixColumns<T>& columns)
      : params(params), columns(columns) {}
  __device__ __forceinline__ void load(const typename MixShape<T>::Tile& x, int first) {
    load_normalised<T, /*kMakes=*/false>(x, first, params.problem, columns, first);
  }
  template <int kVec>
  __device__ __forceinline__ void row(int place, float (&v)[2][kVec]) {
    const WindowMixProblem& p = params.problem;
    if (place >= p.tokens) return;
    const float bias = p.bias == nullptr ? 0.0f : to_float(load_global(static_cast<const T*>(p.bias) + place));
    const int64_t offset = place_offset(p, place);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = (columns[h].token + offset) * p.channels + columns[h].channel;
      const auto dout = load_chunk(static_cast<const T*>(params.dout) + at, columns[h].count, p.vectors);
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[h][e] = to_float(dout[e]) * (v[h][e] + bias + 1.0f);
      store_chunk(static_cast<T*>(params.dgate) + at, v[h], columns[h].count, p.vectors);
    }
  }
  __device__ __forceinline__ void finish(int) {}
};

// dx, and the sums over a window of dn xhat and dn. With xhat the normalised token, g = dn norm_weight and <.> the mean
// over a token, dx = rstd (g - <g> - xhat <g xhat>).
template <class T>
struct MixInputGradient {
  using Params = WindowMixBackwardParams;
  using Shape = MixShape<T>;
  static constexpr bool kTransposed = true;
  static constexpr int kVec = Shape::kVec;
  const Params& params;
  const MixColumns<T>& columns;
  const bool norm;            // of tokens that lie whole in a tile
  float along[2][kVec] = {};  // sums over the thread's rows
  float plain[2][kVec] = {};

  __device__ __forceinline__ MixInputGradient(const Params& params, const MixColumns<T>& columns)
      : params(params), columns(columns), norm(params.problem.norm_weight != nullptr && params.problem.whole_tokens) {}

  __device__ __forceinline__ void load(const typename Shape::Tile& x, int first) {
    float sums[Shape::kPasses] = {};
    load_gradient<T>(x, first, params, columns, first, sums);
  }

  __device__ __forceinline__ void row(int place, float (&v)[2][kVec]) {
    const WindowMixProblem& p = params.problem;
    const bool exists = place < p.tokens;
    const int64_t offset = place_offset(p, place);
    if (norm) {
      float xhat[2][kVec], rstd[2], mean_g[2] = {}, mean_along[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const MixColumn& column = columns[h];
        const int64_t token = column.token + offset;
        const int count = exists ? column.count : 0;
        const auto x = load_chunk(static_cast<const T*>(p.x) + token * p.x_stride + column.channel, count, p.vectors);
        const float mean = count > 0 ? load_global(p.mean + token) : 0.0f;
        rstd[h] = count > 0 ? load_global(p.rstd + token) : 0.0f;
        float weight[kVec];
        load_channels<T>(weight, p.norm_weight, p, column, 0.0f);
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const bool wanted = e < count;
          xhat[h][e] = wanted ? (to_float(x[e]) - mean) * rstd[h] : 0.0f;
          if (!wanted) v[h][e] = 0;
          along[h][e] += v[h][e] * xhat[h][e];
          plain[h][e] += v[h][e];
          v[h][e] *= weight[e];
          mean_g[h] += v[h][e];
          mean_along[h] += v[h][e] * xhat[h][e];
        }
      }
      token_sum<T>(p, mean_g);
      token_sum<T>(p, mean_along);
      const float inverse = 1.0f / static_cast<float>(p.channels);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          v[h][e] = rstd[h] * (v[h][e] - mean_g[h] * inverse - xhat[h][e] * (mean_along[h] * inverse));
        }
      }
    }
    if (!exists) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = (columns[h].token + offset) * p.channels + columns[h].channel;
      store_chunk(static_cast<T*>(params.dx) + at, v[h], columns[h].count, p.vectors);
    }
  }

  // Adds the sums of the threads that have the same columns, and writes those of each window.
  __device__ __forceinline__ void finish(int tile) {
    if (!norm) return;
    const WindowMixProblem& p = params.problem;
    block_sync();  // all warps are done with X
    const uint32_t shared = shared_base() + warp_id() * (2 * kMixCols * 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
#pragma unroll
        for (int offset = Shape::kLanes; offset < kWarpSize; offset *= 2) {
          along[h][e] += shuffle_xor(along[h][e], offset);
          plain[h][e] += shuffle_xor(plain[h][e], offset);
        }
        if (lane_id() < Shape::kLanes) {
          const int col = (h * Shape::kLanes + Shape::lane()) * kVec + e;
          store_shared(shared + col * 4, along[h][e]);
          store_shared(shared + (kMixCols + col) * 4, plain[h][e]);
        }
      }
    }
    block_sync();
    static_assert(kMixThreads == 2 * kMixCols, "a thread writes one sum");
    const int which = static_cast<int>(threadIdx.x) / kMixCols, col = static_cast<int>(threadIdx.x) % kMixCols;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kMixThreads / kWarpSize; ++warp) {
      sum += load_shared<float>(shared_base() + ((2 * warp + which) * kMixCols + col) * 4);
    }
    const int chunk = tile * Shape::kChunks + col / kVec, window = p.chunks.quotient(chunk);
    const int channel = (chunk - window * p.chunks.divisor) * kVec + col % kVec;
    if (window < p.windows && channel < p.channels) {
      store_global(params.norm_sums + (which * int64_t{p.windows} + window) * p.channels + channel, sum);
    }
  }
};

// ---- kernels ----

template <class T, class Policy>
__device__ __forceinline__ void mix(const typename Policy::Params& params) {
  using Shape = MixShape<T>;
  using Tile = typename Shape::Tile;
  const WindowMixProblem& p = params.problem;
  const int tile = static_cast<int>(blockIdx.x);
  const MixColumns<T> columns(p, tile);
  Policy policy(params, columns);
  const int blocks = ceil_div(p.tokens, kMixRows);
  const Tile x{shared_base()};
  const auto slab = [&](int stage) { return Tile{shared_base() + (blocks + stage) * Shape::kTileBytes}; };

  MixProduct<T> product;
  product.clear();
  int to = 0, from = 0;  // blocks of the product and of its terms
  int next_to = 0, next_from = 0;
  pipeline<Shape::kStages>(
      blocks * blocks,
      [&](int, int stage) {
        const int row = kMixRows * (Policy::kTransposed ? next_from : next_to);
        const int col = kMixRows * (Policy::kTransposed ? next_to : next_from);
        copy_weight_async<T>(slab(stage), p, row, col);
        if (++next_from == blocks) next_from = 0, ++next_to;
      },
      [&](int stage) {
        const int depth = min(kMixRows, p.tokens - from * kMixRows);
        if constexpr (Policy::kTransposed) {
          product.add_transposed(slab(stage), x, from * kMixRows, depth);
        } else {
          product.add(slab(stage), x, from * kMixRows, depth);
        }
        if (++from < blocks) return;
        product.visit([&](int row, auto& v) { policy.row(to * kMixRows + row, v); });
        product.clear();
        from = 0, ++to;
      },
      [&] {
        for (int block = 0; block < blocks; ++block) policy.load(x, block * kMixRows);
      });
  policy.finish(tile);
}

template <class T>
__global__ void __launch_bounds__(kMixThreads, 4) window_mix_forward(const __grid_constant__ WindowMixParams params) {
  mix<T, MixForward<T>>(params);
}

// blockIdx.y: dx, then dgate.
template <class T>
__global__ void __launch_bounds__(kMixThreads, 3) window_mix_gradient(
    const __grid_constant__ WindowMixBackwardParams params) {
  if (blockIdx.y == 0) {
    mix<T, MixInputGradient<T>>(params);
  } else {
    mix<T, MixGateGradient<T>>(params);
  }
}

}  // namespace warpform
