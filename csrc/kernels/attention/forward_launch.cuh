// Choice and launch of the forward kernels of one head dimension bucket.
#pragma once

#include "attention/forward.cuh"
#include "attention/instances.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {

template <class T, int kHeadDim, bool kSmall, class ScoreMod, class Mode = FullAttention>
void launch_forward_kernel(const char* name, const typename Mode::ForwardParams& params, void* stream) {
  constexpr ForwardTile kTile = forward_tile(kHeadDim, kSmall);
  const AttentionProblem& p = params.problem;
  launch<varlen_attention_forward<T, kHeadDim, kSmall, ScoreMod, Mode>>(
      name, dim3(slots<kTile.block_m>(p.total_q, p.batch), p.heads_q), 32 * kTile.warps,
      forward_shared_bytes(kHeadDim, kTile) + ScoreMod::shared_bytes(p), stream, params,
      TileShape{.m = kTile.block_m, .n = kTile.block_n, .k = kHeadDim, .stages = 1, .splits = 1});
}

// True if a tile has registers for softcaps of any size. Other tiles are launched for softcaps up to kFewSoftcap only.
constexpr bool takes_any_softcap(int head_dim, bool small) { return small || head_dim != 128; }

// True if the forward takes blocks of 64 queries: the sequences are short, or larger blocks would be too few for the
// GPU, or have no registers for the softcap.
template <int kHeadDim>
bool forward_is_small(const AttentionProblem& p) {
  const int64_t large_tiles =
      static_cast<int64_t>(p.total_q / forward_tile(kHeadDim, false).block_m + p.batch) * p.heads_q;
  return p.max_seqlen_q <= 64 || large_tiles < 2 * sm_count() ||
         !(takes_any_softcap(kHeadDim, false) || p.softcap <= kFewSoftcap);
}

template <int kHeadDim>
void launch_forward(const AttentionForwardParams& params, void* stream) {
  constexpr const char* kName = "varlen_attention";
  constexpr bool kHasLarge = forward_tile(kHeadDim, false).block_m > 64;
  constexpr bool kHasScoreBias = head_dim_bucket(kHeadDim, true) == kHeadDim;
  const AttentionProblem& p = params.problem;
  dispatch_half(p.dtype, [&]<class T>() {
    const auto launch_tile = [&]<bool kSmall>() {
      if constexpr (kHasScoreBias) {
        if (has_score_bias(p)) {
          using ScoreMod = SoftcapAlibiOf<takes_any_softcap(kHeadDim, kSmall)>;
          return launch_forward_kernel<T, kHeadDim, kSmall, ScoreMod>(kName, params, stream);
        }
      }
      launch_forward_kernel<T, kHeadDim, kSmall, ScaleOnly>(kName, params, stream);
    };
    if constexpr (kHasLarge) {
      if (!forward_is_small<kHeadDim>(p)) return launch_tile.template operator()<false>();
    }
    launch_tile.template operator()<true>();
  });
}

}  // namespace warpform
