#include "monarch/gate.cuh"

#include <climits>
#include <stdexcept>

#include "device/launch.cuh"

namespace warpform {
namespace {

template <class T>
void launch_type(const char* op, const GateWork& work, unsigned ctas, void* stream) {
  if (work.p.da != nullptr) {
    launch<gate<T, true>>(op, dim3(ctas), kGateThreads, 0, stream, work);
  } else {
    launch<gate<T, false>>(op, dim3(ctas), kGateThreads, 0, stream, work);
  }
}

}  // namespace

void launch_gate(const char* op, const GateParams& params, void* stream) {
  if (params.rows == 0 || params.cols == 0) return;
  GateWork work{.p = params, .parts = {}};
  const int64_t parts = ceil_div(params.cols, int64_t{kGateCols});
  if (params.rows * parts > INT_MAX) throw std::runtime_error(std::string(op) + ": too many tokens");
  work.parts.set(static_cast<int>(parts));
  const auto ctas = static_cast<unsigned>(params.rows * parts);
  if (params.bfloat16) {
    launch_type<bf16_t>(op, work, ctas, stream);
  } else {
    launch_type<half_t>(op, work, ctas, stream);
  }
}

}  // namespace warpform
