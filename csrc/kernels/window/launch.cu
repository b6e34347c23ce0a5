// Dispatch of the window attention family: head dimension to bucket, CTAs, and what is supported.
#include <algorithm>

#include "common/column_sum.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "window/backward_long.cuh"
#include "window/backward_short.cuh"
#include "window/forward.cuh"
#include "window/instances.h"
#include "window/table_gradient.cuh"

namespace warpform {

int window_shares(int64_t items, int64_t groups, int per_sm) {
  if (items == 0 || groups == 0) return 0;
  const int64_t most = std::max<int64_t>(1, static_cast<int64_t>(sm_count()) * per_sm / groups);
  const int64_t rounds = ceil_div(items, most);
  return static_cast<int>(ceil_div(items, rounds));
}

void launch_window_attention(const WindowForwardParams& params, void* stream) {
  dispatch_bucket<32, 64, 128>(params.problem.head_dim,
                               [&]<int kBucket>() { launch_window_forward<kBucket>(params, stream); });
}

WindowShares window_backward_shares(const WindowProblem& p) {
  const int bucket = window_bucket(p.head_dim), blocks = p.blocks.divisor;
  const int64_t groups = ceil_div(p.heads, window_teams(bucket));
  if (blocks == 1) {
    const int shares = window_shares(p.windows, groups, window_backward_short_ctas(bucket));
    return {shares, shares};
  }
  const int per_sm = window_backward_long_ctas(bucket);
  return {window_shares(int64_t{p.windows} * blocks, groups, per_sm),
          window_shares(p.windows, groups * blocks * blocks, per_sm)};
}

void launch_window_attention_backward(const WindowBackwardParams& params, void* stream) {
  const WindowProblem& p = params.problem;
  dispatch_bucket<32, 64, 128>(p.head_dim, [&]<int kBucket>() { launch_window_backward<kBucket>(params, stream); });
  if (p.table != nullptr) {
    dispatch_dtype(p.table_dtype, [&]<class T>() {
      launch<window_attention_table_gradient<T>>("window_attention_backward",
                                                 dim3(ceil_div(p.table_entries, kWarpSize), p.heads),
                                                 kTableGradientWarps * kWarpSize, kTableGradientBytes, stream, params);
    });
  }
  const auto add_shares = [&](const float* partials, void* out, int64_t cols, DType dtype) {
    const ColumnSumParams sum{
        .partials = partials, .out = {out}, .sums = 1, .groups = params.shares, .cols = cols, .dtype = dtype};
    launch_column_sum("window_attention_backward", sum, stream);
  };
  if (p.logit_scale != nullptr) add_shares(params.scale_sums, params.dlogit_scale, p.heads, p.logit_scale_dtype);
  if (p.qkv_bias != nullptr) {
    add_shares(params.padding_sums, params.dqkv_bias, 3 * p.width, p.dtype);
  }
}

namespace {

// Shared memory that the hungriest kernel of a problem asks for.
template <int kBucket>
int shared_bytes(const WindowProblem& p, bool backward) {
  if (!backward) return window_forward_shared_bytes(p, kBucket);
  if (p.blocks.divisor == 1) return window_backward_short_bytes<kBucket>(p);
  return std::max({window_backward_keys_bytes<kBucket>(p), window_backward_queries_bytes<kBucket>(p),
                   p.table != nullptr ? window_backward_bias_bytes<kBucket>(p) : 0});
}

}  // namespace

const char* window_attention_unsupported(WindowProblem p, bool backward) {
  if (p.head_dim <= 0) return kWindowHeadDim.otherwise;
  if (const char* reason = kWindowHeadDim.why_not(p.head_dim)) return reason;
  // Sizes that fit the arithmetic below; shared memory is the narrower bound.
  double tokens = 1, entries = 1, padded = p.batch;
  for (int k = 0; k < 3; ++k) {
    tokens *= p.window[k];
    entries *= 2.0 * p.window[k] - 1;
    padded *= static_cast<double>(ceil_div(int64_t{p.size[k]}, int64_t{p.window[k]})) * p.window[k];
    if (p.window[k] > kMaxWindow) return "a window of more than 1024 tokens along an axis";
  }
  if (tokens > 1 << 15 || entries > 1 << 17) return "the window is too large for shared memory";
  if (padded > 1 << 30 || p.heads > 65535) return "more than 2^30 tokens or 65535 heads";
  p.derive();
  const int bytes =
      dispatch_bucket<32, 64, 128>(p.head_dim, [&]<int kBucket>() { return shared_bytes<kBucket>(p, backward); });
  return bytes <= shared_memory_limit() ? nullptr : "the window needs more shared memory a block than this GPU has";
}

}  // namespace warpform
