// Dispatch of the steps of attention.
#include "attention/instances.h"
#include "attention/tiles.cuh"
#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {

void launch_attention_step(const AttentionStepParams& params, void* stream) {
  dispatch_bucket<64, 128>(params.problem.head_dim, [&]<int kHeadDim>() { launch_step<kHeadDim>(params, stream); });
}

void launch_attention_step_backward(const AttentionStepBackwardParams& params, void* stream) {
  dispatch_bucket<64, 128>(params.problem.head_dim,
                           [&]<int kHeadDim>() { launch_step_backward<kHeadDim>(params, stream); });
}

const char* attention_step_unsupported(int head_dim, bool backward) {
  if (const char* reason = kShortHeadDim.why_not(head_dim)) return reason;
  const int bucket = head_dim <= 64 ? 64 : 128;
  const int limit = shared_memory_limit();
  const bool fits = forward_shared_bytes(bucket, forward_tile(bucket, false)) <= limit &&
                    (!backward || (backward_shared_bytes(bucket, backward_tile(bucket, bucket > 64)) <= limit &&
                                   dq_shared_bytes(bucket, dq_tile()) <= limit));
  return fits ? nullptr : "head_dim needs more shared memory a block than this GPU has";
}

}  // namespace warpform
