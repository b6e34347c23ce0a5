// The kernels are compiled a head dimension bucket at a time, forward and backward apart, so that the build runs in
// parallel; launch.cu chooses among them.
#pragma once

#include "attention/launch.h"

namespace warpform {

// kHeadDim: 32, 64, 96, 128 or 256; the first and third without a score bias.
template <int kHeadDim>
void launch_forward(const AttentionForwardParams& params, void* stream);
template <int kHeadDim>
void launch_backward(const AttentionBackwardParams& params, void* stream);

// kHeadDim: 64 or 128.
template <int kHeadDim>
void launch_step(const AttentionStepParams& params, void* stream);
template <int kHeadDim>
void launch_step_backward(const AttentionStepBackwardParams& params, void* stream);

// kHeadDim: 64 or 128.
template <int kHeadDim>
void launch_disentangled_forward(const AttentionForwardParams& params, void* stream);
template <int kHeadDim>
void launch_disentangled_backward(const AttentionBackwardParams& params, void* stream);

// True if the scores need more than their scale.
inline bool has_score_bias(const AttentionProblem& p) { return p.softcap > 0.f || p.alibi_slopes != nullptr; }

// True if the backward takes blocks of 64 keys: all sequences fit into one, the GPU's shared memory or registers allow
// no more, or larger blocks would be fewer than its SMs.
bool backward_is_small(const AttentionProblem& p);

}  // namespace warpform
