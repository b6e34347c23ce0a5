// Says whether the kernels of this library can run at all.
#pragma once

#include <cstdint>

namespace warpform {

// WARPFORM_BACKEND=reference, read at each call, so that tests and users can switch.
bool reference_requested();

// Why no kernel may run on GPU `device`, which is the current one, or null: WARPFORM_BACKEND=reference, a GPU that the
// kernels were not built for, a driver older than the CUDA runtime in this library. The GPU is asked once; later calls
// cost an atomic load. The text lives as long as the process. A negative device is asked at each call.
const char* kernels_unusable(int32_t device);

}  // namespace warpform
