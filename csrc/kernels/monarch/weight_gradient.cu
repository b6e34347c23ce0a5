#include "monarch/weight_gradient.cuh"

#include <algorithm>
#include <climits>

#include "common/column_sum.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {
namespace {

constexpr int kLeastRange = 512;  // rows that are worth a partial sum

// At least one: the sums of a's columns are needed even if b has no columns.
template <class Tile>
int tiles_n(const WeightGradientParams& p) {
  return std::max(1, ceil_div(p.n, Tile::kN));
}

template <class Tile>
int64_t tiles(const WeightGradientParams& p) {
  return int64_t{ceil_div(p.m, Tile::kM)} * tiles_n<Tile>(p) * p.groups;
}

bool is_large(const WeightGradientParams& p) { return p.m > SmallTile::kM && p.n > SmallTile::kN; }

template <class T, class Tile>
void launch_tile(const char* op, const WeightGradientParams& p, void* stream) {
  const int64_t range = ceil_div(ceil_div(p.rows, int64_t{p.splits}), int64_t{Tile::kDepth}) * Tile::kDepth;
  const WeightGradientWork work{p, range, ceil_div(p.m, Tile::kM), tiles_n<Tile>(p)};
  const int64_t ctas = tiles<Tile>(p) * p.splits;
  if (ctas > INT_MAX) fail(op, "too many blocks");
  launch<block_weight_gradient<T, Tile>>(op, dim3(static_cast<unsigned>(ctas)), Tile::kThreads, Tile::kBytes, stream,
                                         work, tile_shape<Tile>(p.splits));
}

}  // namespace

int weight_gradient_splits(const WeightGradientParams& p) {
  const int64_t ctas = is_large(p) ? tiles<LargeTile>(p) : tiles<SmallTile>(p);
  const int64_t places = int64_t{SmallTile::kCtas} * sm_count();
  return static_cast<int>(
      std::clamp<int64_t>(p.rows / kLeastRange, 1, std::max<int64_t>(1, places / std::max<int64_t>(1, ctas))));
}

void launch_weight_gradient(const char* op, const WeightGradientParams& params, void* stream) {
  if (params.groups == 0 || params.m == 0) return;
  dispatch_half(params.dtype, [&]<class T>() {
    is_large(params) ? launch_tile<T, LargeTile>(op, params, stream) : launch_tile<T, SmallTile>(op, params, stream);
  });
  if (params.splits == 1) return;
  const auto add_splits = [&](const float* partials, void* out, int64_t cols) {
    const ColumnSumParams sum{
        .partials = partials, .out = {out}, .sums = 1, .groups = params.splits, .cols = cols, .dtype = params.dtype};
    launch_column_sum(op, sum, stream);
  };
  add_splits(params.dw_partials, params.dw, int64_t{params.groups} * params.m * params.n);
  if (params.dbias != nullptr) add_splits(params.dbias_partials, params.dbias, int64_t{params.groups} * params.m);
}

}  // namespace warpform
