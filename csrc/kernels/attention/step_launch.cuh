// Instantiation of the kernels of a step for one head dimension bucket. A ring hands out long blocks: the large tiles
// only, but where the GPU has too little shared memory for that of the backward.
#pragma once

#include "attention/backward_launch.cuh"
#include "attention/forward_launch.cuh"
#include "attention/step.cuh"

namespace warpform {

template <int kHeadDim>
void launch_step(const AttentionStepParams& params, void* stream) {
  dispatch_half(params.problem.dtype, [&]<class T>() {
    launch_forward_kernel<T, kHeadDim, false, ScaleOnly, AttentionStep>("attention_step", params, stream);
  });
}

template <int kHeadDim>
void launch_step_backward(const AttentionStepBackwardParams& params, void* stream) {
  constexpr const char* kName = "attention_step_backward";
  // GPUs with less shared memory a block than the 163 KiB of an A100 have 99.
  constexpr int kLargeBytes = backward_shared_bytes(kHeadDim, backward_tile(kHeadDim, false));
  constexpr bool kLargeAlwaysFits = kLargeBytes <= 99 * 1024;
  dispatch_half(params.problem.dtype, [&]<class T>() {
    if (kLargeAlwaysFits || kLargeBytes <= shared_memory_limit()) {
      launch_backward_keys<T, kHeadDim, false, ScaleOnly, AttentionStep>(kName, params, stream);
    } else {
      launch_backward_keys<T, kHeadDim, !kLargeAlwaysFits, ScaleOnly, AttentionStep>(kName, params, stream);
    }
    if (params.dq_mode == DqMode::kSeparate) {
      launch_backward_queries<T, kHeadDim, ScaleOnly, AttentionStep>(kName, params, stream);
    }
  });
}

}  // namespace warpform
