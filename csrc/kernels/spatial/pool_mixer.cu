#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "spatial/pool_forward.cuh"
#include "spatial/tiles.cuh"

namespace warpform {
namespace {

constexpr const char* kOp = "pool_mixer";

int64_t elements_of_sample(const SpatialShape& shape) { return shape.height * shape.width * shape.channels; }

// Elements of a chunk: one pass of a block, or as many as leave kMostChunks chunks.
int64_t chunk_of(const PoolMixerParams& p) {
  const int64_t pass = p.dtype == DType::kFloat32 ? kStatisticsPass<float> : kStatisticsPass<half_t>;
  return pass * std::max<int64_t>(ceil_div(elements_of_sample(p.shape), pass * kMostChunks), 1);
}

}  // namespace

int64_t pool_mixer_chunks(const PoolMixerParams& p) { return ceil_div(elements_of_sample(p.shape), chunk_of(p)); }

void launch_pool_mixer(const PoolMixerParams& p, void* stream) {
  if (p.shape.batch == 0) return;
  const int64_t elements = elements_of_sample(p.shape), vec = p.dtype == DType::kFloat32 ? 4 : 8;
  // A grid without elements has no chunks; its statistics come from one empty tile a sample.
  const SpatialTiles tiles = spatial_tiles(kOp, p.dtype, p.shape, p.x, p.out);
  const PoolStatisticsParams statistics{.x = p.x,
                                        .partials = p.partials,
                                        .elements = elements,
                                        .chunk = chunk_of(p),
                                        .chunks = p.chunks,
                                        .vectors = elements % vec == 0 && all_aligned(p.x)};
  if (p.shape.batch > INT_MAX / std::max<int64_t>(p.chunks, 1)) {
    fail_for_size(kOp, "no kernel takes a batch of", p.shape.batch, "samples of this size");
  }
  const auto blocks = static_cast<unsigned>(position_tiles(tiles, p.shape) * tiles.channels.divisor);
  dispatch_dtype(p.dtype, [&]<class T>() {
    launch<pool_statistics_kernel<T>>(kOp, static_cast<unsigned>(p.shape.batch * p.chunks), kStatisticsThreads,
                                      kStatisticsThreads / kWarpSize * 16, stream, statistics);
    dispatch_stencil(p.pool_size, [&]<int kSize>() {
      const SpatialLaunch<PoolForwardParams> params{{p, elements, statistics.chunk}, tiles};
      launch<pool_mixer_kernel<T, kSize>>(kOp, blocks, kSpatialThreads, PoolForward<kSize>::kSharedBytes, stream,
                                          params);
    });
  });
}

}  // namespace warpform
