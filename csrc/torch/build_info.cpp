#include "build_info.h"

#include <torch/csrc/stable/accelerator.h>

#include <exception>
#include <optional>
#include <span>
#include <string_view>

#include "api.h"
#include "cpu/supported.h"
#include "kernels/activation/launch.h"
#include "kernels/attention/launch.h"
#include "kernels/common/device_facts.h"
#include "kernels/common/hopper.h"
#include "kernels/fft_conv/launch.h"
#include "kernels/monarch/launch.h"
#include "kernels/norm/launch.h"
#include "kernels/packing/launch.h"
#include "kernels/routing/launch.h"
#include "kernels/short_conv/launch.h"
#include "kernels/spatial/launch.h"
#include "kernels/window/launch.h"
#include "launch.h"

// The build defines these; the defaults serve a compile by hand.
#if __has_include("sources_hash.h")
#include "sources_hash.h"
#else
#define WARPFORM_SOURCES ""
#endif
#ifndef WARPFORM_VERSION
#define WARPFORM_VERSION "unknown"
#endif
#ifndef WARPFORM_CUDA_VERSION
#define WARPFORM_CUDA_VERSION ""
#endif
#ifndef WARPFORM_CUDA_ARCHS
#define WARPFORM_CUDA_ARCHS ""
#endif
#ifndef WARPFORM_TORCH_VERSION
#define WARPFORM_TORCH_VERSION ""
#endif

