// The kernels are compiled a head dimension bucket at a time, forward and backward apart, so that the build runs in
// parallel; launch.cu chooses among them.
#pragma once

#include "window/launch.h"

namespace warpform {

// kBucket: 32, 64 or 128.
template <int kBucket>
void launch_window_forward(const WindowForwardParams& params, void* stream);
template <int kBucket>
void launch_window_backward(const WindowBackwardParams& params, void* stream);

// CTAs that share `items` among them and walk over their shares: as many as fill the GPU at `per_sm` in `groups`
// groups, fewer where the same number of rounds takes no more.
int window_shares(int64_t items, int64_t groups, int per_sm);

}  // namespace warpform
