// pool_mixer: out = x + scale (P n - n), n = GroupNorm with one group (x), P the mean over the neighbours of a square
// of kSize by kSize that exist (PoolFormer: Yu et al., arXiv 2111.11418, equation 4, with a layer scale).
// P of a constant is that constant, so the norm's mean and bias cancel, and what is left is one factor for each
// channel: out = x + scale weight rstd (P x - x).
//
// Tile: see tile.cuh. pool_statistics.cuh has left the moments of the chunks of each sample; every warp merges those of
// its sample while cp.async brings x with its halo.
// Sums: see stencil.cuh, columns first: kSize - 1 adds along the row, with the halo's share, and kSize along the
// column.
//
// Bytes: x read for the statistics, read again, and out written: 3 passes, where PyTorch's norm, pooling, difference,
// scale and sum take 13. PoolFormer-S12 at 224 x 224, batch 128, forward: 132 M elements, 184 us of an H200's 4.3 TB/s
// in 16-bit types, of which 122 are this kernel's. The halo, 41 % of a tile for 3 x 3, comes from L2.
// Instructions for 3 x 3: 6 adds, 6 for loads, conversions and the mean, 4 behind the sums, 3 for the copy in and the
// store, 19 an element without addresses and tests, where the card has time for 28: bytes bound it, not by much.
// Measured: not yet.
#pragma once

#include "spatial/pool_statistics.cuh"
#include "spatial/stencil.cuh"

namespace warpform {

template <int kSize>
struct PoolForward {
  static constexpr int kHalo = kSize / 2;
  static constexpr int kBlocksPerSm = kSize == 3 ? 6 : 4;
  static constexpr int kSharedBytes = HaloTile<kHalo>::kBytes;
};

// A parameter's elements at the thread's channels, zeros beyond the last; `is_float`: float32, not T.
template <class T, int kPack>
__device__ __forceinline__ void load_channels(float (&v)[kPack], const void* p, bool is_float, int channel,
                                              int64_t channels) {
#pragma unroll
  for (int q = 0; q < kPack; ++q) {
    v[q] = 0;
    if (channel + q >= channels) continue;
    v[q] = is_float ? load_global(static_cast<const float*>(p) + channel + q)
                    : to_float(load_global(static_cast<const T*>(p) + channel + q));
  }
}
// weight and scale, which is 1 without one.
template <class T, int kPack, class Params>
__device__ __forceinline__ void load_parameters(float (&weight)[kPack], float (&scale)[kPack], const Params& p,
                                                int channel) {
  load_channels<T>(weight, p.weight, p.float_parameters, channel, p.shape.channels);
#pragma unroll
  for (int q = 0; q < kPack; ++q) scale[q] = 1.f;
  if (p.scale != nullptr) load_channels<T>(scale, p.scale, p.float_parameters, channel, p.shape.channels);
}

// The neighbours of a thread's columns: how many columns each has, and the inverse.
template <int kSize>
struct StripNeighbours {
  float count[kStrip], inverse[kStrip];

  __device__ __forceinline__ StripNeighbours(int first_col, int64_t width) {
#pragma unroll
    for (int c = 0; c < kStrip; ++c) {
      count[c] = neighbours<kSize>(first_col + c, width);
      inverse[c] = inverse_neighbours<kSize>(first_col + c, width);
    }
  }
  // P x - x from the sum over the neighbours' distances to `shift`: (sum - n d) / n loses less than sum / n - d.
  template <int kPack, class Word>
  __device__ __forceinline__ void centre(float (&sums)[kStrip][kPack], const Word (&x)[kStrip], float shift, int row,
                                         int64_t height) const {
    const float rows = neighbours<kSize>(row, height), inverse_rows = inverse_neighbours<kSize>(row, height);
#pragma unroll
    for (int c = 0; c < kStrip; ++c) {
#pragma unroll
      for (int q = 0; q < kPack; ++q) {
        const float distance = to_float(x[c][q]) - shift;
        sums[c][q] = (sums[c][q] - rows * count[c] * distance) * (inverse_rows * inverse[c]);
      }
    }
  }
};

struct PoolForwardParams {
  PoolMixerParams p;
  int64_t elements;  // of a sample
  int64_t chunk;     // elements of a chunk
};

template <class T, int kSize>
__global__ void __launch_bounds__(kSpatialThreads, PoolForward<kSize>::kBlocksPerSm) pool_mixer_kernel(
    const SpatialLaunch<PoolForwardParams> params) {
  constexpr int kPack = SpatialElements<T>::kPack;
  const PoolMixerParams& p = params.p.p;
  const SpatialShape& shape = p.shape;
  const bool vectors = params.tiles.vectors;
  const TileOrigin at = origin_of_block<T>(params.tiles);
  const uint32_t tile = shared_base();
  copy_tile<PoolForward<kSize>::kHalo>(tile, static_cast<const T*>(p.x), at, shape, vectors);

  const SpatialThread<T> me;
  const Moments moments = moments_of_sample(p.partials, at.batch, params.p.elements, params.p.chunk, p.chunks);
  float mean = 0, rstd = 0;  // of no elements
  if (moments.count > 0.f) {
    mean = to_float(load_global(static_cast<const T*>(p.x) + at.batch * params.p.elements)) + moments.mean;
    rstd = 1.f / sqrtf(moments.squares / moments.count + p.eps);
  }
  if (threadIdx.x == 0 && at.row == 0 && at.col == 0 && at.channel == 0) {
    store_global(p.mean + at.batch, mean);
    store_global(p.rstd + at.batch, rstd);
  }
  float factor[kPack], scale[kPack];
  load_parameters<T>(factor, scale, p, me.channel(at));
#pragma unroll
  for (int q = 0; q < kPack; ++q) factor[q] *= scale[q] * rstd;
  const int col = at.col + me.strip;
  const StripNeighbours<kSize> columns(col, shape.width);
  wait_for_tiles();

  if (col >= shape.width) return;
  MeanTaps<T, kSize, false> taps(at, shape, mean);
  T* const out = static_cast<T*>(p.out) + offset_of_thread<T>(at, shape);
  const int64_t row_step = shape.width * shape.channels;
  slide<T, kSize>(
      tile, taps, [](int, const auto&) {},
      [&](int r, auto& sums, const auto& x) {
        if (at.row + r >= shape.height) return false;
        columns.centre(sums, x, mean, at.row + r, shape.height);
#pragma unroll
        for (int c = 0; c < kStrip; ++c) {
#pragma unroll
          for (int q = 0; q < kPack; ++q) sums[c][q] = to_float(x[c][q]) + factor[q] * sums[c][q];
        }
        store_strip(out + r * row_step, sums, at, shape, vectors);
        return true;
      });
}

}  // namespace warpform
