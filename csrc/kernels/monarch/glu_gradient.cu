#include "monarch/glu_gradient.cuh"

#include <climits>

#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {
namespace {

using ManyRows = GluTile<128, 256, 4>;
using FewRows = GluTile<64, 512, 4>;

template <class G>
bool fits(const GluParams& p) {
  return p.in > 0 && p.out > 0 && glu_gradient_bytes<G>(p.in, p.out) <= shared_memory_limit() &&
         glu_ctas<G>(p) <= INT_MAX;
}

template <class G>
void launch_tile(const GluParams& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(glu_ctas<G>(p)));
  const int bytes = glu_gradient_bytes<G>(p.in, p.out);
  dispatch_half(p.dtype, [&]<class T>() {
    launch<glu_gradient<T, G>>(
        "blockdiag_glu_backward", grid, G::kThreads, bytes, stream, glu_work(p),
        TileShape{.m = G::kM, .n = G::kInner, .k = G::kDepth, .stages = G::kStages, .splits = 1});
  });
}

}  // namespace

bool glu_gradient_fits(const GluParams& p) { return fits<ManyRows>(p) || fits<FewRows>(p); }

void launch_glu_gradient(const GluParams& p, void* stream) {
  if (p.rows == 0 || p.inner == 0) return;
  if (fits<ManyRows>(p) && (glu_ctas<ManyRows>(p) >= sm_count() || !fits<FewRows>(p))) {
    launch_tile<ManyRows>(p, stream);
  } else {
    launch_tile<FewRows>(p, stream);
  }
}

}  // namespace warpform
