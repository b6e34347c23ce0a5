#include "monarch/block_gemm.cuh"

#include <algorithm>
#include <climits>

#include "common/hopper.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "monarch/hopper/launch.h"

namespace warpform {
namespace {

template <class T, class Tile>
void launch_tile(const char* op, const BlockGemmParams& p, void* stream) {
  const int64_t row_tiles = ceil_div(p.rows, int64_t{Tile::kM});
  const int64_t items = int64_t{ceil_div(p.cols, Tile::kN)} * p.groups;
  // Some eight steps a CTA, that its first loads are not most of what it waits for, unless that leaves SMs without
  // work.
  const int64_t steps = std::max(1, ceil_div(p.depth, Tile::kDepth));
  const int64_t share = std::clamp<int64_t>(row_tiles * items / (4 * sm_count()), 1, ceil_div(int64_t{8}, steps));
  BlockGemmWork work{.p = p, .items = static_cast<int>(items), .share = static_cast<int>(share), .ctas = {}};
  const int64_t ctas = ceil_div(items, share);
  if (items > INT_MAX || row_tiles * ctas > INT_MAX) fail(op, "too many tokens");
  work.ctas.set(static_cast<int>(ctas));
  const dim3 grid(static_cast<unsigned>(row_tiles * ctas));
  dispatch_bool(p.b_transposed, [&]<bool kTransposed>() {
    launch<block_gemm<T, Tile, kTransposed>>(op, grid, Tile::kThreads, Tile::kBytes, stream, work, tile_shape<Tile>(1));
  });
}

}  // namespace

void launch_block_gemm(const char* op, const BlockGemmParams& params, void* stream) {
  if (params.rows == 0 || params.groups == 0 || params.cols == 0) return;
#ifdef WARPFORM_WITH_HOPPER
  if (hopper_unusable() == nullptr && launch_block_gemm_hopper(op, params, stream)) return;
#endif
  const int64_t large_tiles =
      ceil_div(params.rows, int64_t{LargeTile::kM}) * ceil_div(params.cols, LargeTile::kN) * params.groups;
  const bool large = params.cols > SmallTile::kN && large_tiles >= sm_count();
  dispatch_half(params.dtype, [&]<class T>() {
    large ? launch_tile<T, LargeTile>(op, params, stream) : launch_tile<T, SmallTile>(op, params, stream);
  });
}

}  // namespace warpform
