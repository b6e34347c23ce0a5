#include "build_info.h"

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
std::string kernel_table() {
  std::string table;
  for (const std::string& family : {
           attention_kernel_table(),
           packing_kernel_table(),
           layer_norm_kernel_table(),
           gelu_kernel_table(),
           fft_conv_kernel_table(),
           hidden_kernel_table(),
           monarch_kernel_table(),
           short_conv_kernel_table(),
           window_kernel_table(),
       }) {
    table += (table.empty() ? "[" : ", ") + family;
  }
  return table + "]";
}
#else
std::string kernel_table() { return "[]"; }
#endif

}  // namespace warpform
