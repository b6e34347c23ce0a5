#include "common/column_sum.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "spatial/depthwise_backward.cuh"
#include "spatial/depthwise_launch.cuh"

namespace warpform {
namespace {

constexpr const char* kOp = "depthwise_conv2d_backward";

constexpr int blocks_per_sm(int size) {
  return size == 3   ? DepthwiseBackward<half_t, 3>::kBlocksPerSm
         : size == 5 ? DepthwiseBackward<half_t, 5>::kBlocksPerSm
                     : DepthwiseBackward<half_t, 7>::kBlocksPerSm;
}

}  // namespace

int64_t depthwise_conv2d_backward_groups(const DepthwiseConv2dBackwardParams& p) {
  if (elements_of(p.shape) == 0) return 0;
  // Enough blocks to fill the GPU once, each with as many tiles as possible: few partial sums.
  const SpatialTiles tiles = spatial_tiles(kOp, p.dtype, p.shape, p.x);
  const int64_t blocks = int64_t{blocks_per_sm(p.kernel_size)} * sm_count();
  return std::clamp<int64_t>(blocks / tiles.channels.divisor, 1, position_tiles(tiles, p.shape));
}

void launch_depthwise_conv2d_backward(const DepthwiseConv2dBackwardParams& p, void* stream) {
  const int64_t channels = p.shape.channels, taps = int64_t{p.kernel_size} * p.kernel_size;
  if (channels == 0) return;
  float* const bias_partials = p.bias != nullptr ? p.partials + p.groups * channels * taps : nullptr;
  if (p.groups > 0) {
    const void* dpre = p.dout;
    if (p.activation != Activation::kLinear) {
      run_depthwise<ActivateBackward>(kOp,
                                      {.x = p.x,
                                       .weight = p.weight,
                                       .bias = p.bias,
                                       .dout = p.dout,
                                       .out = p.dpre,
                                       .shape = p.shape,
                                       .activation = p.activation,
                                       .flipped = false},
                                      p.kernel_size, p.dtype, stream);
      dpre = p.dpre;
    }
    if (!gives_all_gradients(p.kernel_size)) {
      run_depthwise<Activate>(kOp,
                              {.x = dpre,
                               .weight = p.weight,
                               .bias = nullptr,
                               .dout = nullptr,
                               .out = p.dx,
                               .shape = p.shape,
                               .activation = Activation::kLinear,
                               .flipped = true},
                              p.kernel_size, p.dtype, stream);
    }
    const SpatialTiles tiles = spatial_tiles(kOp, p.dtype, p.shape, dpre, p.x, p.dx);
    const SpatialLaunch<DepthwiseGradientParams> params{{.dpre = dpre,
                                                         .x = p.x,
                                                         .weight = p.weight,
                                                         .dx = p.dx,
                                                         .partials = p.partials,
                                                         .bias_partials = bias_partials,
                                                         .groups = p.groups,
                                                         .shape = p.shape},
                                                        tiles};
    const auto blocks = static_cast<unsigned>(p.groups * tiles.channels.divisor);
    dispatch_dtype(p.dtype, [&]<class T>() {
      dispatch_stencil(p.kernel_size, [&]<int kSize>() {
        launch<depthwise_conv2d_backward_kernel<T, kSize>>(kOp, blocks, kSpatialThreads,
                                                           DepthwiseBackward<T, kSize>::kSharedBytes, stream, params);
      });
    });
  }
  const auto add_up = [&](const float* partials, void* out, int64_t cols) {
    launch_column_sum(
        kOp, {.partials = partials, .out = {out}, .sums = 1, .groups = p.groups, .cols = cols, .dtype = p.dtype},
        stream);
  };
  add_up(p.partials, p.dweight, channels * taps);
  if (p.bias != nullptr) add_up(bias_partials, p.dbias, channels);
}

}  // namespace warpform
