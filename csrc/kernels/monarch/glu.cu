#include "monarch/glu.cuh"

#include <algorithm>
#include <climits>

#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {
namespace {

using NarrowBlocks = GluTile<128, 256, 4>;
using WideBlocks = GluTile<64, 512, 2>;

template <class G>
bool fits(const GluParams& p) {
  return std::max(p.in, p.out) <= G::kMaxWidth && p.in > 0 && G::bytes(p.in) <= shared_memory_limit() &&
         glu_ctas<G>(p) <= INT_MAX;
}

template <class G>
void launch_tile(const GluParams& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(glu_ctas<G>(p)));
  dispatch_half(p.dtype, [&]<class T>() {
    launch<glu_forward<T, G>>("blockdiag_glu", grid, G::kThreads, G::bytes(p.in), stream, glu_work(p),
                              TileShape{.m = G::kM, .n = G::kInner, .k = G::kDepth, .stages = G::kStages, .splits = 1});
  });
}

}  // namespace

bool glu_fits(const GluParams& p) { return fits<NarrowBlocks>(p) || fits<WideBlocks>(p); }

void launch_glu(const GluParams& p, void* stream) {
  if (p.rows == 0 || p.out == 0) return;
  if (fits<NarrowBlocks>(p) && (glu_ctas<NarrowBlocks>(p) >= sm_count() || !fits<WideBlocks>(p))) {
    launch_tile<NarrowBlocks>(p, stream);
  } else {
    launch_tile<WideBlocks>(p, stream);
  }
}

}  // namespace warpform
