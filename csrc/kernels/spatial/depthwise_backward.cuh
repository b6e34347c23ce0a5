// Gradients of depthwise_conv2d from dpre, the gradient before the activation, which is dout where that is linear and
// else comes from the kernel in depthwise_forward.cuh: dtap[t] = sum over i of x[i] dpre[i - t], dbias = sum of dpre,
// and for 3 x 3 taps dx[i] = sum over t of tap[t] dpre[i - t] in the same walk: of the same neighbours of dpre, and the
// stencil with its taps in the opposite order. With more taps the two would take more registers than a thread has, and
// dx comes from the forward kernel.
//
// Tile: see tile.cuh; dpre has the halo, x has none. A block keeps its channels and walks over a range of tiles. Sums
// of taps stay in a thread's registers (2 * kSize^2, float32 half of it), then the warps of a block add theirs through
// shared memory; a block leaves one float32 partial a tap and channel, which column_sum.cuh adds up. All in a fixed
// order.
//
// Bytes for 3 x 3 taps: dpre and x read, dx written, 6 a channel and position in 16-bit types, which is the least where
// the activation is linear. With another one dpre has to be made first, 6 more: the forward kernel's arithmetic for the
// halo as well would cost more time than these bytes.
// Instructions for 3 x 3 taps: 18 FMA, 2 adds, 4 for loads and conversions of dpre, 2 of x, 3 for copies and stores, 29
// an element without addresses and tests, where the card has time for 41: bytes bound it. The sums of 5 x 5 taps take
// 25 FMA and 17 for loads and conversions, those of 7 x 7 taps 49 and 32, beside 4 bytes, which give time for 28:
// instructions bound them.
// Measured: not yet.
#pragma once

#include "spatial/stencil.cuh"

namespace warpform {

// What the kernel takes.
struct DepthwiseGradientParams {
  const void* dpre;
  const void* x;
  const void* weight;
  void* dx;              // not written for more than 3 by 3 taps
  float* partials;       // [groups, channels, kSize^2]
  float* bias_partials;  // [groups, channels] or null
  int64_t groups;
  SpatialShape shape;
};

// True if one walk over the tiles gives all gradients.
constexpr bool gives_all_gradients(int size) { return size == 3; }

template <class T, int kSize>
struct DepthwiseBackward {
  static constexpr int kHalo = kSize / 2;
  static constexpr int kTaps = kSize * kSize;
  static constexpr int kPack = SpatialElements<T>::kPack;
  static constexpr int kCols = kStrip + 2 * kHalo;
  static constexpr int kBlocksPerSm = kSize == 3 ? 4 : kSize == 5 ? 3 : 2;
  static constexpr int kTileBytes = HaloTile<kHalo>::kBytes;
  static constexpr int kTapBytes = gives_all_gradients(kSize) ? LearnedTaps<T, kSize>::kBytes : 0;
  static constexpr int kSharedBytes = kTileBytes + HaloTile<0>::kBytes + kTapBytes;
  static_assert((kTaps + 1) * SpatialElements<T>::kChannels * 4 <= kTileBytes, "the sums take the place of the tile");

  // A thread's sums, in the order of the stencil's neighbours, and that of the bias behind them.
  float sums[kTaps + 1][kPack];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t <= kTaps; ++t) {
#pragma unroll
      for (int q = 0; q < kPack; ++q) sums[t][q] = 0;
    }
  }
  // Adds the products of a row of x and row `ky` of its neighbours; their centre row is also the bias's.
  __device__ __forceinline__ void add(const Vec<T, kPack> (&x)[kStrip], const float (&row)[kCols][kPack], int ky) {
#pragma unroll
    for (int c = 0; c < kStrip; ++c) {
#pragma unroll
      for (int q = 0; q < kPack; ++q) {
        const float value = to_float(x[c][q]);
#pragma unroll
        for (int kx = 0; kx < kSize; ++kx) sums[ky * kSize + kx][q] += value * row[c + kx][q];
        if (ky == kHalo) sums[kTaps][q] += row[kHalo + c][q];
      }
    }
  }
  // Adds all of a tile, one row of x after another.
  __device__ __forceinline__ void walk(uint32_t tile, uint32_t centre) {
    const SpatialThread<T> me;
#pragma unroll 1
    for (int r = 0; r < kTileRows; ++r) {
      Vec<T, kPack> x[kStrip];
#pragma unroll
      for (int c = 0; c < kStrip; ++c) x[c] = me.template word<0>(centre, r, c);
#pragma unroll
      for (int ky = 0; ky < kSize; ++ky) {
        float row[kCols][kPack];
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
          const auto word = me.template word<kHalo>(tile, r + ky, c);
#pragma unroll
          for (int q = 0; q < kPack; ++q) row[c][q] = to_float(word[q]);
        }
        add(x, row, ky);
      }
    }
  }
  __device__ __forceinline__ bool finite() const {
    float zero = 0;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
#pragma unroll
      for (int q = 0; q < kPack; ++q) zero += 0.f * sums[t][q];
    }
    return zero == 0.f;
  }
};

