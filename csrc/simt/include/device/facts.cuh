// The host's body of kernels/device/facts.cuh: what a test says.
#pragma once

#include "kernels/common/device_facts.h"
#include "simt/scheduler.h"

namespace warpform {

inline int runtime_version() { return simt::kRuntimeVersion; }

template <auto kKernel>
DeviceFacts facts_of_device() {
  return simt::device().facts;
}

}  // namespace warpform
