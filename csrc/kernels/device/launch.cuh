// Launches of kernels. Kernels take one params struct and are template arguments here, so that shared
// memory above 48 KiB is asked for once per kernel and device rather than at every call: all that the device has, as
// one kernel's launches may differ in how much they use.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace warpform {

inline void throw_on_error(const char* name, const char* what, cudaError_t error) {
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // the runtime keeps it, and the next launch would be blamed for it
    throw std::runtime_error(std::string(name) + ": " + what + ": " + cudaGetErrorString(error));
  }
}

// An attribute of the current device, asked for once per device.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  constexpr int kDevices = 64;
  static std::atomic<int> cache[kDevices];
  int device = 0;
  throw_on_error("warpform", "no current CUDA device", cudaGetDevice(&device));
  int value = device < kDevices ? cache[device].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    throw_on_error("warpform", "cannot read the device's properties",
                   cudaDeviceGetAttribute(&value, kAttribute, device));
    if (device < kDevices) cache[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

// Streaming multiprocessors of the current device.
inline int sm_count() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }
// Bytes of shared memory that a block may ask for on the current device.
inline int shared_memory_limit() { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

// Launches kKernel(params) on `stream`; an empty grid is no launch. Throws std::runtime_error that begins with `name`.
template <auto kKernel, class Params>
void launch(const char* name, dim3 grid, int threads, int shared_bytes, void* stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    static std::atomic<uint64_t> asked{0};
    int device = 0;
    throw_on_error(name, "no current CUDA device", cudaGetDevice(&device));
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device >= 64 || !(asked.load(std::memory_order_relaxed) & bit)) {
      throw_on_error(name, "the kernel cannot have its shared memory on this GPU",
                     cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory_limit()));
      asked.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  kKernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  throw_on_error(name, "kernel launch failed", cudaGetLastError());
}

}  // namespace warpform
