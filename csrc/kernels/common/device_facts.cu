// Facts about the current device, asked of the machine with a kernel that does nothing: all kernels are built for the
// same GPUs.
#include "common/device_facts.h"

#include "device/facts.cuh"

namespace warpform {

namespace {

struct Nothing {};
__global__ void probe(const __grid_constant__ Nothing) {}

}  // namespace

int cuda_runtime_version() { return runtime_version(); }

DeviceFacts device_facts() { return facts_of_device<probe>(); }

}  // namespace warpform
