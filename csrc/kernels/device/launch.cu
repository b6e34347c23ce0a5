// The host's part of every launch. The emulator has its own.
#include "device/launch.cuh"

#include <atomic>

namespace warpform {

namespace {

void throw_on_error(const char* name, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // the runtime keeps it, and the next launch would be blamed for it
  fail(name, what, cudaGetErrorString(error));
}

int current_device(const char* name) {
  int device = 0;
  throw_on_error(name, "no current CUDA device", cudaGetDevice(&device));
  return device;
}

// An attribute of the current device, asked for once per device.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  constexpr int kDevices = 64;
  static std::atomic<int> cache[kDevices];
  const int device = current_device("warpform");
  // One more than the value: 0 is what was not asked for yet.
  int value = (device < kDevices ? cache[device].load(std::memory_order_relaxed) : 0) - 1;
  if (value < 0) {
    throw_on_error("warpform", "cannot read the device's properties",
                   cudaDeviceGetAttribute(&value, kAttribute, device));
    if (device < kDevices) cache[device].store(value + 1, std::memory_order_relaxed);
  }
  return value;
}

}  // namespace

int sm_count() {
  const LaunchPlan* plan = current_plan();
  return plan ? machine_of(*plan).sm_count : device_attribute<cudaDevAttrMultiProcessorCount>();
}
int shared_memory_limit() {
  const LaunchPlan* plan = current_plan();
  return plan ? machine_of(*plan).shared_memory_limit : device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
}

int compute_capability() {
  const LaunchPlan* plan = current_plan();
  return plan ? machine_of(*plan).capability
              : 10 * device_attribute<cudaDevAttrComputeCapabilityMajor>() +
                    device_attribute<cudaDevAttrComputeCapabilityMinor>();
}

bool plan_launch(const char* name, const char* text, const void* kernel, dim3 grid, int threads, int shared_bytes,
                 const TileShape& tile) {
  LaunchPlan* plan = current_plan();
  if (plan == nullptr) return false;
  // Where there is a GPU it says how many blocks a multiprocessor takes, registers counted.
  int blocks = 0, device = 0, most = 0;
  // All shared memory of the device, as a launch asks for: less would stay, and be too little for the next launch.
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
      (shared_bytes > 48 * 1024 &&
       cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) != cudaSuccess) ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes) != cudaSuccess) {
    blocks = 0;
    static_cast<void>(cudaGetLastError());
  }
  add_launch(*plan, {.op = name,
                     .kernel = text,
                     .grid = {grid.x, grid.y, grid.z},
                     .threads = threads,
                     .shared_bytes = shared_bytes,
                     .blocks_per_sm = blocks,
                     .tile = tile});
  return true;
}

void allow_shared_memory(const char* name, const void* kernel, uint64_t& devices) {
  const std::atomic_ref<uint64_t> asked(devices);
  const int device = current_device(name);
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (device < 64 && (asked.load(std::memory_order_relaxed) & bit)) return;
  throw_on_error(name, "the kernel cannot have its shared memory on this GPU",
                 cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory_limit()));
  asked.fetch_or(bit, std::memory_order_relaxed);
}

void check_launch(const char* name) { throw_on_error(name, "kernel launch failed", cudaGetLastError()); }

}  // namespace warpform
