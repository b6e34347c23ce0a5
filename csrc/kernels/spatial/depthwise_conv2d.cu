#include "spatial/depthwise_launch.cuh"

namespace warpform {

template <>
void run_depthwise<Activate>(const char* op, const DepthwiseParams& p, int size, DType dtype, void* stream) {
  run_tiles<Activate>(op, p, size, dtype, stream);
}

void launch_depthwise_conv2d(const DepthwiseConv2dParams& p, void* stream) {
  if (elements_of(p.shape) == 0) return;
  run_depthwise<Activate>("depthwise_conv2d",
                          {.x = p.x,
                           .weight = p.weight,
                           .bias = p.bias,
                           .dout = nullptr,
                           .out = p.out,
                           .shape = p.shape,
                           .activation = p.activation,
                           .flipped = false},
                          p.kernel_size, p.dtype, stream);
}

}  // namespace warpform
