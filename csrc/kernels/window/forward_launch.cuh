// Instantiation of the forward kernels of one head dimension bucket.
#pragma once

#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "window/forward.cuh"
#include "window/instances.h"

namespace warpform {

template <int kBucket>
void launch_window_forward(const WindowForwardParams& params, void* stream) {
  const WindowProblem& p = params.problem;
  const int groups = ceil_div(p.heads, window_teams(kBucket));
  const int shares = window_shares(int64_t{p.windows} * p.blocks.divisor, groups, window_forward_ctas(kBucket));
  dispatch_half(p.dtype, [&]<class T>() {
    launch<window_attention_forward<T, kBucket>>(
        "window_attention", dim3(shares, groups), window_threads(kBucket), window_forward_shared_bytes(p, kBucket),
        stream, params, TileShape{.m = kBlock, .n = kBlock, .k = kBucket, .stages = 1, .splits = 1});
  });
}

}  // namespace warpform
