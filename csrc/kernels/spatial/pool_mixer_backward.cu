#include "common/column_sum.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "spatial/pool_backward.cuh"
#include "spatial/tiles.cuh"

namespace warpform {
namespace {

constexpr const char* kOp = "pool_mixer_backward";

// How the first kernel's blocks share the tiles of a sample.
struct PoolGroups {
  SpatialTiles tiles;
  int group_tiles;
  int groups;
  int64_t rows;  // of partials: groups of all samples

  explicit PoolGroups(const PoolMixerBackwardParams& p)
      : tiles(spatial_tiles(kOp, p.dtype, p.shape, p.dout, p.x, p.dx)) {
    const int64_t all = int64_t{tiles.rows.divisor} * tiles.cols.divisor;
    group_tiles = static_cast<int>(std::max<int64_t>(kPoolGroupTiles, ceil_div(all, kMostPoolGroups)));
    groups = static_cast<int>(ceil_div(all, int64_t{group_tiles}));
    rows = elements_of(p.shape) > 0 ? p.shape.batch * groups : 0;
  }
};

}  // namespace

int64_t pool_mixer_backward_partials(const PoolMixerBackwardParams& p) {
  const PoolGroups work(p);
  return work.rows * ((p.scale != nullptr ? 2 : 1) * p.shape.channels + 2 * work.tiles.channels.divisor);
}

void launch_pool_mixer_backward(const PoolMixerBackwardParams& p, void* stream) {
  if (p.shape.channels == 0) return;
  const PoolGroups work(p);
  const int64_t of_parameter = work.rows * p.shape.channels, of_samples = work.rows * 2 * work.tiles.channels.divisor;
  const int sums = p.scale != nullptr ? 2 : 1;
  float* const parameters = p.partials + of_samples;  // pairs of sums come first: an even place
  if (work.rows > 0) {
    const SpatialLaunch<PoolGradientParams> params{
        {.p = p,
         .weight_partials = parameters,
         .scale_partials = p.scale != nullptr ? parameters + of_parameter : nullptr,
         .sample_partials = p.partials,
         .groups = work.groups,
         .group_tiles = work.group_tiles,
         .group_divisor = divisor_of(work.groups)},
        work.tiles};
    const auto channel_tiles = work.tiles.channels.divisor;
    const auto blocks = static_cast<unsigned>(work.rows * channel_tiles);
    const auto tiles = static_cast<unsigned>(position_tiles(work.tiles, p.shape) * channel_tiles);
    dispatch_dtype(p.dtype, [&]<class T>() {
      dispatch_stencil(p.pool_size, [&]<int kSize>() {
        constexpr int kShared = PoolBackward<kSize>::kSharedBytes;
        launch<pool_mixer_sums_kernel<T, kSize>>(kOp, blocks, kSpatialThreads, kShared, stream, params);
        launch<pool_mixer_backward_kernel<T, kSize>>(kOp, tiles, kSpatialThreads, kShared, stream, params);
      });
    });
  }
  launch_column_sum(kOp,
                    {.partials = parameters,
                     .out = {p.dweight, p.dscale},
                     .sums = sums,
                     .groups = work.rows,
                     .cols = p.shape.channels,
                     .dtype = p.float_parameters ? DType::kFloat32 : p.dtype},
                    stream);
}

}  // namespace warpform
