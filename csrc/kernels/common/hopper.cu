#include "common/hopper.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/plan.h"
#include "device/launch.cuh"
#include "device/tensor_map.cuh"

namespace warpform {
namespace {

#ifdef WARPFORM_WITH_HOPPER
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif
constexpr const char* kNoEncoder =
    "the driver has no cuTensorMapEncodeTiled, with which kernels for Hopper describe tensors; update the driver";

bool switched_off() {
  const char* value = std::getenv("WARPFORM_HOPPER");
  return value != nullptr && std::strcmp(value, "0") == 0;
}

// Says it once: kernels for every GPU run instead, and nothing but their speed shows it.
const char* no_encoder() {
  static const bool said = std::fprintf(stderr, "warpform: %s\n", kNoEncoder) > 0;
  static_cast<void>(said);
  return kNoEncoder;
}

}  // namespace

bool hopper_built() { return kBuilt; }

const char* hopper_unusable() {
  if (!kBuilt) return "the kernels for compute capability 9.0 were not built: WARPFORM_CUDA_ARCHS has no 90a";
  if (compute_capability() != 90) return "the GPU's compute capability is not 9.0";
  if (switched_off()) return "WARPFORM_HOPPER=0";
  if (current_plan() == nullptr && !has_tensor_map_encoder()) return no_encoder();
  return nullptr;
}

}  // namespace warpform
