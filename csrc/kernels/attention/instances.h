// The kernels are compiled a head dimension bucket at a time, forward and backward apart, so that the build runs in
// parallel; launch.cu chooses among them.
#pragma once

#include "attention/launch.h"

namespace warpform {

// kHeadDim: 64, 128 or 256.
template <int kHeadDim>
void launch_forward(const AttentionForwardParams& params, void* stream);
template <int kHeadDim>
void launch_backward(const AttentionBackwardParams& params, void* stream);

// Whether the scores need more than their scale.
inline bool has_score_bias(const AttentionProblem& p) { return p.softcap > 0.f || p.alibi_slopes != nullptr; }

// Whether the backward takes blocks of 64 keys: all sequences fit into one, or the GPU's shared memory allows no more.
bool backward_is_small(const AttentionProblem& p);

}  // namespace warpform