// Adds the sums of one tile straight from global memory, without the pairs of which one position is beyond the grid:
// those are zero times what the other is, NaN where that is infinite. In the same order of additions.
template <class T, int kSize>
__device__ __forceinline__ void add_checked(DepthwiseBackward<T, kSize>& own, const DepthwiseGradientParams& p,
                                            const TileOrigin& at) {
  constexpr int kHalo = kSize / 2, kPack = SpatialElements<T>::kPack;
  const SpatialShape& shape = p.shape;
  const SpatialThread<T> me;
  const int channel = me.channel(at);
#pragma unroll 1
  for (int r = 0; r < kTileRows; ++r) {
#pragma unroll 1
    for (int c = 0; c < kStrip; ++c) {
      const int row = at.row + r, col = at.col + me.strip + c;
      if (row >= shape.height || col >= shape.width) break;
#pragma unroll
      for (int q = 0; q < kPack; ++q) {
        if (channel + q >= shape.channels) continue;
        const auto load = [&](const void* from, int y, int x) {
          const int64_t position = (int64_t{at.batch} * shape.height + y) * shape.width + x;
          return to_float(load_global(static_cast<const T*>(from) + position * shape.channels + channel + q));
        };
        const float x = load(p.x, row, col);
#pragma unroll
        for (int t = 0; t < kSize * kSize; ++t) {
          const int y = row + t / kSize - kHalo, z = col + t % kSize - kHalo;
          if (exists(y, shape.height) && exists(z, shape.width)) own.sums[t][q] += x * load(p.dpre, y, z);
        }
        own.sums[kSize * kSize][q] += load(p.dpre, row, col);
      }
    }
  }
}

// Adds up the sums of the block's warps and stores them as its partials. They take the place of the tile, which no warp
// needs behind the first barrier.
template <class T, int kSize>
__device__ __forceinline__ void store_partials(const DepthwiseBackward<T, kSize>& own, uint32_t shared,
                                               const DepthwiseGradientParams& p, int64_t group, int first_channel) {
  constexpr int kTaps = kSize * kSize, kChannels = SpatialElements<T>::kChannels, kPack = SpatialElements<T>::kPack;
  using Pair = Vec<float, kPack>;
  shared += lane_id() * kPack * 4;
#pragma unroll 1
  for (int warp = 0; warp < kSpatialWarps; ++warp) {
    block_sync();
    if (warp_id() != warp) continue;
#pragma unroll
    for (int t = 0; t <= kTaps; ++t) {
      Pair total{};
      if (warp > 0) total = load_shared<Pair>(shared + t * kChannels * 4);
#pragma unroll
      for (int q = 0; q < kPack; ++q) total[q] += own.sums[t][q];
      if (warp + 1 < kSpatialWarps) {
        store_shared(shared + t * kChannels * 4, total);
        continue;
      }
#pragma unroll
      for (int q = 0; q < kPack; ++q) {
        const int channel = first_channel + lane_id() * kPack + q;
        if (channel >= p.shape.channels) continue;
        const int64_t row = group * p.shape.channels + channel;
        if (t < kTaps) {
          store_global(p.partials + row * kTaps + (kTaps - 1 - t), total[q]);
        } else if (p.bias_partials != nullptr) {
          store_global(p.bias_partials + row, total[q]);
        }
      }
    }
  }
}

