// The launch of depthwise_forward.cuh for either end. Each end's kernels are compiled in one file.
#pragma once

#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "spatial/depthwise_forward.cuh"
#include "spatial/tiles.cuh"

namespace warpform {

// Launches the kernel with an end, Activate or ActivateBackward.
template <class End>
void run_depthwise(const char* op, const DepthwiseParams& p, int size, DType dtype, void* stream);
template <>
void run_depthwise<Activate>(const char* op, const DepthwiseParams& p, int size, DType dtype, void* stream);
template <>
void run_depthwise<ActivateBackward>(const char* op, const DepthwiseParams& p, int size, DType dtype, void* stream);

template <class End>
void run_tiles(const char* op, const DepthwiseParams& p, int size, DType dtype, void* stream) {
  const SpatialTiles tiles =
      spatial_tiles(op, dtype, p.shape, p.x, End::kGradient ? p.dout : nullptr, static_cast<const void*>(p.out));
  const SpatialLaunch<DepthwiseParams> params{p, tiles};
  const auto blocks = static_cast<unsigned>(position_tiles(tiles, p.shape) * tiles.channels.divisor);
  dispatch_dtype(dtype, [&]<class T>() {
    dispatch_stencil(size, [&]<int kSize>() {
      launch<depthwise_conv2d_kernel<T, kSize, End>>(op, blocks, kSpatialThreads,
                                                     DepthwiseForward<T, kSize, End>::kSharedBytes, stream, params);
    });
  });
}

}  // namespace warpform
