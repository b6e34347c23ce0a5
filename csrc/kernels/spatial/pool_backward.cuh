// Gradients of pool_mixer, in two kernels. With f = scale weight of a channel, r = rstd of a sample, u = P x - x, and
// P^T the transposed pooling, which sums the neighbours each divided by the number of its own neighbours:
//   q = sum over positions of dout u, for each sample and channel,
//   A = sum over channels of f q, for each sample,
//   dx = dout + r f (P^T dout - dout) - r^3 A (x - mean - D) / (height width channels),
//   D = mean of x - mean, which is what float32 cannot say of the mean: it matters where that is far from zero,
//   dweight = scale sum over samples of r q,   dscale = weight sum over samples of r q.
// The first kernel leaves q, of groups of tiles, as partials of both parameters (column_sum.cuh adds them up) and of A,
// and sums of x - mean; the second one adds up the A and D of its sample and makes dx.
//
// Tile: see tile.cuh. First kernel: x with its halo, dout without; a block walks over the tiles of a group, which the
// shape alone decides, as dx depends on it. Second kernel: dout with its halo, x without, one tile a block.
// All sums are in a fixed order.
//
// Bytes: 5 passes, 2 + 3: A needs all of a sample before any dx. 10 bytes an element in 16-bit types, 307 us of an
// H200's 4.3 TB/s for PoolFormer-S12 at 224 x 224, batch 128 (132 M elements).
// Instructions for 3 x 3, addresses and tests not counted: 22 and 23 an element, where the card has time for 28 and 41:
// bytes bound both, the first one not by much.
// Measured: not yet.
#pragma once

#include "spatial/pool_forward.cuh"

namespace warpform {

constexpr int kPoolGroupTiles = 4;       // tiles of positions that a block of the first kernel walks over, or more
constexpr int64_t kMostPoolGroups = 64;  // of a sample

template <int kSize>
struct PoolBackward {
  static constexpr int kHalo = kSize / 2;
  static constexpr int kBlocksPerSm = kSize == 3 ? 4 : 3;
  static constexpr int kTileBytes = HaloTile<kHalo>::kBytes;
  static constexpr int kSharedBytes = kTileBytes + HaloTile<0>::kBytes;
};

struct PoolGradientParams {
  PoolMixerBackwardParams p;
  float* weight_partials;  // [batch * groups, channels]
  float* scale_partials;   // [batch * groups, channels] or null
  float* sample_partials;  // [batch, groups, tiles of channels, 2]: shares of A, sums of x - mean
  int groups;              // of a sample
  int group_tiles;         // tiles of positions of a group
  Divisor group_divisor;   // by groups
};

// Leaves q, A and D of a group of tiles of one sample.
template <class T, int kSize>
__global__ void __launch_bounds__(kSpatialThreads, PoolBackward<kSize>::kBlocksPerSm) pool_mixer_sums_kernel(
    const SpatialLaunch<PoolGradientParams> params) {
  constexpr int kPack = SpatialElements<T>::kPack, kChannels = SpatialElements<T>::kChannels;
  const PoolGradientParams& g = params.p;
  const PoolMixerBackwardParams& p = g.p;
  const SpatialShape& shape = p.shape;
  const SpatialTiles& tiles = params.tiles;
  const int block = static_cast<int>(blockIdx.x), row = tiles.channels.quotient(block);
  const int channel_tile = block - row * tiles.channels.divisor;
  const int batch = g.group_divisor.quotient(row), group = row - batch * g.groups;
  const int all = tiles.rows.divisor * tiles.cols.divisor;
  const int begin = group * g.group_tiles, end = min(begin + g.group_tiles, all);
  const uint32_t tile = shared_base(), centre = tile + PoolBackward<kSize>::kTileBytes;
  const SpatialThread<T> me;
  const float mean = load_global(p.mean + batch);
  float q[kPack] = {}, drift[kPack] = {};
#pragma unroll 1
  for (int n = begin; n < end; ++n) {
    const TileOrigin at = origin_of<T>(tiles, batch * all + n, channel_tile);
    copy_tile<PoolBackward<kSize>::kHalo>(opaque(tile), static_cast<const T*>(p.x), at, shape, tiles.vectors);
    copy_tile<0>(opaque(centre), static_cast<const T*>(p.dout), at, shape, tiles.vectors);
    const StripNeighbours<kSize> columns(at.col + me.strip, shape.width);
    wait_for_tiles();
    if (at.col + me.strip < shape.width) {
      MeanTaps<T, kSize, false> taps(at, shape, mean);
      slide<T, kSize>(
          tile, taps, [](int, const auto&) {},
          [&](int r, auto& sums, const auto& x) {
            if (at.row + r >= shape.height) return false;
            columns.centre(sums, x, mean, at.row + r, shape.height);
#pragma unroll
            for (int c = 0; c < kStrip; ++c) {
              if (at.col + me.strip + c >= shape.width) break;
              const auto dout = me.template word<0>(centre, r, c);
#pragma unroll
              for (int k = 0; k < kPack; ++k) {
                q[k] += sums[c][k] * to_float(dout[k]);
                drift[k] += to_float(x[c][k]) - mean;
              }
            }
            return true;
          });
    }
    block_sync();
  }
  // The sums of the warps take the place of the tile.
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    store_shared(tile + (static_cast<int>(threadIdx.x) * kPack + k) * 8, Vec<float, 2>{q[k], drift[k]});
  }
  block_sync();
  if (warp_id() != 0) return;
  const int channel = channel_tile * kChannels + me.lane * kPack;
  float weight[kPack], scale[kPack], share = 0, distance = 0;
  load_parameters<T>(weight, scale, p, channel);
  const float rstd = load_global(p.rstd + batch);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
#pragma unroll
    for (int warp = 1; warp < kSpatialWarps; ++warp) {
      const auto other = load_shared<Vec<float, 2>>(tile + ((warp * kWarpSize + me.lane) * kPack + k) * 8);
      q[k] += other[0];
      drift[k] += other[1];
    }
    if (channel + k >= shape.channels) continue;
    const int64_t to = int64_t{row} * shape.channels + channel + k;
    store_global(g.weight_partials + to, scale[k] * (rstd * q[k]));
    if (g.scale_partials != nullptr) store_global(g.scale_partials + to, weight[k] * (rstd * q[k]));
    share += scale[k] * weight[k] * q[k];
    distance += drift[k];
  }
  const Vec<float, 2> sums{warp_reduce(share, Sum{}), warp_reduce(distance, Sum{})};
  if (me.lane == 0) store_global(reinterpret_cast<Vec<float, 2>*>(g.sample_partials) + block, sums);
}

