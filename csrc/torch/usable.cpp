// Why kernels cannot run on a GPU, in words that say what is there and what is needed.
#include "usable.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

#include "build_info.h"
#include "kernels/common/device_facts.h"

namespace warpform {

bool reference_requested() {
  const char* value = std::getenv("WARPFORM_BACKEND");
  return value != nullptr && std::strcmp(value, "reference") == 0;
}

}  // namespace warpform

#if defined(WARPFORM_WITH_CUDA) || defined(WARPFORM_SIMT)
namespace warpform {
namespace {

constexpr int kOldestCapability = 80;  // cp.async, and mma of bfloat16

std::string capability(int number) { return std::to_string(number / 10) + "." + std::to_string(number % 10); }

// Drivers that came with the first release of a major version of CUDA.
const char* first_driver(int major) { return major == 13 ? "580" : major == 12 ? "525" : "one that serves it"; }

// Empty where kernels can run, and where it is not known whether they can: then the launch reports the error.
std::string reason_of(const DeviceFacts& facts) {
  const int runtime = cuda_runtime_version();
  if (!driver_serves(facts.driver, runtime)) {
    const int major = runtime / 1000;
    return "the driver serves CUDA " + cuda_version(facts.driver) + ", and these kernels need " +
           cuda_version(1000 * major) + ": update the driver to " + first_driver(major) +
           " or later, or build warpform with CUDA " + cuda_version(facts.driver);
  }
  if (facts.code == DeviceCode::kUnknown) return "";
  const std::string gpu = "this GPU has compute capability " + capability(facts.capability);
  if (facts.capability < kOldestCapability) {
    return gpu + ", and the kernels were built for " + capability(kOldestCapability) + " and later";
  }
  if (facts.code == DeviceCode::kNone) {
    return gpu + ", and the kernels were built for " + built_architectures() +
           ": build warpform with WARPFORM_CUDA_ARCHS=" + std::to_string(facts.capability);
  }
  if (facts.code == DeviceCode::kUnreadable) {
    return gpu + ", and the driver, which serves CUDA " + cuda_version(facts.driver) +
           ", cannot compile the kernels for it from PTX of CUDA " + cuda_version(runtime) +
           ": update the driver, or build warpform with WARPFORM_CUDA_ARCHS=" + std::to_string(facts.capability) +
           "-real";
  }
  return "";
}

// Keeps one copy of a text until the process ends.
const char* kept(const std::string& text) {
  static std::mutex mutex;
  static std::set<std::string>* texts = new std::set<std::string>;  // not destroyed: threads may outlive main
  const std::lock_guard<std::mutex> lock(mutex);
  return texts->insert(text).first->c_str();
}

const char* device_unusable(int32_t device) {
  constexpr int kDevices = 64;
  static std::atomic<const char*> cache[kDevices];  // null: not asked yet; empty: usable
  const bool cached = device >= 0 && device < kDevices;
  const char* reason = cached ? cache[device].load(std::memory_order_acquire) : nullptr;
  if (reason == nullptr) {
    const DeviceFacts facts = device_facts();
    reason = kept(reason_of(facts));
    const bool known = *reason != '\0' || facts.code != DeviceCode::kUnknown;
    if (cached && known) cache[device].store(reason, std::memory_order_release);
  }
  return *reason == '\0' ? nullptr : reason;
}

}  // namespace

const char* kernels_unusable(int32_t device) {
  return reference_requested() ? "WARPFORM_BACKEND=reference" : device_unusable(device);
}

}  // namespace warpform
#endif
