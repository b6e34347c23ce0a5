// Instantiation of the kernels with disentangled scores for one head dimension bucket. One tile each, the small one:
// gathers want many CTAs an SM to hide behind, and the large tiles have no registers left for them.
#pragma once

#include "attention/backward_launch.cuh"
#include "attention/disentangled.cuh"
#include "attention/forward_launch.cuh"

namespace warpform {

template <int kHeadDim>
void launch_disentangled_forward(const AttentionForwardParams& params, void* stream) {
  dispatch_half(params.problem.dtype, [&]<class T>() {
    launch_forward_kernel<T, kHeadDim, true, DisentangledBias<T>>("disentangled_attention", params, stream);
  });
}

template <int kHeadDim>
void launch_disentangled_backward(const AttentionBackwardParams& params, void* stream) {
  constexpr const char* kName = "disentangled_attention_backward";
  dispatch_half(params.problem.dtype, [&]<class T>() {
    using ScoreMod = DisentangledBias<T>;
    launch_backward_delta<T, kHeadDim>(kName, params, stream);
    launch_backward_keys<T, kHeadDim, true, ScoreMod>(kName, params, stream);
    launch_backward_queries<T, kHeadDim, ScoreMod>(kName, params, stream);
  });
}

}  // namespace warpform
