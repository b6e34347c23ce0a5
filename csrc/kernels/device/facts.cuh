// The CUDA runtime's facts about the machine (common/device_facts.h).
#pragma once

#include <cuda_runtime.h>

#include "common/device_facts.h"

namespace warpform {

inline int runtime_version() { return CUDART_VERSION; }

// Facts about the current device, with kKernel for all kernels.
template <auto kKernel>
DeviceFacts facts_of_device() {
  DeviceFacts facts{.driver = 0, .capability = 0, .code = DeviceCode::kUnknown};
  if (cudaDriverGetVersion(&facts.driver) != cudaSuccess || !driver_serves(facts.driver, runtime_version())) {
    return facts;
  }
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  facts.capability = 10 * major + minor;
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel));
  static_cast<void>(cudaGetLastError());  // the runtime keeps it, and the next launch would be blamed for it
  switch (error) {
    case cudaSuccess: facts.code = DeviceCode::kFound; break;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: facts.code = DeviceCode::kNone; break;
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled: facts.code = DeviceCode::kUnreadable; break;
    default: break;
  }
  return facts;
}

}  // namespace warpform
