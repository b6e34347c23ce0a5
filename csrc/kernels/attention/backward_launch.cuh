// Choice and launch of the backward kernels of one head dimension bucket.
#pragma once

#include "attention/backward_dkdv.cuh"
#include "attention/backward_dq.cuh"
#include "attention/instances.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {

template <class T, int kHeadDim>
void launch_backward_delta(const char* name, const AttentionBackwardParams& params, void* stream) {
  const int64_t rows = static_cast<int64_t>(params.problem.total_q) * params.problem.heads_q;
  launch<varlen_attention_delta<T, kHeadDim>>(name, dim3(ceil_div(rows, int64_t{256 / (tile_cols(kHeadDim) / kChunk)})),
                                              256, 0, stream, params);
}

template <class T, int kHeadDim, bool kSmall, class ScoreMod, class Mode = FullAttention>
void launch_backward_keys(const char* name, const typename Mode::BackwardParams& params, void* stream) {
  constexpr BackwardTile kTile = backward_tile(kHeadDim, kSmall);
  const AttentionProblem& p = params.problem;
  launch<varlen_attention_backward_keys<T, kHeadDim, kSmall, ScoreMod, Mode>>(
      name, dim3(slots<kTile.block_n>(p.total_k, p.batch), p.heads_kv, ceil_div(p.head_dim, kTile.out_cols)),
      32 * kTile.warps, backward_shared_bytes(kHeadDim, kTile) + ScoreMod::shared_bytes(p), stream, params,
      TileShape{.m = kTile.block_m, .n = kTile.block_n, .k = kHeadDim, .stages = kTile.stages, .splits = 1});
}

template <class T, int kHeadDim, class ScoreMod, class Mode = FullAttention>
void launch_backward_queries(const char* name, const typename Mode::BackwardParams& params, void* stream) {
  constexpr ForwardTile kTile = dq_tile();
  const AttentionProblem& p = params.problem;
  launch<varlen_attention_backward_queries<T, kHeadDim, ScoreMod, Mode>>(
      name, dim3(slots<kTile.block_m>(p.total_q, p.batch), p.heads_q), 32 * kTile.warps,
      dq_shared_bytes(kHeadDim, kTile) + ScoreMod::shared_bytes(p), stream, params,
      TileShape{.m = kTile.block_m, .n = kTile.block_n, .k = kHeadDim, .stages = 1, .splits = 1});
}

// All kernels of a backward, in order.
template <class T, int kHeadDim, class ScoreMod>
void launch_backward_kernels(const AttentionBackwardParams& params, void* stream) {
  constexpr const char* kName = "varlen_attention_backward";
  // In the bucket of 256 both tiles are the same; at 128 columns a score bias and the large tile do not fit the
  // registers.
  constexpr bool kHasLarge = kHeadDim <= 64 || (kHeadDim <= 128 && ScoreMod::kPlain);
  const AttentionProblem& p = params.problem;
  launch_backward_delta<T, kHeadDim>(kName, params, stream);
  if (kHasLarge && !backward_is_small(p)) {
    launch_backward_keys<T, kHeadDim, !kHasLarge, ScoreMod>(kName, params, stream);
  } else {
    launch_backward_keys<T, kHeadDim, true, ScoreMod>(kName, params, stream);
  }
  if (params.dq_mode == DqMode::kAccumulate) {
    const int64_t count = static_cast<int64_t>(p.total_q) * p.heads_q * p.head_dim;
    launch<varlen_attention_round_dq<T>>(kName, dim3(ceil_div(count, int64_t{256 * kChunk})), 256, 0, stream, params);
  }
  if (params.dq_mode == DqMode::kSeparate) launch_backward_queries<T, kHeadDim, ScoreMod>(kName, params, stream);
}

template <int kHeadDim>
void launch_backward(const AttentionBackwardParams& params, void* stream) {
  dispatch_half(params.problem.dtype, [&]<class T>() {
    if constexpr (head_dim_bucket(kHeadDim, true) == kHeadDim) {
      if (has_score_bias(params.problem)) return launch_backward_kernels<T, kHeadDim, SoftcapAlibi>(params, stream);
    }
    launch_backward_kernels<T, kHeadDim, ScaleOnly>(params, stream);
  });
}

}  // namespace warpform
