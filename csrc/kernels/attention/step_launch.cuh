// Instantiation of the kernels of a step for one head dimension bucket. A ring hands out long blocks: the large tiles
// only, but where the GPU has too little shared memory for that of the backward.
#pragma once

#include "attention/backward_launch.cuh"
#include "attention/forward_launch.cuh"
#include "attention/step.cuh"

namespace warpform {

template <int kHeadDim>
void launch_step(const AttentionStepParams& params, void* stream) {
  constexpr const char* kName = "attention_step";
  if (params.problem.bfloat16) {
    launch_forward_instance<bf16_t, kHeadDim, false, PlainScore, Step>(kName, params, stream);
  } else {
    launch_forward_instance<half_t, kHeadDim, false, PlainScore, Step>(kName, params, stream);
  }
}

template <class T, int kHeadDim>
void launch_step_backward_type(const AttentionStepBackwardParams& params, void* stream) {
  constexpr const char* kName = "attention_step_backward";
  constexpr int kLargeBytes = backward_shared_bytes(kHeadDim, backward_tile(kHeadDim, false));
  // 99 KiB is what GPUs with less than the 163 of an A100 allow a block.
  if (kLargeBytes <= 99 * 1024 || kLargeBytes <= shared_memory_limit()) {
    launch_backward_keys<T, kHeadDim, false, PlainScore, Step>(kName, params, stream);
  } else if constexpr (kLargeBytes > 99 * 1024) {
    launch_backward_keys<T, kHeadDim, true, PlainScore, Step>(kName, params, stream);
  }
  if (params.dq_mode == DqMode::kSeparate)
    launch_backward_queries<T, kHeadDim, PlainScore, Step>(kName, params, stream);
}

template <int kHeadDim>
void launch_step_backward(const AttentionStepBackwardParams& params, void* stream) {
  if (params.problem.bfloat16) {
    launch_step_backward_type<bf16_t, kHeadDim>(params, stream);
  } else {
    launch_step_backward_type<half_t, kHeadDim>(params, stream);
  }
}

}  // namespace warpform
