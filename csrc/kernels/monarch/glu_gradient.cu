#include "monarch/glu_gradient.cuh"

#include <climits>

#include "device/launch.cuh"

namespace warpform {
namespace {

using ManyRows = GluTile<128, 256, 4>;
using FewRows = GluTile<64, 512, 4>;

template <class G>
int64_t ctas(const GluParams& p) {
  return ceil_div(p.rows, int64_t{G::kM}) * p.blocks;
}

template <class G>
bool fits(const GluParams& p) {
  return p.in > 0 && p.out > 0 && glu_gradient_bytes<G>(p.in, p.out) <= shared_memory_limit() && ctas<G>(p) <= INT_MAX;
}

template <class G>
void launch_tile(const GluParams& p, void* stream) {
  GluWork work{.p = p, .blocks = {}};
  work.blocks.set(p.blocks);
  const dim3 grid(static_cast<unsigned>(ctas<G>(p)));
  const int bytes = glu_gradient_bytes<G>(p.in, p.out);
  if (p.bfloat16) {
    launch<glu_gradient<bf16_t, G>>("blockdiag_glu_backward", grid, G::kThreads, bytes, stream, work);
  } else {
    launch<glu_gradient<half_t, G>>("blockdiag_glu_backward", grid, G::kThreads, bytes, stream, work);
  }
}

}  // namespace

bool glu_gradient_fits(const GluParams& p) { return fits<ManyRows>(p) || fits<FewRows>(p); }

void launch_glu_gradient(const GluParams& p, void* stream) {
  if (p.rows == 0 || p.inner == 0) return;
  if (fits<ManyRows>(p) && (ctas<ManyRows>(p) >= sm_count() || !fits<FewRows>(p))) {
    launch_tile<ManyRows>(p, stream);
  } else {
    launch_tile<FewRows>(p, stream);
  }
}

}  // namespace warpform
