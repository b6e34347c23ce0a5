#include "monarch/gate.cuh"

#include <climits>

#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {

void launch_gate(const char* op, const GateParams& params, void* stream) {
  if (params.rows == 0 || params.cols == 0) return;
  GateWork work{.p = params, .parts = {}};
  const int64_t parts = ceil_div(params.cols, int64_t{kGateCols});
  if (params.rows * parts > INT_MAX) fail(op, "too many tokens");
  work.parts.set(static_cast<int>(parts));
  const auto ctas = static_cast<unsigned>(params.rows * parts);
  dispatch_half(params.dtype, [&]<class T>() {
    dispatch_bool(params.da != nullptr,
                  [&]<bool kBackward>() { launch<gate<T, kBackward>>(op, dim3(ctas), kGateThreads, 0, stream, work); });
  });
}

}  // namespace warpform
