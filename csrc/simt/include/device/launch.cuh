// The host's body of kernels/device/launch.cuh: the launch runs to its end in the emulator.
#pragma once

#include "common/failure.h"
#include "common/plan.h"
#include "device/ptx.cuh"

namespace warpform {

inline int sm_count() { return simt::device().sm_count; }
inline int shared_memory_limit() { return simt::device().shared_memory_limit; }
inline int compute_capability() { return simt::device().facts.capability; }

template <auto kKernel, class Params>
void launch(const char* name, dim3 grid, int threads, int shared_bytes, void* /*stream*/, const Params& params,
            const TileShape& /*tile*/ = {}) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  simt::run_grid({name, __PRETTY_FUNCTION__, [](const void* p) { kKernel(*static_cast<const Params*>(p)); }, &params},
                 grid, threads, shared_bytes);
}

}  // namespace warpform
