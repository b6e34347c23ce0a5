// Launch functions of bias_gelu: pointers into device memory, sizes, and an opaque stream. They
// launch and return; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/supported.h"

namespace warpform {

struct BiasGeluParams {
  const void* x;     // [rows, cols]
  const void* bias;  // [cols] or null
  void* out;         // [rows, cols]
  int64_t rows;
  int64_t cols;
  DType dtype;
  bool float_parameters;
  bool tanh;  // the tanh approximation, not erf
};
void launch_bias_gelu(const BiasGeluParams& params, void* stream);

struct BiasGeluBackwardParams {
  const void* dout;  // [rows, cols]
  const void* x;     // [rows, cols]
  const void* bias;  // [cols] or null
  void* dx;          // [rows, cols]
  void* dbias;       // [cols]; not written without a bias
  float* partials;   // [groups, cols], scratch
  int64_t groups;    // the result of bias_gelu_backward_groups; the current device decides it, 0 without a bias
  int64_t rows;
  int64_t cols;
  DType dtype;
  bool float_parameters;
  bool tanh;
};
int64_t bias_gelu_backward_groups(const BiasGeluBackwardParams& params);
void launch_bias_gelu_backward(const BiasGeluBackwardParams& params, void* stream);

// ---- supported configurations ----

inline constexpr SupportedConfig kGeluConfigs[] = {
    {.op = "bias_gelu", .dtypes = kFloatTypes, .float_parameters = true, .option = kGeluForms},
    {.op = "bias_gelu_backward", .dtypes = kFloatTypes, .float_parameters = true, .option = kGeluForms},
};

}  // namespace warpform
