// The routed layers: which of their kernels runs.
#include "routing/routed_gemm.cuh"

#include <algorithm>
#include <climits>
#include <stdexcept>

#include "common/column_sum.h"
#include "device/launch.cuh"
#include "routing/gemv.cuh"

namespace warpform {
namespace {

using Shape = HiddenTileShape;

dim3 grid_of(const char* op, int64_t ctas) {
  if (ctas > INT_MAX) throw std::runtime_error(std::string(op) + ": too many tokens");
  return dim3(static_cast<unsigned>(ctas));
}

// One row of the weight a warp and turn, a few turns where there are many rows: x is fetched once for all of them.
dim3 few_grid(int outputs) {
  const int blocks = ceil_div(outputs, kFewWarps);
  return dim3(static_cast<unsigned>(std::min(blocks, 4 * sm_count())));
}

bool is_few(const Routes& r, const RoutedWeight& w, int shared_bytes) {
  return r.tokens <= kFewTokens && r.num_classes == 1 && r.num_out == 1 && !w.transposed &&
         shared_bytes <= shared_memory_limit();
}

template <class T>
void gather(const char* op, const HiddenGatherParams& p, void* stream) {
  const Routes& r = p.routes;
  const int few_bytes = few_gather_bytes(r.num_groups, r.width);
  if (is_few(r, p.w, few_bytes)) {
    HiddenFewGatherWork work{p, {}};
    work.vectors.set(r.width / kVector);
    launch<hidden_gather_few<T>>(op, few_grid(r.part), kFewThreads, few_bytes, stream, work);
    return;
  }
  HiddenGatherWork work{.p = p, .columns = {}, .part_columns = ceil_div(r.part, Shape::kN)};
  work.columns.set(work.part_columns * r.num_out);
  const dim3 grid = grid_of(op, int64_t{r.tiles} * work.columns.divisor);
  const int bytes = Shape::kBytes + TileTokens::bytes(p.gates == nullptr ? 0 : r.num_groups);
  if (p.w.transposed) {
    launch<hidden_gather<T, true>>(op, grid, Shape::kThreads, bytes, stream, work);
  } else {
    launch<hidden_gather<T, false>>(op, grid, Shape::kThreads, bytes, stream, work);
  }
}

template <class T>
void scatter(const char* op, const HiddenScatterParams& p, void* stream) {
  const Routes& r = p.routes;
  if (p.dots == nullptr && is_few(r, p.w, few_scatter_bytes(r.part))) {
    HiddenFewScatterWork work{p, {}};
    work.width.set(r.width);
    launch<hidden_scatter_few<T>>(op, few_grid(r.num_groups * r.width), kFewThreads, few_scatter_bytes(r.part), stream,
                                  work);
    return;
  }
  const int group_blocks = ceil_div(r.width, kHiddenBlock);
  HiddenScatterWork work{.p = p, .columns = {}, .group_blocks = {}, .blocks = group_blocks * r.num_groups};
  work.group_blocks.set(group_blocks);
  work.columns.set(ceil_div(work.blocks, 2));
  const dim3 grid = grid_of(op, int64_t{r.tiles} * work.columns.divisor);
  const int bytes = Shape::kBytes + TileTokens::bytes(0);
  if (p.w.transposed) {
    launch<hidden_scatter<T, true>>(op, grid, Shape::kThreads, bytes, stream, work);
  } else {
    launch<hidden_scatter<T, false>>(op, grid, Shape::kThreads, bytes, stream, work);
  }
  if (p.dots == nullptr || group_blocks == 1) return;
  launch_column_sum(op,
                    {.partials = p.dot_partials,
                     .out = {p.dots},
                     .sums = 1,
                     .groups = group_blocks,
                     .cols = int64_t{r.tokens} * r.num_groups,
                     .dtype = DType::kFloat32},
                    stream);
}

}  // namespace

void launch_hidden_gather(const char* op, const HiddenGatherParams& p, void* stream) {
  if (p.routes.tokens == 0 || p.routes.part == 0) return;
  if (p.bfloat16) {
    gather<bf16_t>(op, p, stream);
  } else {
    gather<half_t>(op, p, stream);
  }
}

void launch_hidden_scatter(const char* op, const HiddenScatterParams& p, void* stream) {
  if (p.routes.tokens == 0 || p.routes.width == 0) return;
  if (p.bfloat16) {
    scatter<bf16_t>(op, p, stream);
  } else {
    scatter<half_t>(op, p, stream);
  }
}

}  // namespace warpform
