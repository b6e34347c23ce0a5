// The choice of a tile for block_gemm_hopper, its tensor maps and its launch.
#pragma once

#include <algorithm>
#include <climits>

#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "monarch/hopper/block_gemm.cuh"
#include "monarch/hopper/instances.h"

namespace warpform {

template <class Tile>
bool describe_operands(BlockGemmHopperWork& work) {
  const BlockGemmParams& p = work.p;
  const int64_t row_stride = p.rows > 1 ? p.a_stride : int64_t{p.groups} * p.depth;
  const TensorBox a{.data = p.a,
                    .rank = 3,
                    .sizes = {p.depth, p.groups, p.rows},
                    .strides = {p.depth, row_stride},
                    .box = {kPanel, 1, Tile::kM},
                    .swizzle = Swizzle::k128};
  const bool by_depth = Tile::kMajorB == Major::kDepth;
  const int inner = by_depth ? p.depth : p.cols, outer = by_depth ? p.cols : p.depth;
  const TensorBox b{.data = p.b,
                    .rank = 3,
                    .sizes = {inner, outer, p.groups},
                    .strides = {inner, int64_t{inner} * outer},
                    .box = {kPanel, Tile::B::kRows, 1},
                    .swizzle = Swizzle::k128};
  return encode_tensor_map(work.a, a) && encode_tensor_map(work.b, b);
}

template <class T, class Tile>
bool launch_block_gemm_tile(const char* op, const BlockGemmParams& p, void* stream) {
  BlockGemmHopperWork work{.a = {}, .b = {}, .p = p, .share = 0, .extra = 0, .row_items = {}, .groups = {}};
  const int64_t items = block_gemm_tiles(p, Tile::kM, Tile::kN);
  const int64_t row_items = int64_t{ceil_div(p.cols, Tile::kN)} * p.groups;
  if (items > INT_MAX || Tile::kBytes > shared_memory_limit() || !describe_operands<Tile>(work)) return false;
  const int ctas = static_cast<int>(std::min<int64_t>(items, sm_count()));
  work.share = static_cast<int>(items / ctas);
  work.extra = static_cast<int>(items % ctas);
  work.row_items.set(static_cast<int>(row_items));
  work.groups.set(p.groups);
  launch<block_gemm_hopper<T, Tile>>(op, dim3(static_cast<unsigned>(ctas)), Tile::kThreads, Tile::kBytes, stream, work,
                                     tile_shape<Tile>(1));
  return true;
}

// Clocks that the tiles take where every SM has as many as the one that has most: a step of the wide tile is 1,024, of
// the narrow one 640 (warpgroup_gemm.cuh). Counted, not measured.
inline int64_t block_gemm_clocks(int64_t tiles, int step) { return ceil_div(tiles, int64_t{sm_count()}) * step; }

template <Major kMajorB>
bool launch_block_gemm_hopper_as(const char* op, const BlockGemmParams& p, void* stream) {
  using Wide = WideWarpgroupTile<Major::kDepth, kMajorB>;
  using Narrow = NarrowWarpgroupTile<Major::kDepth, kMajorB>;
  const bool wide = block_gemm_clocks(block_gemm_tiles(p, Wide::kM, Wide::kN), 1024) <=
                    block_gemm_clocks(block_gemm_tiles(p, Narrow::kM, Narrow::kN), 640);
  return dispatch_half(p.dtype, [&]<class T>() {
    return wide ? launch_block_gemm_tile<T, Wide>(op, p, stream) : launch_block_gemm_tile<T, Narrow>(op, p, stream);
  });
}

}  // namespace warpform