// dx and the sums of a tile, for taps in the opposite order.
template <class T, int kSize>
__device__ __forceinline__ void walk_for_all(DepthwiseBackward<T, kSize>& own, LearnedTaps<T, kSize>& taps,
                                             uint32_t tile, uint32_t centre, const DepthwiseGradientParams& p,
                                             const TileOrigin& at, bool vectors) {
  constexpr int kPack = SpatialElements<T>::kPack;
  const SpatialThread<T> me;
  T* const dx = static_cast<T*>(p.dx) + offset_of_thread<T>(at, p.shape);
  const int64_t row_step = p.shape.width * p.shape.channels;
  const auto finish = [&](int r, float (&sums)[kStrip][kPack]) {
    if (at.row + r < p.shape.height) store_strip(dx + r * row_step, sums, at, p.shape, vectors);
    return true;
  };
  if (!taps.finite) return slide_checked<T, kSize>(tile, taps, at, p.shape, finish);  // the sums come from add_checked
  Vec<T, kPack> x[kTileRows][kStrip];                                                 // kSize rows are live at a time
  const auto add = [&](int i, const auto& row) {
    if (i < kTileRows) {
#pragma unroll
      for (int c = 0; c < kStrip; ++c) x[i][c] = me.template word<0>(centre, i, c);
    }
#pragma unroll
    for (int ky = 0; ky < kSize; ++ky) {
      if (i - ky >= 0 && i - ky < kTileRows) own.add(x[i - ky], row, ky);
    }
  };
  slide<T, kSize>(tile, taps, add, [&](int r, auto& sums, const auto&) { return finish(r, sums); });
}

template <class T, int kSize>
__global__ void __launch_bounds__(kSpatialThreads, DepthwiseBackward<T, kSize>::kBlocksPerSm)
depthwise_conv2d_backward_kernel(const SpatialLaunch<DepthwiseGradientParams> params) {
  using Kernel = DepthwiseBackward<T, kSize>;
  const DepthwiseGradientParams& p = params.p;
  const SpatialShape& shape = p.shape;
  const SpatialTiles& tiles = params.tiles;
  const int block = static_cast<int>(blockIdx.x), group = tiles.channels.quotient(block);
  const int channel_tile = block - group * tiles.channels.divisor;
  const int64_t all = shape.batch * tiles.rows.divisor * tiles.cols.divisor;
  const auto begin = static_cast<int>(all * group / p.groups), end = static_cast<int>(all * (group + 1) / p.groups);
  const uint32_t tile = shared_base(), centre = tile + Kernel::kTileBytes;
  const SpatialThread<T> me;
  Kernel own;
  own.clear();
  bool finite = true;
  const auto walk = [&](const auto& work) {
#pragma unroll 1
    for (int n = begin; n < end; ++n) {
      const TileOrigin at = origin_of<T>(tiles, n, channel_tile);
      // The addresses follow from numbers of the block: computed ahead of the loop they would take its registers.
      copy_tile<Kernel::kHalo>(opaque(tile), static_cast<const T*>(p.dpre), at, shape, tiles.vectors);
      copy_tile<0>(opaque(centre), static_cast<const T*>(p.x), at, shape, tiles.vectors);
      wait_for_tiles();
      if (at.col + me.strip < shape.width) work(at);
      block_sync();
    }
  };
  if constexpr (gives_all_gradients(kSize)) {
    const uint32_t staged = centre + HaloTile<0>::kBytes;
    stage_taps<T, kSize>(staged, p.weight, channel_tile * SpatialElements<T>::kChannels, shape.channels, true);
    block_sync();
    LearnedTaps<T, kSize> taps(staged);
    walk([&](const TileOrigin& at) { walk_for_all(own, taps, tile, centre, p, at, tiles.vectors); });
    finite = taps.finite;
  } else {
    walk([&](const TileOrigin&) { own.walk(tile, centre); });
  }
  if (ballot(!finite || !own.finite()) != 0) {
    own.clear();
#pragma unroll 1
    for (int n = begin; n < end; ++n) add_checked<T, kSize>(own, p, origin_of<T>(tiles, n, channel_tile));
  }
  store_partials<T, kSize>(own, tile, p, group, channel_tile * SpatialElements<T>::kChannels);
}

}  // namespace warpform
