// The parts of the launch functions that are compiled for each of the weight's layouts (instances/).
#pragma once

#include "device/wgmma.cuh"
#include "routing/hopper/launch.h"

namespace warpform {

template <Major kMajorB>
bool launch_hidden_gather_hopper_as(const char* op, const HiddenGatherParams& params, void* stream);
template <Major kMajorB>
bool launch_hidden_scatter_hopper_as(const char* op, const HiddenScatterParams& params, void* stream);

}  // namespace warpform
