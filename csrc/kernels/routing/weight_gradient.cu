#include "routing/weight_gradient.cuh"

#include <algorithm>
#include <climits>

#include "common/column_sum.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {
namespace {

constexpr const char* kOp = "hidden_weight_grad";
using Shape = HiddenTileShape;
// Tiles of tokens that a range has: at least as many as are worth a partial sum, at most as many as the list holds.
constexpr int kLeastRange = 4, kMostRange = 2048;

// Without any list the kernel takes 4 bytes more than the 99 KiB of compute capability 8.6, 8.9 and 12.0.
int most_range() { return std::min(kMostRange, (shared_memory_limit() - GradStage::bytes(0)) / 4); }

int part_tiles_of(const Routes& r) { return ceil_div(r.dense_width, Shape::kM); }
int dense_tiles_of(const Routes& r) { return part_tiles_of(r) * r.num_out; }
int blocks_of(const Routes& r) { return ceil_div(r.width, kHiddenBlock) * r.num_groups; }

// CTAs of one split.
int64_t ctas_of(const Routes& r) { return int64_t{dense_tiles_of(r)} * ceil_div(blocks_of(r), 2) * r.num_classes; }

HiddenWeightGradWork work_of(const HiddenWeightGradParams& p) {
  const Routes& r = p.routes;
  HiddenWeightGradWork work{.p = p,
                            .dense_tiles = dense_tiles_of(r),
                            .part_tiles = part_tiles_of(r),
                            .pairs = ceil_div(blocks_of(r), 2),
                            .group_blocks = {},
                            .blocks = blocks_of(r),
                            .range = ceil_div(r.tiles, p.splits)};
  work.group_blocks.set(ceil_div(r.width, kHiddenBlock));
  return work;
}

}  // namespace

int hidden_weight_grad_splits(const Routes& r) {
  const int64_t places = int64_t{Shape::kCtas} * sm_count();
  const int64_t wanted = places / std::max<int64_t>(1, ctas_of(r));
  const int64_t least = std::max<int64_t>(1, ceil_div(r.tiles, most_range()));
  return static_cast<int>(std::max(least, std::min<int64_t>(wanted, r.tiles / kLeastRange)));
}

const char* hidden_weight_grad_unsupported() { return most_range() >= kLeastRange ? nullptr : kRoutingNoRoom; }

void launch_hidden_weight_grad(const HiddenWeightGradParams& p, void* stream) {
  const Routes& r = p.routes;
  if (r.dense_width == 0 || r.width == 0) return;
  const HiddenWeightGradWork work = work_of(p);
  const int64_t ctas = ctas_of(r) * p.splits;
  if (ctas > INT_MAX) fail(kOp, "too many blocks");
  const dim3 grid(static_cast<unsigned>(ctas));
  dispatch_half(p.dtype, [&]<class T>() {
    launch<hidden_weight_grad<T>>(kOp, grid, Shape::kThreads, GradStage::bytes(work.range), stream, work,
                                  tile_shape<Shape>(p.splits));
  });
  if (p.splits == 1) return;
  launch_column_sum(kOp,
                    {.partials = p.partials,
                     .out = {p.dw},
                     .sums = 1,
                     .groups = p.splits,
                     .cols = int64_t{r.num_classes} * r.num_out * r.dense_width * r.num_groups * r.width,
                     .dtype = DType::kFloat32},
                    stream);
}

}  // namespace warpform