namespace warpform {

std::string built_architectures() { return WARPFORM_CUDA_ARCHS; }

std::string cuda_version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

#if defined(WARPFORM_WITH_CUDA) || defined(WARPFORM_SIMT)
namespace {
std::string runtime() { return cuda_version(cuda_runtime_version()); }
const char* hopper() { return hopper_built() ? "90a" : ""; }
}  // namespace
#else
namespace {
std::string runtime() { return ""; }
const char* hopper() { return ""; }
}  // namespace
#endif

// cuda: the compiler's version; cuda_runtime: that of the runtime in the library, which the driver must serve; hopper: the
// architecture of the kernels for compute capability 9.0, if they were built; sources: the hash of csrc that
// python/warpform/_sources.py defines.
std::string build_info() {
  std::string text = "{";
  const auto add = [&](const char* name, const std::string& value) {
    text += std::string(text.size() > 1 ? ", \"" : "\"") + name + "\": \"" + value + "\"";
  };
  add("version", WARPFORM_VERSION);
  add("cuda", WARPFORM_CUDA_VERSION);
  add("cuda_runtime", runtime());
  add("cuda_archs", WARPFORM_CUDA_ARCHS);
  add("hopper", hopper());
  add("torch_headers", WARPFORM_TORCH_VERSION);
  add("compiler", __VERSION__);
  add("sources", WARPFORM_SOURCES);
  return text + "}";
}

namespace {

std::string quoted(const char* text) { return std::string("\"") + text + "\""; }

// {"multiple_of": 8, "max": 256}, or the number alone.
std::string limit_json(const SizeLimit& limit) {
  if (limit.as_number) return std::to_string(limit.max);
  std::string bounds;
  if (limit.multiple_of > 1) bounds = "\"multiple_of\": " + std::to_string(limit.multiple_of);
  if (limit.max < INT64_MAX) bounds += (bounds.empty() ? "" : ", ") + ("\"max\": " + std::to_string(limit.max));
  return "{" + bounds + "}";
}

// The row of one op and one dtype, which may be null.
std::string row_json(const SupportedConfig& config, const char* dtype) {
  std::string row = "{\"op\": " + quoted(config.op);
  if (dtype != nullptr) row += ", \"dtype\": " + quoted(dtype);
  if (config.float_parameters) {
    const bool is_float = std::string_view(dtype) == "float32";
    row += ", \"parameter_dtypes\": [" + (is_float ? "" : quoted(dtype) + ", ") + "\"float32\"]";
  }
  for (const SizeLimit& limit : config.limits) {
    if (limit.name != nullptr) row += ", " + quoted(limit.name) + ": " + limit_json(limit);
  }
  if (const SupportedOption& option = config.option; option.name != nullptr) {
    std::string values;
    for (const char* value : option.values) {
      if (value != nullptr) values += (values.empty() ? "" : ", ") + quoted(value);
    }
    row += ", " + quoted(option.name) + ": [" + values + "]";
  }
  return row + "}";
}

using Tables = std::span<const std::span<const SupportedConfig>>;

constexpr std::span<const SupportedConfig> kCudaTables[] = {kAttentionConfigs, kPackingConfigs,   kNormConfigs,
                                                            kGeluConfigs,      kFftConvConfigs,   kRoutingConfigs,
                                                            kMonarchConfigs,   kShortConvConfigs, kSpatialConfigs,
                                                            kWindowConfigs};
constexpr std::span<const SupportedConfig> kCpuTables[] = {cpu::kConfigs};

Tables cuda_tables() {
#if defined(WARPFORM_WITH_CUDA) || defined(WARPFORM_SIMT)
  return kCudaTables;
#else
  return {};
#endif
}
Tables cpu_tables() {
  if constexpr (kHasCpuKernels) {
    if (cpu::kernels() != nullptr) return kCpuTables;
  }
  return {};
}

std::string json_of(Tables tables) {
  std::string table;
  const auto add_row = [&](const std::string& row) { table += (table.empty() ? "[" : ", ") + row; };
  for (const auto configs : tables) {
    for (const SupportedConfig& config : configs) {
      if (config.dtypes.names[0] == nullptr) add_row(row_json(config, nullptr));
      for (const char* dtype : config.dtypes.names) {
        if (dtype != nullptr) add_row(row_json(config, dtype));
      }
    }
  }
  return table.empty() ? "[]" : table + "]";
}

std::string texts(const char* dtype, const SupportedDTypes& dtypes) {
  std::string names;
  for (const char* name : dtypes.names) {
    if (name != nullptr) names += (names.empty() ? "" : ", ") + std::string(name);
  }
  return "the kernels take " + names + ", not " + dtype;
}

// Why no kernel runs on the device, whatever the op, or null.
const char* device_unusable(int32_t device, std::string& room) {
  if (device == api::kCpuDevice) {
    if constexpr (kHasCpuKernels) return cpu_kernels_unusable();
    return kOnCpu;
  }
  if constexpr (!kHasKernels) return kNoKernels;
  if (device == api::kAnyGpu) return nullptr;
  try {
    const torch::stable::accelerator::DeviceGuard guard(device);  // the question is about the current device
    return kernels_unusable(device);
  } catch (const std::exception&) {
    room = "this process has no GPU " + std::to_string(device);
    return room.c_str();
  }
}

}  // namespace

#if defined(WARPFORM_WITH_CUDA) || defined(WARPFORM_SIMT)
std::string hopper_kernels_missing(int64_t device) {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (device >= 0) guard.emplace(static_cast<int32_t>(device));
  const char* reason = kernels_unusable(static_cast<int32_t>(device));
  if (reason == nullptr) reason = hopper_unusable();
  return reason == nullptr ? "" : reason;
}
#else
std::string hopper_kernels_missing(int64_t) { return kNoKernels; }
#endif

std::string kernel_table() { return json_of(cuda_tables()); }
std::string cpu_kernel_table() { return json_of(cpu_tables()); }

const char* supported(const char* op, const char* dtype, int32_t device, int32_t count, const char* const* names,
                      const int64_t* sizes) {
  thread_local std::string reason;
  if (const char* unusable = device_unusable(device, reason)) return unusable;
  const SupportedConfig* found = nullptr;
  for (const auto configs : device == api::kCpuDevice ? cpu_tables() : cuda_tables()) {
    for (const SupportedConfig& config : configs) {
      if (same_text(config.op, op)) found = &config;
    }
  }
  if (found == nullptr) return "there is no kernel of this op";
  if (dtype != nullptr && found->dtypes.names[0] != nullptr && found->dtypes.why_not(dtype) != nullptr) {
    reason = texts(dtype, found->dtypes);
    return reason.c_str();
  }
  for (int32_t i = 0; i < count; ++i) {
    const SizeLimit* limit = nullptr;
    for (const SizeLimit& each : found->limits) {
      if (each.name != nullptr && same_text(each.name, names[i])) limit = &each;
    }
    if (limit == nullptr) continue;  // a size without a bound
    if (limit->allows(sizes[i])) continue;
    if (limit->otherwise != nullptr) return limit->otherwise;
    reason = std::string(limit->name) + " is at most " + std::to_string(limit->max);
    return reason.c_str();
  }
  return nullptr;
}

}  // namespace warpform
