// Launches of window mixing, backward.
#include <algorithm>

#include "common/column_sum.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "window_mix/product.cuh"
#include "window_mix/weight_gradient.cuh"

namespace warpform {

int window_mix_shares(const WindowMixProblem& p) {
  // Two CTAs an SM, each with two tiles of columns at least: fewer sums to write and to add.
  const int64_t blocks = ceil_div(p.tokens, kMixRows);
  const int64_t most = ceil_div(p.tiles, 2);
  return static_cast<int>(std::min(std::max<int64_t>(2 * sm_count() / (blocks * blocks), 1), most));
}

void launch_window_mix_backward(const WindowMixBackwardParams& params, void* stream) {
  constexpr const char* kOp = "window_mix_backward";
  const WindowMixProblem& p = params.problem;
  const auto blocks = static_cast<unsigned>(ceil_div(p.tokens, kMixRows));
  dispatch_dtype(p.dtype, [&]<class T>() {
    launch<window_mix_gradient<T>>(kOp, dim3(static_cast<unsigned>(p.tiles), params.dgate == nullptr ? 1 : 2),
                                   kMixThreads, static_cast<int>(mix_shared_bytes<T>(p.tokens)), stream, params,
                                   mix_tile_shape<T>(p.tokens));
    launch<window_mix_weight_gradient<T>>(
        kOp, dim3(blocks * blocks, static_cast<unsigned>(params.shares)), kMixThreads, kMixWeightBytes<T>, stream,
        params, {.m = kMixRows, .n = kMixRows, .k = kMixCols, .stages = 2, .splits = params.shares});
  });
  const auto add_up = [&](ColumnSumParams sums) { launch_column_sum(kOp, sums, stream); };
  const int64_t n = p.tokens;
  add_up({.partials = params.weight_sums,
          .out = {params.dweight},
          .sums = 1,
          .groups = params.shares,
          .cols = n * n,
          .dtype = p.dtype});
  if (params.dbias != nullptr) {
    add_up({.partials = params.bias_sums,
            .out = {params.dbias},
            .sums = 1,
            .groups = params.shares,
            .cols = n,
            .dtype = p.dtype});
  }
  if (params.dnorm_weight != nullptr && p.whole_tokens) {
    add_up({.partials = params.norm_sums,
            .out = {params.dnorm_weight, params.dnorm_bias},
            .sums = params.dnorm_bias == nullptr ? 1 : 2,
            .groups = p.windows,
            .cols = p.channels,
            .dtype = p.float_norm ? DType::kFloat32 : p.dtype});
  }
}

}  // namespace warpform
