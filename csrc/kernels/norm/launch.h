// Launch functions of add_bias_residual_layer_norm: pointers into device memory, sizes, and an opaque stream. They
// launch and return; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/supported.h"

namespace warpform {

// Rows longer than this have no kernel.
constexpr int64_t kLayerNormMaxCols = 16384;

// Activations are of `dtype`; parameters [cols] are all of `dtype` or, with float_parameters, all float32.
struct LayerNormParams {
  const void* x;         // [rows, cols]
  const void* residual;  // [rows, cols] or null
  const void* bias;      // [cols] or null
  const void* weight;    // [cols]
  const void* ln_bias;   // [cols]
  void* out;             // [rows, cols]
  void* sum;             // [rows, cols] or null
  float* mean;           // [rows]
  float* rstd;           // [rows]
  int64_t rows;
  int64_t cols;
  float eps;
  DType dtype;
  bool float_parameters;
};
void launch_layer_norm(const LayerNormParams& params, void* stream);

struct LayerNormBackwardParams {
  const void* dout;    // [rows, cols]
  const void* dsum;    // [rows, cols] or null
  const void* sum;     // [rows, cols]
  const void* weight;  // [cols]
  const float* mean;   // [rows]
  const float* rstd;   // [rows]
  void* dx;            // [rows, cols]
  void* dbias;         // [cols]
  void* dweight;       // [cols]
  void* dln_bias;      // [cols]
  float* partials;     // [3, groups, cols], scratch
  int64_t groups;      // the result of layer_norm_backward_groups; the current device decides it
  int64_t rows;
  int64_t cols;
  DType dtype;
  bool float_parameters;
};
int64_t layer_norm_backward_groups(const LayerNormBackwardParams& params);
void launch_layer_norm_backward(const LayerNormBackwardParams& params, void* stream);

// ---- supported configurations ----

inline constexpr SizeLimit kLayerNormCols{.name = "max_cols", .max = kLayerNormMaxCols, .as_number = true};

inline constexpr SupportedConfig kLayerNormConfigs[] = {
    {.op = "add_bias_residual_layer_norm", .dtypes = kFloatTypes, .limits = {kLayerNormCols}, .float_parameters = true},
    {.op = "add_bias_residual_layer_norm_backward",
     .dtypes = kFloatTypes,
     .limits = {kLayerNormCols},
     .float_parameters = true},
};

}  // namespace warpform
