// depthwise_conv2d: x [batch, height, width, channels] convolved with a filter of kSize by kSize taps for each channel,
// zeros around the grid, plus a bias, through an activation. Its backward pass takes the same kernel with another end,
// for the gradient before the activation, dpre = dout activation'(pre), and for dx from dpre where there are more than
// 3 by 3 taps.
//
// Tile: see tile.cuh; cp.async brings x with its halo (and dout without), and a block works on one tile, so that the
// loads of some blocks of an SM run under the arithmetic of others. Sums: see stencil.cuh.
//
// Bytes: x read and out written, 4 a channel and position in 16-bit types. PyTorch needs two transposes, the
// convolution and the activation for it, 16. MiT-B5 at 512 x 512 has 79 M elements an image in its 52 layers: 74 us at
// an H200's 4.3 TB/s. The halo, 41 % of a tile for three taps, comes from L2.
// Instructions, of which the card has time for some 28 an element beside its 4 bytes: for 3 x 3 taps 9 FMA, 4 for loads
// and conversions, 3 for the copy in and the store, and addresses and tests beside these 16, which were not counted:
// bytes bound it, not by much. GELU adds about 25 (erff), and then instructions bound it by 1.5 or more. 5 x 5 taps and
// more are bound by their FMA. For dpre (6 bytes, time for 41) it is 50.
// Measured: not yet.
#pragma once

#include "common/gelu.cuh"
#include "spatial/stencil.cuh"

namespace warpform {

// What the kernel takes.
struct DepthwiseParams {
  const void* x;
  const void* weight;
  const void* bias;  // or null
  const void* dout;  // of the gradient
  void* out;
  SpatialShape shape;
  Activation activation;
  bool flipped;  // the taps in the opposite order, as the gradient of x has them
};

// The end of the convolution: its activation.
struct Activate {
  static constexpr bool kGradient = false;

  static __device__ __forceinline__ float apply(Activation activation, float pre, float) {
    if (activation == Activation::kGelu) return ErfGelu::value(pre);
    if (activation == Activation::kRelu) return pre < 0.f ? 0.f : pre;
    return pre;
  }
};
// The end of its backward pass: the gradient through the activation.
struct ActivateBackward {
  static constexpr bool kGradient = true;

  static __device__ __forceinline__ float apply(Activation activation, float pre, float dout) {
    if (activation == Activation::kGelu) return dout * ErfGelu::derivative(pre);
    if (activation == Activation::kRelu) return pre <= 0.f ? 0.f : dout;
    return dout;
  }
};

template <class T, int kSize, class End>
struct DepthwiseForward {
  static constexpr int kHalo = kSize / 2;
  static constexpr int kBlocksPerSm = kSize == 3 ? (End::kGradient ? 4 : 6) : kSize == 5 ? 3 : 2;
  static constexpr int kTileBytes = HaloTile<kHalo>::kBytes;
  static constexpr int kDoutBytes = End::kGradient ? HaloTile<0>::kBytes : 0;
  static constexpr int kSharedBytes = kTileBytes + kDoutBytes + LearnedTaps<T, kSize>::kBytes;
};

template <class T, int kSize, class End>
__global__ void __launch_bounds__(kSpatialThreads, DepthwiseForward<T, kSize, End>::kBlocksPerSm)
depthwise_conv2d_kernel(const SpatialLaunch<DepthwiseParams> params) {
  using Kernel = DepthwiseForward<T, kSize, End>;
  constexpr int kPack = SpatialElements<T>::kPack;
  const DepthwiseParams& p = params.p;
  const SpatialShape& shape = p.shape;
  const bool vectors = params.tiles.vectors;
  const TileOrigin at = origin_of_block<T>(params.tiles);
  const uint32_t tile = shared_base(), dout = tile + Kernel::kTileBytes, staged = dout + Kernel::kDoutBytes;
  copy_tile<Kernel::kHalo>(tile, static_cast<const T*>(p.x), at, shape, vectors);
  if constexpr (End::kGradient) copy_tile<0>(dout, static_cast<const T*>(p.dout), at, shape, vectors);
  stage_taps<T, kSize>(staged, p.weight, at.channel, shape.channels, p.flipped);
  wait_for_tiles();

  const SpatialThread<T> me;
  if (at.col + me.strip >= shape.width) return;
  LearnedTaps<T, kSize> taps(staged);
  const int channel = me.channel(at);
  if (p.bias != nullptr) {
#pragma unroll
    for (int q = 0; q < kPack; ++q) {
      if (channel + q < shape.channels)
        taps.start[q] = to_float(load_global(static_cast<const T*>(p.bias) + channel + q));
    }
  }
  const int64_t row_step = shape.width * shape.channels;
  T* const out = static_cast<T*>(p.out) + offset_of_thread<T>(at, shape);
  const auto finish = [&](int r, float (&sums)[kStrip][kPack]) {
    if (at.row + r >= shape.height) return false;
#pragma unroll
    for (int c = 0; c < kStrip; ++c) {
      Vec<T, kPack> gradient{};
      if constexpr (End::kGradient) gradient = me.template word<0>(dout, r, c);
#pragma unroll
      for (int q = 0; q < kPack; ++q) sums[c][q] = End::apply(p.activation, sums[c][q], to_float(gradient[q]));
    }
    store_strip(out + r * row_step, sums, at, shape, vectors);
    return true;
  };
  if (taps.finite) {
    slide<T, kSize>(
        tile, taps, [](int, const auto&) {}, [&](int r, auto& sums, const auto&) { return finish(r, sums); });
  } else {
    slide_checked<T, kSize>(tile, taps, at, shape, finish);
  }
}

}  // namespace warpform
