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

namespace warpform {

// Streaming multiprocessors of the current device.
int sm_count();
// Bytes of shared memory that a block may ask for on the current device.
int shared_memory_limit();

// Allows a kernel all shared memory of the current device, once for each: `devices` has a bit for those that were
// asked, and is read and written atomically. Throws std::runtime_error that begins with `name`.
void allow_shared_memory(const char* name, const void* kernel, uint64_t& devices);
// Throws std::runtime_error that begins with `name` where the last launch of this thread failed.
void check_launch(const char* name);

// Launches kKernel(params) on `stream`; an empty grid is no launch. Throws std::runtime_error that begins with `name`.
template <auto kKernel, class Params>
void launch(const char* name, dim3 grid, int threads, int shared_bytes, void* stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    static uint64_t devices = 0;
    allow_shared_memory(name, reinterpret_cast<const void*>(kKernel), devices);
  }
  kKernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  check_launch(name);
}

}  // namespace warpform