template <class T, int kSize>
__global__ void __launch_bounds__(kSpatialThreads, PoolBackward<kSize>::kBlocksPerSm) pool_mixer_backward_kernel(
    const SpatialLaunch<PoolGradientParams> params) {
  constexpr int kPack = SpatialElements<T>::kPack, kHalo = kSize / 2;
  const PoolGradientParams& g = params.p;
  const PoolMixerBackwardParams& p = g.p;
  const SpatialShape& shape = p.shape;
  const bool vectors = params.tiles.vectors;
  const TileOrigin at = origin_of_block<T>(params.tiles);
  const uint32_t tile = shared_base(), centre = tile + PoolBackward<kSize>::kTileBytes;
  copy_tile<kHalo>(tile, static_cast<const T*>(p.dout), at, shape, vectors);
  copy_tile<0>(centre, static_cast<const T*>(p.x), at, shape, vectors);

  const SpatialThread<T> me;
  const int parts = g.groups * params.tiles.channels.divisor;
  const auto* from = reinterpret_cast<const Vec<float, 2>*>(g.sample_partials) + int64_t{at.batch} * parts;
  float share = 0, drift = 0;
#pragma unroll 1
  for (int i = me.lane; i < parts; i += kWarpSize) {
    const auto part = load_global(from + i);
    share += part[0];
    drift += part[1];
  }
  share = warp_reduce(share, Sum{});
  drift = warp_reduce(drift, Sum{});
  const float rstd = load_global(p.rstd + at.batch), mean = load_global(p.mean + at.batch);
  const float elements = static_cast<float>(shape.height * shape.width * shape.channels);
  const float slope = rstd * (rstd * (rstd * share / elements)), drift_mean = drift / elements;
  float factor[kPack], scale[kPack];
  load_parameters<T>(factor, scale, p, me.channel(at));
#pragma unroll
  for (int k = 0; k < kPack; ++k) factor[k] *= scale[k] * rstd;
  MeanTaps<T, kSize, true> taps(at, shape, 0.f);
  wait_for_tiles();

  if (at.col + me.strip >= shape.width) return;
  T* const dx = static_cast<T*>(p.dx) + offset_of_thread<T>(at, shape);
  const int64_t row_step = shape.width * shape.channels;
  slide<T, kSize>(
      tile, taps, [](int, const auto&) {},
      [&](int r, auto& sums, const auto& douts) {
        if (at.row + r >= shape.height) return false;
#pragma unroll
        for (int c = 0; c < kStrip; ++c) {
          const auto x = me.template word<0>(centre, r, c);
#pragma unroll
          for (int k = 0; k < kPack; ++k) {
            const float dout = to_float(douts[c][k]);
            sums[c][k] = dout + factor[k] * (sums[c][k] - dout) - slope * (to_float(x[k]) - mean - drift_mean);
          }
        }
        store_strip(dx + r * row_step, sums, at, shape, vectors);
        return true;
      });
}

}  // namespace warpform
