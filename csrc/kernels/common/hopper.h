// Whether launches take the kernels of compute capability 9.0, on wgmma and TMA, where one serves the problem.
#pragma once

namespace warpform {

// True if this library was built with them.
bool hopper_built();
// Null if they do on the current device, else why not: another compute capability, WARPFORM_HOPPER=0 (read at each
// call), a library that was built without them, a driver that cannot describe tensors (which is said once on stderr).
const char* hopper_unusable();

}  // namespace warpform
