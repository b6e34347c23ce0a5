#include "routing/weight_gradient.cuh"

#include <algorithm>
#include <climits>
#include <stdexcept>

#include "common/column_sum.h"
#include "device/launch.cuh"

namespace warpform {
namespace {

constexpr const char* kOp = "hidden_weight_grad";
using Shape = HiddenTileShape;
// Tiles of tokens of a range: as few are worth a partial sum, as many have room in the list.
constexpr int kLeastRange = 4, kMostRange = 2048;

int others_of(const Routes& r) { return ceil_div(r.part, Shape::kM) * r.num_out; }
int blocks_of(const Routes& r) { return ceil_div(r.width, kHiddenBlock) * r.num_groups; }

int64_t ctas_of(const Routes& r) { return int64_t{others_of(r)} * ceil_div(blocks_of(r), 2) * r.num_classes; }

template <class T>
void launch_type(const HiddenWeightGradParams& p, void* stream) {
  const Routes& r = p.routes;
  HiddenWeightGradWork work{.p = p,
                            .others = others_of(r),
                            .part_others = ceil_div(r.part, Shape::kM),
                            .pairs = ceil_div(blocks_of(r), 2),
                            .group_blocks = {},
                            .blocks = blocks_of(r),
                            .range = ceil_div(r.tiles, p.splits)};
  work.group_blocks.set(ceil_div(r.width, kHiddenBlock));
  const int64_t ctas = ctas_of(r) * p.splits;
  if (ctas > INT_MAX) throw std::runtime_error(std::string(kOp) + ": too many blocks");
  launch<hidden_weight_grad<T>>(kOp, dim3(static_cast<unsigned>(ctas)), Shape::kThreads, GradStage::bytes(work.range),
                                stream, work);
}

}  // namespace

int hidden_weight_grad_splits(const Routes& r) {
  const int64_t places = int64_t{Shape::kCtas} * sm_count();
  const int64_t wanted = places / std::max<int64_t>(1, ctas_of(r));
  const int64_t least = std::max<int64_t>(1, ceil_div(r.tiles, kMostRange));
  return static_cast<int>(std::max(least, std::min<int64_t>(wanted, r.tiles / kLeastRange)));
}

void launch_hidden_weight_grad(const HiddenWeightGradParams& p, void* stream) {
  const Routes& r = p.routes;
  if (r.part == 0 || r.width == 0) return;
  if (p.bfloat16) {
    launch_type<bf16_t>(p, stream);
  } else {
    launch_type<half_t>(p, stream);
  }
  if (p.splits == 1) return;
  launch_column_sum(kOp,
                    {.partials = p.partials,
                     .out = {p.dw},
                     .sums = 1,
                     .groups = p.splits,
                     .cols = int64_t{r.num_classes} * r.num_out * r.part * r.num_groups * r.width,
                     .dtype = DType::kFloat32},
                    stream);
}

}  // namespace warpform
