// Which routed layers take the kernels for compute capability 9.0.
#include "routing/hopper/instances.h"

namespace warpform {
namespace {

// By counts, unmeasured. A step is 64 deep, and the depth or the columns of a group come by 64: below that, half of a
// product and more is for nothing, as it is on mma.sync, and the problem is small. Any number of tokens: tiles of tokens
// are those of mma.sync, a product of 128 x 128 takes half as long, and loads run twice as far ahead.
bool takes(const Routes& r) {
  constexpr int kLeast = 64;
  return r.width >= kLeast && r.dense_width >= kLeast;
}

}  // namespace

bool launch_hidden_gather_hopper(const char* op, const HiddenGatherParams& params, void* stream) {
  if (!takes(params.routes)) return false;
  return params.w.transposed ? launch_hidden_gather_hopper_as<Major::kOuter>(op, params, stream)
                             : launch_hidden_gather_hopper_as<Major::kDepth>(op, params, stream);
}

bool launch_hidden_scatter_hopper(const char* op, const HiddenScatterParams& params, void* stream) {
  if (!takes(params.routes)) return false;
  return params.w.transposed ? launch_hidden_scatter_hopper_as<Major::kOuter>(op, params, stream)
                             : launch_hidden_scatter_hopper_as<Major::kDepth>(op, params, stream);
}

}  // namespace warpform
