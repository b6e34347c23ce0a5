// The choice of a tile for hidden_gather_hopper and hidden_scatter_hopper, the tensor map of the weight, and the launch.
#pragma once

#include <algorithm>
#include <climits>

#include "device/block_tile.cuh"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "routing/hopper/instances.h"
#include "routing/hopper/routed_gemm.cuh"

namespace warpform {

// How the tiles of columns of a tile of tokens are shared out among CTAs.
struct RoutedShares {
  int64_t clocks;
  int columns;  // tiles
  int shares;   // CTAs

  bool operator<(const RoutedShares& other) const { return clocks < other.clocks; }
};

// The shares by which the SM that has most is done first, if every tile of tokens uses half of the groups: `steps` of
// `step_clocks` for a tile of columns, and kBegin before the first product of a CTA. Counted, not measured. More than
// kMostTiles for a CTA would win nothing: kBegin is small beside them. A plan has at least one tile without tokens.
inline RoutedShares share_out(const Routes& r, int columns, int steps, int step_clocks) {
  constexpr int kBegin = 3400, kMostTiles = 8;
  const int tiles = std::max(r.tiles - 1, 1);
  RoutedShares best{.clocks = INT64_MAX, .columns = columns, .shares = columns};
  for (int each = 1; each <= std::min(columns, kMostTiles); ++each) {
    const int shares = ceil_div(columns, each);
    const int64_t waves = ceil_div(int64_t{tiles} * shares, int64_t{sm_count()});
    const int64_t clocks = waves * (int64_t{each} * std::max(steps / 2, 1) * step_clocks + kBegin);
    if (clocks <= best.clocks) best = {clocks, columns, shares};
  }
  return best;
}

// A step of the wide tile and one of the narrow (warpgroup_gemm.cuh).
constexpr int kWideClocks = 1024, kNarrowClocks = 640;

// The weight's map, for a depth of `parts` parts of `width`. False where there is none: classes that lie at odd places,
// as no op makes them.
template <class Tile, class Params>
bool describe_weight(RoutedHopperWork<Params>& work, int64_t outputs, int parts, int width, int box_outputs) {
  const RoutedWeight& w = work.p.w;
  const int classes = work.p.routes.num_classes;
  const bool by_depth = Tile::kMajorB == Major::kDepth;
  const int64_t unit = by_depth ? w.stride : w.stride * width;  // along the dimension that has the classes
  const int64_t step = classes > 1 ? w.class_stride / unit : 0;
  const int64_t length = (by_depth ? outputs : parts) + (classes - 1) * step;
  if ((classes > 1 && w.class_stride % unit != 0) || length > INT_MAX) return false;
  work.class_step = static_cast<int>(step);
  TensorBox box{.data = w.data,
                .rank = 3,
                .sizes = {width, parts, length},
                .strides = {width, w.stride},
                .box = {kPanel, 1, box_outputs},
                .swizzle = Swizzle::k128};
  if (!by_depth) {
    box.sizes[0] = outputs, box.sizes[1] = width, box.sizes[2] = length;
    box.strides[0] = w.stride, box.strides[1] = unit;
    box.box[0] = kPanel, box.box[1] = Tile::kDepth, box.box[2] = 1;
  }
  return encode_tensor_map(work.w, box);
}

// Launches kKernel, whose shared memory behind the stages is `rows_bytes`.
template <auto kKernel, class Tile, class Params>
bool launch_routed_hopper(const char* op, RoutedHopperWork<Params>& work, const RoutedShares& shares, int rows_bytes,
                          void* stream) {
  const int64_t ctas = int64_t{work.p.routes.tiles} * shares.shares;
  const int bytes = Tile::kBytes + rows_bytes;
  if (ctas > INT_MAX || bytes > shared_memory_limit()) return false;
  work.columns = shares.columns;
  work.shares.set(shares.shares);
  launch<kKernel>(op, dim3(static_cast<unsigned>(ctas)), Tile::kThreads, bytes, stream, work, tile_shape<Tile>(1));
  return true;
}

// ---- gather ----

template <class Tile>
RoutedShares gather_shares(const Routes& r, int step_clocks) {
  static_assert(Tile::kBytes + TileRows::bytes(kMaxGroups) <= kMostSharedBytes);
  return share_out(r, ceil_div(r.dense_width, Tile::kN) * r.num_out, r.num_groups * ceil_div(r.width, Tile::kDepth),
                   step_clocks);
}

template <class T, class Tile>
bool launch_gather_tile(const char* op, const HiddenGatherParams& p, const RoutedShares& shares, void* stream) {
  const Routes& r = p.routes;
  RoutedHopperWork<HiddenGatherParams> work{.w = {}, .p = p, .class_step = 0, .shares = {}, .columns = 0, .inner = {}};
  work.inner.set(ceil_div(r.dense_width, Tile::kN));
  if (!describe_weight<Tile>(work, int64_t{r.num_out} * r.dense_width, r.num_groups, r.width, Tile::kN)) return false;
  return dispatch_bool(p.gates != nullptr, [&]<bool kGated>() {
    return launch_routed_hopper<hidden_gather_hopper<T, Tile, kGated>, Tile>(
        op, work, shares, TileRows::bytes(kGated ? r.num_groups : 0), stream);
  });
}

template <Major kMajorB>
bool launch_hidden_gather_hopper_as(const char* op, const HiddenGatherParams& p, void* stream) {
  using Wide = WideWarpgroupTile<Major::kDepth, kMajorB>;
  using Narrow = NarrowWarpgroupTile<Major::kDepth, kMajorB>;
  const RoutedShares wide = gather_shares<Wide>(p.routes, kWideClocks);
  const RoutedShares narrow = gather_shares<Narrow>(p.routes, kNarrowClocks);
  return dispatch_half(p.dtype, [&]<class T>() {
    return narrow < wide ? launch_gather_tile<T, Narrow>(op, p, narrow, stream)
                         : launch_gather_tile<T, Wide>(op, p, wide, stream);
  });
}

// ---- scatter ----

// Blocks of a group. Where parts of the depth are for some groups only, a group begins with a tile.
template <class Tile>
int blocks_of_group(const Routes& r) {
  constexpr int kBlocks = Tile::kN / kHiddenBlock;
  const int blocks = ceil_div(r.width, kHiddenBlock);
  return r.out_mask == nullptr ? blocks : ceil_div(blocks, kBlocks) * kBlocks;
}

template <class Tile>
RoutedShares scatter_shares(const Routes& r, int step_clocks) {
  return share_out(r, ceil_div(blocks_of_group<Tile>(r) * r.num_groups, Tile::kN / kHiddenBlock),
                   r.num_out * ceil_div(r.dense_width, Tile::kDepth), step_clocks);
}

template <class T, class Tile>
bool launch_scatter_tile(const char* op, const HiddenScatterParams& p, const RoutedShares& shares, void* stream) {
  const Routes& r = p.routes;
  RoutedHopperWork<HiddenScatterParams> work{.w = {}, .p = p, .class_step = 0, .shares = {}, .columns = 0, .inner = {}};
  work.inner.set(blocks_of_group<Tile>(r));
  if (!describe_weight<Tile>(work, int64_t{r.num_groups} * r.width, r.num_out, r.dense_width, kHiddenBlock))
    return false;
  return launch_routed_hopper<hidden_scatter_hopper<T, Tile>, Tile>(
      op, work, shares, TileRows::bytes(p.gates != nullptr ? r.num_groups : 0), stream);
}

template <Major kMajorB>
bool launch_hidden_scatter_hopper_as(const char* op, const HiddenScatterParams& p, void* stream) {
  using Wide = WideWarpgroupTile<Major::kDepth, kMajorB>;
  using Narrow = NarrowWarpgroupTile<Major::kDepth, kMajorB>;
  const RoutedShares wide = scatter_shares<Wide>(p.routes, kWideClocks);
  const RoutedShares narrow = scatter_shares<Narrow>(p.routes, kNarrowClocks);
  return dispatch_half(p.dtype, [&]<class T>() {
    return narrow < wide ? launch_scatter_tile<T, Narrow>(op, p, narrow, stream)
                         : launch_scatter_tile<T, Wide>(op, p, wide, stream);
  });
}

}  // namespace warpform
