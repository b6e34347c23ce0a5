// Launches of kernels. Kernels take one params struct and are template arguments here, so that shared
// memory above 48 KiB is asked for once per kernel and device rather than at every call: all that the device has, as
// one kernel's launches may differ in how much they use.
//
// What needs the standard library's larger headers is in launch.cu: every file of kernels includes this one, and nvcc
// would parse them once for the host and once for each architecture.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/failure.h"
#include "common/plan.h"

namespace warpform {

// Streaming multiprocessors of the current device.
int sm_count();
// Bytes of shared memory that a block may ask for on the current device.
int shared_memory_limit();
// Compute capability of the current device, 10 * major + minor.
int compute_capability();

// Allows a kernel all shared memory of the current device, once for each: `devices` has a bit for those that were
// asked, and is read and written atomically. Throws std::runtime_error that begins with `name`.
void allow_shared_memory(const char* name, const void* kernel, uint64_t& devices);
// Throws std::runtime_error that begins with `name` where the last launch of this thread failed.
void check_launch(const char* name);
// True while this thread has a plan, after adding to it. `text` is __PRETTY_FUNCTION__ of launch().
bool plan_launch(const char* name, const char* text, const void* kernel, dim3 grid, int threads, int shared_bytes,
                 const TileShape& tile);

// Launches kKernel(params) on `stream`; an empty grid is no launch. `tile` is for plans. Throws std::runtime_error that
// begins with `name`.
template <auto kKernel, class Params>
void launch(const char* name, dim3 grid, int threads, int shared_bytes, void* stream, const Params& params,
            const TileShape& tile = {}) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto address = reinterpret_cast<const void*>(kKernel);
  if (plan_launch(name, __PRETTY_FUNCTION__, address, grid, threads, shared_bytes, tile)) return;
  if (shared_bytes > 48 * 1024) {
    static uint64_t devices = 0;
    allow_shared_memory(name, address, devices);
  }
  kKernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  check_launch(name);
}

}  // namespace warpform
