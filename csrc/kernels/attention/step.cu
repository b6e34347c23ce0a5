// Dispatch of the steps of attention, and the arithmetic of positions.
#include <algorithm>

#include "attention/instances.h"
#include "attention/tiles.cuh"
#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {

StepPositions step_positions(int64_t q_offset, int64_t k_offset, int64_t q_stride, int64_t k_stride, int64_t left,
                             int64_t right, int64_t q_rows, int64_t k_rows) {
  // Twice the longest span: added to a position of one side, it exceeds all positions of the other, and it stays within
  // 32 bits.
  constexpr int64_t kFar = 2 * (kMaxStepSpan + 1);
  const auto bounded = [=](int64_t x) { return static_cast<int>(std::clamp(x, -kFar, kFar)); };
  // A side of one row may have any stride: no position depends on it.
  if (q_rows <= 1) q_stride = 1;
  if (k_rows <= 1) k_stride = 1;
  const int64_t distance = std::clamp(q_offset - k_offset, -4 * kFar, 4 * kFar);
  left = std::min(left, 8 * kFar);
  right = std::min(right, 8 * kFar);
  return {.q_stride = static_cast<int>(q_stride),
          .k_stride = static_cast<int>(k_stride),
          .first_key = left < 0 ? bounded(-kFar) : bounded(distance - left + k_stride - 1),
          .last_key = right < 0 ? bounded(kFar) : bounded(distance + right + k_stride),
          .first_query = right < 0 ? bounded(-kFar) : bounded(-distance - right + q_stride - 1),
          .last_query = left < 0 ? bounded(kFar) : bounded(-distance + left + q_stride),
          .by_q_stride = divisor_of(static_cast<int>(q_stride)),
          .by_k_stride = divisor_of(static_cast<int>(k_stride))};
}

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
