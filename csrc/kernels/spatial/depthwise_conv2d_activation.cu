// The backward pass through the activation, in a file of its own so that the build runs in parallel.
#include "spatial/depthwise_launch.cuh"

namespace warpform {

template <>
void run_depthwise<ActivateBackward>(const char* op, const DepthwiseParams& p, int size, DType dtype, void* stream) {
  run_tiles<ActivateBackward>(op, p, size, dtype, stream);
}

}  // namespace warpform
