// Launch functions of the routed layers' kernels for compute capability 9.0.
#pragma once

#include "routing/launch.h"

namespace warpform {

// False where the kernels for every GPU have to serve the problem: nothing was launched then. hopper_unusable() is the
// caller's to ask. Where there are dots of more than one block of a group, their sum is the caller's, too.
bool launch_hidden_gather_hopper(const char* op, const HiddenGatherParams& params, void* stream);
bool launch_hidden_scatter_hopper(const char* op, const HiddenScatterParams& params, void* stream);

}  // namespace warpform
