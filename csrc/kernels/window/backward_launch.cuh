// Instantiation and order of the backward kernels of one head dimension bucket.
#pragma once

#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "window/backward_long.cuh"
#include "window/backward_short.cuh"
#include "window/instances.h"

namespace warpform {

template <class T, int kBucket>
void launch_window_backward_kernels(const WindowBackwardParams& params, void* stream) {
  constexpr const char* kName = "window_attention_backward";
  constexpr int kThreads = window_threads(kBucket);
  const WindowProblem& p = params.problem;
  const dim3 grid(params.shares, ceil_div(p.heads, window_teams(kBucket)));
  if (p.blocks.divisor == 1) {
    return launch<window_attention_backward_short<T, kBucket>>(kName, grid, kThreads,
                                                               window_backward_short_bytes<kBucket>(p), stream, params);
  }
  const int64_t rows = p.batch * p.image_tokens * p.heads;
  launch<window_attention_delta<T, kBucket>>(
      kName, dim3(static_cast<unsigned>(ceil_div(rows, int64_t{256 / (kBucket / kChunk)}))), 256, 0, stream, params);
  // Queries first: they correct delta for the others.
  launch<window_attention_backward_queries<T, kBucket>>(kName, grid, kThreads,
                                                        window_backward_queries_bytes<kBucket>(p), stream, params);
  launch<window_attention_backward_keys<T, kBucket>>(kName, grid, kThreads, window_backward_keys_bytes<kBucket>(p),
                                                     stream, params);
  if (p.table != nullptr) {
    const dim3 pairs(params.table_shares * p.blocks.divisor * p.blocks.divisor, grid.y);
    launch<window_attention_backward_bias<T, kBucket>>(kName, pairs, kThreads, window_backward_bias_bytes<kBucket>(p),
                                                       stream, params);
  }
}

template <int kBucket>
void launch_window_backward(const WindowBackwardParams& params, void* stream) {
  dispatch_half(params.problem.dtype, [&]<class T>() { launch_window_backward_kernels<T, kBucket>(params, stream); });
}

}  // namespace warpform
