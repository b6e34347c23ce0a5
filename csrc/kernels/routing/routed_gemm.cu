// The routed layers: the choice between GEMM (routed_gemm.cuh; on wgmma hopper/routed_gemm.cuh) and GEMV (gemv.cuh), and
// the launches.
#include "routing/routed_gemm.cuh"

#include <algorithm>
#include <climits>

#include "common/column_sum.h"
#include "common/hopper.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "routing/gemv.cuh"
#include "routing/hopper/launch.h"

namespace warpform {
namespace {

using Shape = HiddenTileShape;
// Every GPU from sm_80 on allows a block this much shared memory; without gates the products need no more.
constexpr int kLeastSharedMemory = 99 * 1024;
static_assert(Shape::kBytes + TileTokens::bytes(0) <= kLeastSharedMemory);

dim3 grid_of(const char* op, int64_t ctas) {
  if (ctas > INT_MAX) fail(op, "too many tokens");
  return dim3(static_cast<unsigned>(ctas));
}

// True if the GEMV kernels run. Up to kGemvTokens tokens would fill a thirtieth of a tile, and the time is that of
// reading the weight, which GEMV does once and without the plan's order. It multiplies whole rows of the weight, whose
// inputs must be contiguous; it knows one class and one part, computes no dots, and holds the tokens in shared memory.
bool takes_gemv(const Routes& r, const RoutedWeight& w, bool wants_dots, int shared_bytes) {
  return r.tokens <= kGemvTokens && r.num_classes == 1 && r.num_out == 1 && !w.transposed && !wants_dots &&
         shared_bytes <= shared_memory_limit();
}

int gather_bytes(const Routes& r, bool has_gates) {
  return Shape::kBytes + TileTokens::bytes(has_gates ? r.num_groups : 0);
}

// A warp computes one output at a time, and several in turn where there are many: x is fetched once for all of them.
dim3 gemv_grid(int outputs) {
  const int blocks = ceil_div(outputs, kGemvWarps);
  return dim3(static_cast<unsigned>(std::min(blocks, 4 * sm_count())));
}

template <class T>
void gather(const char* op, const HiddenGatherParams& p, void* stream) {
  const Routes& r = p.routes;
  const int gemv_bytes = gather_gemv_bytes(r.num_groups, r.width);
  if (takes_gemv(r, p.w, /*wants_dots=*/false, gemv_bytes)) {
    HiddenGatherGemvWork work{p, {}};
    work.vectors.set(r.width / kVector);
    launch<hidden_gather_gemv<T>>(op, gemv_grid(r.dense_width), kGemvThreads, gemv_bytes, stream, work);
    return;
  }
#ifdef WARPFORM_WITH_HOPPER
  if (hopper_unusable() == nullptr && launch_hidden_gather_hopper(op, p, stream)) return;
#endif
  HiddenGatherWork work{.p = p, .columns = {}, .part_columns = ceil_div(r.dense_width, Shape::kN)};
  work.columns.set(work.part_columns * r.num_out);
  const dim3 grid = grid_of(op, int64_t{r.tiles} * work.columns.divisor);
  const int bytes = gather_bytes(r, p.gates != nullptr);
  dispatch_bool(p.w.transposed, [&]<bool kTransposed>() {
    launch<hidden_gather<T, kTransposed>>(op, grid, Shape::kThreads, bytes, stream, work, tile_shape<Shape>(1));
  });
}

// The sum of the dots of a group's blocks, if it has several.
void sum_dots(const char* op, const HiddenScatterParams& p, void* stream) {
  const Routes& r = p.routes;
  const int group_blocks = ceil_div(r.width, kHiddenBlock);
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

template <class T>
void scatter(const char* op, const HiddenScatterParams& p, void* stream) {
  const Routes& r = p.routes;
  const int gemv_bytes = scatter_gemv_bytes(r.dense_width);
  if (takes_gemv(r, p.w, p.dots != nullptr, gemv_bytes)) {
    HiddenScatterGemvWork work{p, {}};
    work.width.set(r.width);
    launch<hidden_scatter_gemv<T>>(op, gemv_grid(r.num_groups * r.width), kGemvThreads, gemv_bytes, stream, work);
    return;
  }
#ifdef WARPFORM_WITH_HOPPER
  if (hopper_unusable() == nullptr && launch_hidden_scatter_hopper(op, p, stream)) return sum_dots(op, p, stream);
#endif
  const int group_blocks = ceil_div(r.width, kHiddenBlock);
  HiddenScatterWork work{.p = p, .columns = {}, .group_blocks = {}, .blocks = group_blocks * r.num_groups};
  work.group_blocks.set(group_blocks);
  work.columns.set(ceil_div(work.blocks, 2));
  const dim3 grid = grid_of(op, int64_t{r.tiles} * work.columns.divisor);
  constexpr int kBytes = Shape::kBytes + TileTokens::bytes(0);
  dispatch_bool(p.w.transposed, [&]<bool kTransposed>() {
    launch<hidden_scatter<T, kTransposed>>(op, grid, Shape::kThreads, kBytes, stream, work, tile_shape<Shape>(1));
  });
  sum_dots(op, p, stream);
}

}  // namespace

const char* hidden_gather_unsupported(const Routes& r, const RoutedWeight& w, bool has_gates) {
  if (takes_gemv(r, w, /*wants_dots=*/false, gather_gemv_bytes(r.num_groups, r.width))) return nullptr;
  return gather_bytes(r, has_gates) <= shared_memory_limit() ? nullptr : kRoutingNoRoom;
}

void launch_hidden_gather(const char* op, const HiddenGatherParams& p, void* stream) {
  if (p.routes.tokens == 0 || p.routes.dense_width == 0) return;
  dispatch_half(p.dtype, [&]<class T>() { gather<T>(op, p, stream); });
}

void launch_hidden_scatter(const char* op, const HiddenScatterParams& p, void* stream) {
  if (p.routes.tokens == 0 || p.routes.width == 0) return;
  dispatch_half(p.dtype, [&]<class T>() { scatter<T>(op, p, stream); });
}

}  // namespace warpform
