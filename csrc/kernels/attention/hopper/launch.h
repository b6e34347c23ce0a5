// Launch function of the attention kernels of compute capability 9.0. Only a library that was built for sm_90a has it
// (WARPFORM_WITH_HOPPER).
#pragma once

#include "attention/launch.h"

namespace warpform {

// launch_varlen_attention on wgmma and TMA. Returns false, and has launched nothing, where the kernels for every GPU
// have to take the problem: another head dimension than 64 and 128, a tensor that no tensor map describes (one without
// tokens, strides that are too long), or sequences of so few queries that the tiles would be empty for the most part.
// The caller has asked hopper_unusable().
bool launch_varlen_attention_hopper(const AttentionForwardParams& params, void* stream);

// The same for one head dimension, 64 or 128, and element type; one file each, so that the build runs in parallel.
template <int kHeadDim, class T>
bool launch_forward_hopper(const AttentionForwardParams& params, void* stream);

}  // namespace warpform
