#include "build_info.h"

#include <span>
#include <string_view>

#include "kernels/activation/launch.h"
#include "kernels/attention/launch.h"
#include "kernels/common/device_facts.h"
#include "kernels/fft_conv/launch.h"
#include "kernels/monarch/launch.h"
#include "kernels/norm/launch.h"
#include "kernels/packing/launch.h"
#include "kernels/routing/launch.h"
#include "kernels/short_conv/launch.h"
#include "kernels/window/launch.h"

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
}  // namespace
#else
namespace {
std::string runtime() { return ""; }
}  // namespace
#endif

// cuda: the compiler's version; cuda_runtime: that of the runtime in the library, which the driver must serve; sources:
// the hash of csrc that python/warpform/_sources.py defines.
std::string build_info() {
  std::string text = "{";
  const auto add = [&](const char* name, const std::string& value) {
    text += std::string(text.size() > 1 ? ", \"" : "\"") + name + "\": \"" + value + "\"";
  };
  add("version", WARPFORM_VERSION);
  add("cuda", WARPFORM_CUDA_VERSION);
  add("cuda_runtime", runtime());
  add("cuda_archs", WARPFORM_CUDA_ARCHS);
  add("torch_headers", WARPFORM_TORCH_VERSION);
  add("compiler", __VERSION__);
  add("sources", WARPFORM_SOURCES);
  return text + "}";
}

#if defined(WARPFORM_WITH_CUDA) || defined(WARPFORM_SIMT)
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
    row += ", " + quoted(option.name) + ": [" + quoted(option.values[0]) + ", " + quoted(option.values[1]) + "]";
  }
  return row + "}";
}

}  // namespace

std::string kernel_table() {
  std::string table;
  const auto add = [&](std::span<const SupportedConfig> configs) {
    const auto add_row = [&](const std::string& row) { table += (table.empty() ? "[" : ", ") + row; };
    for (const SupportedConfig& config : configs) {
      if (config.dtypes.names[0] == nullptr) add_row(row_json(config, nullptr));
      for (const char* dtype : config.dtypes.names) {
        if (dtype != nullptr) add_row(row_json(config, dtype));
      }
    }
  };
  add(kAttentionConfigs);
  add(kPackingConfigs);
  add(kLayerNormConfigs);
  add(kGeluConfigs);
  add(kFftConvConfigs);
  add(kRoutingConfigs);
  add(kMonarchConfigs);
  add(kShortConvConfigs);
  add(kWindowConfigs);
  return table + "]";
}
#else
std::string kernel_table() { return "[]"; }
#endif

}  // namespace warpform
