#include "monarch/glu.cuh"

#include <algorithm>
#include <climits>

#include "device/launch.cuh"

namespace warpform {
namespace {

using NarrowBlocks = GluTile<128, 256, 4>;
using WideBlocks = GluTile<64, 512, 2>;

template <class G>
int64_t ctas(const GluParams& p) {
  return ceil_div(p.rows, int64_t{G::kM}) * p.blocks;
}

template <class G>
bool fits(const GluParams& p) {
  return std::max(p.in, p.out) <= G::kMaxWidth && p.in > 0 && G::bytes(p.in) <= shared_memory_limit() &&
         ctas<G>(p) <= INT_MAX;
}

template <class G>
void launch_tile(const GluParams& p, void* stream) {
  GluWork work{.p = p, .blocks = {}};
  work.blocks.set(p.blocks);
  const dim3 grid(static_cast<unsigned>(ctas<G>(p)));
  if (p.bfloat16) {
    launch<glu_forward<bf16_t, G>>("blockdiag_glu", grid, G::kThreads, G::bytes(p.in), stream, work);
  } else {
    launch<glu_forward<half_t, G>>("blockdiag_glu", grid, G::kThreads, G::bytes(p.in), stream, work);
  }
}

}  // namespace

bool glu_fits(const GluParams& p) { return fits<NarrowBlocks>(p) || fits<WideBlocks>(p); }

void launch_glu(const GluParams& p, void* stream) {
  if (p.rows == 0 || p.out == 0) return;
  if (fits<NarrowBlocks>(p) && (ctas<NarrowBlocks>(p) >= sm_count() || !fits<WideBlocks>(p))) {
    launch_tile<NarrowBlocks>(p, stream);
  } else {
    launch_tile<WideBlocks>(p, stream);
  }
}

}  // namespace warpform
