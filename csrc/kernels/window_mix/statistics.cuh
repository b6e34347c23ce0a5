// Mean and rstd of tokens that do not lie whole in a tile of window mixing.
//
// Tile      a warp a token, whose elements it reads twice: the second time from L1.
// Bounds    bytes, 2 an element of 16 bits; of maps that L2 holds they are the bytes that product.cuh finds there.
// Measured  not yet.
#pragma once

#include "device/reduce.cuh"
#include "window_mix/tile.cuh"

namespace warpform {

constexpr int kMixStatisticsRows = kMixThreads / kWarpSize;  // tokens of a CTA

template <class T>
__global__ void __launch_bounds__(kMixThreads) window_mix_statistics(const __grid_constant__ WindowMixProblem p) {
  constexpr int kVec = MixShape<T>::kVec;
  const int64_t token = int64_t{blockIdx.x} * kMixStatisticsRows + warp_id();
  if (token >= p.batch * p.image_tokens) return;  // the whole warp
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  const auto for_each = [&](auto&& f) {
    for (int channel = lane_id() * kVec; channel < p.channels; channel += kWarpSize * kVec) {
      const int count = min(kVec, p.channels - channel);
      const auto chunk = load_chunk(x + channel, count, p.vectors);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (e < count) f(to_float(chunk[e]));
      }
    }
  };
  const auto n = static_cast<float>(p.channels);
  float mean = 0, differences = 0, squares = 0;
  for_each([&](float v) { mean += v; });
  mean = warp_reduce(mean, Sum{}) / n;
  for_each([&](float v) {
    differences += v - mean;
    squares += (v - mean) * (v - mean);
  });
  differences = warp_reduce(differences, Sum{});
  squares = warp_reduce(squares, Sum{});
  if (lane_id() == 0) {
    store_global(p.mean + token, mean);
    store_global(p.rstd + token, rstd_of(differences, squares, n, p.eps));
  }
}

}  // namespace warpform
