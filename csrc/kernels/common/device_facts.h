// Facts that decide whether the kernels of this library can run on a GPU at all.
#pragma once

namespace warpform {

// Machine code of the library, or PTX that the driver compiles, for one GPU.
enum class DeviceCode {
  kFound,
  kNone,
  kUnreadable,  // PTX of a newer CUDA than the driver's
  kUnknown,     // asking failed for a reason of its own, which the next launch meets too
};

// Versions of CUDA are 1000 * major + 10 * minor.
struct DeviceFacts {
  int driver;      // the newest CUDA that the driver serves
  int capability;  // compute capability of the current device, 10 * major + minor
  DeviceCode code;
};

// The CUDA runtime that is linked into this library.
int cuda_runtime_version();

// A driver serves a runtime of its own major version and of those before it.
constexpr bool driver_serves(int driver, int runtime) { return driver / 1000 >= runtime / 1000; }

// Facts about the current device. The last two are known only where the driver serves the runtime.
DeviceFacts device_facts();

}  // namespace warpform
