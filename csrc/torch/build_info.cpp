#include "build_info.h"

#include "kernels/attention/launch.h"
#include "kernels/encoder/launch.h"
#include "kernels/fft_conv/launch.h"
#include "kernels/hidden/launch.h"
#include "kernels/monarch/launch.h"
#include "kernels/short_conv/launch.h"
#include "kernels/window/launch.h"

// The build defines these; the defaults serve a compile by hand.
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

std::string build_info() {
  return std::string("{\"version\": \"") + WARPFORM_VERSION + "\", \"cuda\": \"" + WARPFORM_CUDA_VERSION +
         "\", \"cuda_archs\": \"" + WARPFORM_CUDA_ARCHS + "\", \"torch_headers\": \"" + WARPFORM_TORCH_VERSION +
         "\", \"compiler\": \"" + __VERSION__ + "\"}";
}

#if defined(WARPFORM_WITH_CUDA) || defined(WARPFORM_SIMT)
std::string kernel_table() {
  std::string table;
  for (const std::string& family : {
           attention_kernel_table(),
           encoder_kernel_table(),
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
