#include "monarch/forward.cuh"

#include <algorithm>
#include <climits>
#include <optional>

#include "common/hopper.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "monarch/hopper/launch.h"

namespace warpform {
namespace {

// Lambdas that a CTA can have by its shared memory, in chunks of about the same size; none where chunks would be so
// small that stores of y fall to pieces.
template <class Tile>
std::optional<MonarchWork> work_of(const MonarchParams& p) {
  MonarchWork work{};
  work.p = p;
  work.pitch = ceil_div(p.cols2, 16) * 16;
  const int room = (shared_memory_limit() - Tile::kStageBytes) / (Tile::kM * 2) / Tile::kDepth * Tile::kDepth;
  int most = std::min(p.blocks2, room / std::max(1, work.pitch));
  if (most < p.blocks2) most = p.blocks2 <= Tile::kLambdas ? 0 : most / Tile::kLambdas * Tile::kLambdas;
  if (most <= 0) return std::nullopt;
  // Few rows: more chunks, that more SMs have work.
  const auto wanted = static_cast<int>(sm_count() / std::max<int64_t>(1, ceil_div(p.rows, int64_t{Tile::kM})));
  const int chunks = p.blocks2 <= Tile::kLambdas
                         ? 1
                         : std::max(ceil_div(p.blocks2, most), std::min(wanted, p.blocks2 / Tile::kLambdas));
  work.chunk = ceil_div(p.blocks2, chunks);
  if (work.chunk < p.blocks2) work.chunk = ceil_div(work.chunk, Tile::kLambdas) * Tile::kLambdas;
  work.chunks.set(ceil_div(p.blocks2, work.chunk));
  const bool divides = p.rows1 % p.blocks2 == 0;
  work.run.set(divides ? p.rows1 / p.blocks2 : (p.rows1 + p.blocks2 - 2) / p.blocks2 + 1);
  work.pairs = divides && work.run.divisor % 2 == 0;
  if (int64_t{p.blocks1} * p.rows1 > INT_MAX) return std::nullopt;
  if (ceil_div(p.rows, int64_t{Tile::kM}) * work.chunks.divisor > INT_MAX) return std::nullopt;
  return work;
}

using FewLambdas = MonarchTile<4>;
using ManyLambdas = MonarchTile<8>;

template <class Tile>
void launch_tile(const MonarchWork& work, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(work.p.rows, int64_t{Tile::kM}) * work.chunks.divisor));
  const int bytes = Tile::bytes(work.chunk * work.pitch);
  dispatch_half(work.p.dtype, [&]<class T>() {
    launch<monarch_forward<T, Tile>>(
        "monarch_multiply", grid, Tile::kThreads, bytes, stream, work,
        TileShape{.m = Tile::kM, .n = Tile::kN1, .k = Tile::kDepth, .stages = Tile::kStages1, .splits = 1});
  });
}

}  // namespace

bool monarch_fits(const MonarchParams& p) {
  return p.blocks2 <= FewLambdas::kLambdas ? work_of<FewLambdas>(p).has_value() : work_of<ManyLambdas>(p).has_value();
}

void launch_monarch(const MonarchParams& p, void* stream) {
#ifdef WARPFORM_WITH_HOPPER
  if (hopper_unusable() == nullptr && launch_monarch_hopper(p, stream)) return;
#endif
  if (p.blocks2 <= FewLambdas::kLambdas) {
    launch_tile<FewLambdas>(*work_of<FewLambdas>(p), stream);
  } else {
    launch_tile<ManyLambdas>(*work_of<ManyLambdas>(p), stream);
  }
}

}  // namespace warpform
