// Instantiation of the kernels with disentangled scores for one head dimension bucket. One tile each, the small one:
// gathers want many CTAs an SM to hide behind, and the large tiles have no registers left for them.
#pragma once

#include "attention/backward_launch.cuh"
#include "attention/disentangled.cuh"
#include "attention/forward_launch.cuh"

namespace warpform {

template <int kHeadDim>
void launch_disentangled_forward(const AttentionForwardParams& params, void* stream) {
  constexpr const char* kName = "disentangled_attention";
  if (params.problem.bfloat16) {
    launch_forward_instance<bf16_t, kHeadDim, true, DisentangledScore<bf16_t>>(kName, params, stream);
  } else {
    launch_forward_instance<half_t, kHeadDim, true, DisentangledScore<half_t>>(kName, params, stream);
  }
}

template <class T, int kHeadDim>
void launch_disentangled_backward_type(const AttentionBackwardParams& params, void* stream) {
  constexpr const char* kName = "disentangled_attention_backward";
  using Score = DisentangledScore<T>;
  launch_backward_delta<T, kHeadDim>(kName, params, stream);
  launch_backward_keys<T, kHeadDim, true, Score>(kName, params, stream);
  launch_backward_queries<T, kHeadDim, Score>(kName, params, stream);
}

template <int kHeadDim>
void launch_disentangled_backward(const AttentionBackwardParams& params, void* stream) {
  if (params.problem.bfloat16) {
    launch_disentangled_backward_type<bf16_t, kHeadDim>(params, stream);
  } else {
    launch_disentangled_backward_type<half_t, kHeadDim>(params, stream);
  }
}

}  // namespace warpform
