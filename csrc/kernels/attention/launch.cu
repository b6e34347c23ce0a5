// Dispatch of the attention family: head dimension to bucket, and what is supported.
#include "attention/hopper/launch.h"
#include "attention/instances.h"
#include "attention/tiles.cuh"
#include "common/hopper.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {

bool backward_is_small(const AttentionProblem& p) {
  const int bucket = head_dim_bucket(p.head_dim, has_score_bias(p));
  const BackwardTile large = backward_tile(bucket, false);
  const int64_t large_tiles = static_cast<int64_t>(p.total_k / large.block_n + p.batch) * p.heads_kv;
  return p.max_seqlen_k <= 64 || (bucket == 128 && has_score_bias(p)) || large_tiles < sm_count() ||
         backward_shared_bytes(bucket, large) > shared_memory_limit();
}

DqMode attention_backward_dq_mode(const AttentionProblem& p, bool deterministic) {
  const BackwardTile tile = backward_tile(head_dim_bucket(p.head_dim, has_score_bias(p)), backward_is_small(p));
  if (p.max_seqlen_k <= tile.block_n) return DqMode::kDirect;
  return deterministic ? DqMode::kSeparate : DqMode::kAccumulate;
}

// The 32 and 96 columns' buckets have no kernels with a score bias: head_dim_bucket skips them.
void launch_varlen_attention(const AttentionForwardParams& params, void* stream) {
#ifdef WARPFORM_WITH_HOPPER
  if (hopper_unusable() == nullptr && launch_varlen_attention_hopper(params, stream)) return;
#endif
  dispatch_bucket<32, 64, 96, 128, 256>(head_dim_bucket(params.problem.head_dim, has_score_bias(params.problem)),
                                        [&]<int kHeadDim>() { launch_forward<kHeadDim>(params, stream); });
}

void launch_varlen_attention_backward(const AttentionBackwardParams& params, void* stream) {
  dispatch_bucket<32, 64, 96, 128, 256>(head_dim_bucket(params.problem.head_dim, has_score_bias(params.problem)),
                                        [&]<int kHeadDim>() { launch_backward<kHeadDim>(params, stream); });
}

void launch_disentangled_attention(const AttentionForwardParams& params, void* stream) {
  dispatch_bucket<64, 128>(params.problem.head_dim,
                           [&]<int kHeadDim>() { launch_disentangled_forward<kHeadDim>(params, stream); });
}

void launch_disentangled_attention_backward(const AttentionBackwardParams& params, void* stream) {
  dispatch_bucket<64, 128>(params.problem.head_dim,
                           [&]<int kHeadDim>() { launch_disentangled_backward<kHeadDim>(params, stream); });
}

const char* attention_unsupported(int head_dim, bool backward) {
  if (const char* reason = kAttentionHeadDim.why_not(head_dim)) return reason;
  const int bucket = head_dim_bucket(head_dim, /*biased=*/true);
  const int limit = shared_memory_limit();
  const bool fits = forward_shared_bytes(bucket, forward_tile(bucket, true)) <= limit &&
                    (!backward || (backward_shared_bytes(bucket, backward_tile(bucket, true)) <= limit &&
                                   dq_shared_bytes(bucket, dq_tile()) <= limit));
  return fits ? nullptr : "head_dim needs more shared memory a block than this GPU has";
}

const char* disentangled_attention_unsupported(int head_dim, int64_t reach, bool backward) {
  // The table has two columns of two bytes for each distance.
  constexpr int kMaxReach = 4096;
  if (const char* reason = kShortHeadDim.why_not(head_dim)) return reason;
  if (reach > kMaxReach) return "relative positions differ past a distance of 4096";
  const int bucket = head_dim <= 64 ? 64 : 128;
  const int table = disentangled_shared_bytes(static_cast<int>(reach));
  const int limit = shared_memory_limit();
  const bool fits = forward_shared_bytes(bucket, forward_tile(bucket, true)) + table <= limit &&
                    (!backward || (backward_shared_bytes(bucket, backward_tile(bucket, true)) + table <= limit &&
                                   dq_shared_bytes(bucket, dq_tile()) + table <= limit));
  return fits ? nullptr : "head_dim and the relative positions need more shared memory a block than this GPU has";
}

}  // namespace warpform
