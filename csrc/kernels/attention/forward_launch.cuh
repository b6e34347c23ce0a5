// Instantiation and choice of the forward kernels of one head dimension bucket.
#pragma once

#include "attention/forward.cuh"
#include "attention/instances.h"
#include "device/launch.cuh"

namespace warpform {

template <class T, int kHeadDim, bool kSmall, class Score, class Extent = Whole>
void launch_forward_instance(const char* name, const typename Extent::ForwardParams& params, void* stream) {
  constexpr ForwardTile kTile = forward_tile(kHeadDim, kSmall);
  const AttentionProblem& p = params.problem;
  launch<varlen_attention_forward<T, kHeadDim, kSmall, Score, Extent>>(
      name, dim3(slots<kTile.block_m>(p.total_q, p.batch), p.heads_q), 32 * kTile.warps,
      forward_shared_bytes(kHeadDim, kTile) + Score::shared_bytes(p), stream, params);
}

// Whether a tile has registers for softcaps of any size; one that has not is not launched for those above kFewSoftcap.
constexpr bool takes_any_softcap(int head_dim, bool small) { return small || head_dim != 128; }

template <class T, int kHeadDim, bool kSmall>
void launch_forward_score(const AttentionForwardParams& params, void* stream) {
  constexpr const char* kName = "varlen_attention";
  if constexpr (head_dim_bucket(kHeadDim, true) == kHeadDim) {
    if (has_score_bias(params.problem)) {
      using Score = BiasedScoreOf<takes_any_softcap(kHeadDim, kSmall)>;
      return launch_forward_instance<T, kHeadDim, kSmall, Score>(kName, params, stream);
    }
  }
  launch_forward_instance<T, kHeadDim, kSmall, PlainScore>(kName, params, stream);
}

template <class T, int kHeadDim>
void launch_forward_tile(const AttentionForwardParams& params, void* stream) {
  constexpr ForwardTile kLarge = forward_tile(kHeadDim, false);
  if constexpr (kLarge.block_m > 64) {
    const AttentionProblem& p = params.problem;
    const int64_t large_tiles = static_cast<int64_t>(p.total_q / kLarge.block_m + p.batch) * p.heads_q;
    const bool capped = takes_any_softcap(kHeadDim, false) || p.softcap <= kFewSoftcap;
    if (p.max_seqlen_q > 64 && large_tiles >= 2 * sm_count() && capped) {
      return launch_forward_score<T, kHeadDim, false>(params, stream);
    }
  }
  launch_forward_score<T, kHeadDim, true>(params, stream);
}

template <int kHeadDim>
void launch_forward(const AttentionForwardParams& params, void* stream) {
  if (params.problem.bfloat16) {
    launch_forward_tile<bf16_t, kHeadDim>(params, stream);
  } else {
    launch_forward_tile<half_t, kHeadDim>(params, stream);
  }
}

}  // namespace warpform
