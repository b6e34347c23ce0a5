// Choice and launch of the Hopper forward kernels of one head dimension and element type.
#pragma once

#include "attention/hopper/forward.cuh"
#include "attention/hopper/launch.h"
#include "attention/instances.h"
#include "device/launch.cuh"

namespace warpform {

// Describes boxes of so many tokens of one head, 64 columns wide.
inline bool encode_heads(TensorMap& map, const HeadsView& view, int tokens, int heads, int head_dim, int box_tokens) {
  return encode_tensor_map(map, {.data = view.data,
                                 .rank = 3,
                                 .sizes = {head_dim, heads, tokens},
                                 .strides = {view.head_stride, view.row_stride},
                                 .box = {kPanel, 1, box_tokens},
                                 .swizzle = Swizzle::k128});
}

template <class T, class Tile, class ScoreMod>
bool launch_forward_hopper_kernel(const AttentionForwardParams& params, void* stream) {
  const AttentionProblem& p = params.problem;
  HopperForwardParams all = {.q = {}, .k = {}, .v = {}, .forward = params};
  if (!encode_heads(all.q, p.q, p.total_q, p.heads_q, p.head_dim, Tile::kBlockM) ||
      !encode_heads(all.k, p.k, p.total_k, p.heads_kv, p.head_dim, Tile::kBlockN) ||
      !encode_heads(all.v, p.v, p.total_k, p.heads_kv, p.head_dim, Tile::kBlockN)) {
    return false;
  }
  launch<varlen_attention_forward_hopper<T, Tile, ScoreMod>>(
      "varlen_attention", dim3(slots<Tile::kBlockM>(p.total_q, p.batch), p.heads_q), Tile::kThreads, Tile::kSharedBytes,
      stream, all,
      TileShape{.m = Tile::kBlockM, .n = Tile::kBlockN, .k = Tile::kHeadDim, .stages = Tile::kStages, .splits = 1});
  return true;
}

template <int kHeadDim, class T>
bool launch_forward_hopper(const AttentionForwardParams& params, void* stream) {
  const AttentionProblem& p = params.problem;
  if constexpr (kHeadDim == 128) {
    if (has_score_bias(p)) return launch_forward_hopper_kernel<T, HopperTile128, SoftcapAlibi>(params, stream);
    if (p.window_left < 0 && p.window_right < 0 && takes_wide_keys(p.max_seqlen_k)) {
      return launch_forward_hopper_kernel<T, HopperTile128Wide, ScaleOnly>(params, stream);
    }
    return launch_forward_hopper_kernel<T, HopperTile128, ScaleOnly>(params, stream);
  } else {
    if (has_score_bias(p)) return launch_forward_hopper_kernel<T, HopperTile64Small, SoftcapAlibi>(params, stream);
    if (takes_wide_queries(p.max_seqlen_q, forward_hopper_tiles(p, HopperTile64::kBlockM), sm_count())) {
      return launch_forward_hopper_kernel<T, HopperTile64, ScaleOnly>(params, stream);
    }
    return launch_forward_hopper_kernel<T, HopperTile64Small, ScaleOnly>(params, stream);
  }
}

}  // namespace warpform
