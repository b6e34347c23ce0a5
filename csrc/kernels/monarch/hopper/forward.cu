#include "monarch/hopper/forward.cuh"

#include <algorithm>
#include <climits>

#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "monarch/hopper/launch.h"

namespace warpform {
namespace {

using Shape = MonarchHopperTile<2>;

// By counts, unmeasured. h has to lie in whole panels and be stored 16 columns at a time; of the 64 rhos of a tile at
// least half have to be rhos of one kappa, and blocks of fewer than 64 columns or rows are zeros for the most part.
bool takes(const MonarchParams& p) {
  constexpr int kLeast = 64;
  if (p.blocks2 != Shape::kLambdas || p.rows1 % (16 * Shape::kLambdas) != 0 || p.cols2 % kPanel != 0) return false;
  if (p.cols1 < kLeast || p.rows2 < kLeast || p.cols2 == 0 || p.rows > INT_MAX - Shape::kM) return false;
  const int run = p.rows1 / Shape::kLambdas;
  return 2 * run >= ceil_div(run, Shape::kN) * Shape::kN;
}

bool describe_operands(MonarchHopperWork& work) {
  const MonarchParams& p = work.p;
  const int64_t row_stride = p.rows > 1 ? p.x_stride : int64_t{p.blocks1} * p.cols1;
  const TensorBox x{.data = p.x,
                    .rank = 3,
                    .sizes = {p.cols1, p.blocks1, p.rows},
                    .strides = {p.cols1, row_stride},
                    .box = {kPanel, 1, Shape::kM},
                    .swizzle = Swizzle::k128};
  const TensorBox w1{.data = p.w1,
                     .rank = 3,
                     .sizes = {p.cols1, Shape::kLambdas, p.cols2},
                     .strides = {p.cols1, int64_t{Shape::kLambdas} * p.cols1},
                     .box = {kPanel, 1, Shape::kN},
                     .swizzle = Swizzle::k128};
  const TensorBox w2{.data = p.w2,
                     .rank = 3,
                     .sizes = {p.cols2, p.rows2, Shape::kLambdas},
                     .strides = {p.cols2, int64_t{p.cols2} * p.rows2},
                     .box = {kPanel, Shape::kN, 1},
                     .swizzle = Swizzle::k128};
  return encode_tensor_map(work.x, x) && encode_tensor_map(work.w1, w1) && encode_tensor_map(work.w2, w2);
}

template <class Tile>
void launch_stages(const MonarchHopperWork& work, int ctas, int bytes, void* stream) {
  dispatch_half(work.p.dtype, [&]<class T>() {
    launch<monarch_forward_hopper<T, Tile>>(
        "monarch_multiply", dim3(static_cast<unsigned>(ctas)), Tile::kThreads, bytes, stream, work,
        TileShape{
            .m = Tile::kM, .n = Tile::kLambdas * Tile::kN, .k = Tile::kDepth, .stages = Tile::kStages, .splits = 1});
  });
}

}  // namespace

bool launch_monarch_hopper(const MonarchParams& p, void* stream) {
  if (!takes(p)) return false;
  using Deep = MonarchHopperTile<3>;
  const int h_cols = Shape::kLambdas * p.cols2;
  if (Shape::bytes(h_cols) > shared_memory_limit()) return false;
  MonarchHopperWork work{.x = {}, .w1 = {}, .w2 = {}, .p = p, .run = p.rows1 / Shape::kLambdas, .share = 0, .extra = 0};
  if (!describe_operands(work)) return false;
  const auto tiles = static_cast<int>(ceil_div(p.rows, int64_t{Shape::kM}));
  const int ctas = std::min(tiles, sm_count());
  work.share = tiles / std::max(1, ctas);
  work.extra = tiles - work.share * ctas;
  if (Deep::bytes(h_cols) <= shared_memory_limit()) {
    launch_stages<Deep>(work, ctas, Deep::bytes(h_cols), stream);
  } else {
    launch_stages<Shape>(work, ctas, Shape::bytes(h_cols), stream);
  }
  return true;
}

}  // namespace warpform
