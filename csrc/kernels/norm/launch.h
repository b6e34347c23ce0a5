// Launch functions of LayerNorm, RMSNorm and RMSNorm with GELU, policies of one row kernel: pointers into device memory,
// sizes, and an opaque stream. They launch and return; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/supported.h"

namespace warpform {

// Rows longer than this have no kernel.
constexpr int64_t kRowNormMaxCols = 16384;

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

// As in LayerNorm, parameters are of `dtype` or, with float_parameters, float32.
struct RmsNormParams {
  const void* x;         // [rows, cols]
  const void* residual;  // [rows, cols] or null
  const void* weight;    // [cols]
  void* out;             // [rows, cols]
  void* sum;             // [rows, cols] or null
  float* rstd;           // [rows]
  int64_t rows;
  int64_t cols;
  float eps;
  DType dtype;
  bool float_parameters;
};
void launch_rms_norm(const RmsNormParams& params, void* stream);

struct RmsNormBackwardParams {
  const void* dout;    // [rows, cols]
  const void* dsum;    // [rows, cols] or null
  const void* sum;     // [rows, cols]
  const void* weight;  // [cols]
  const float* rstd;   // [rows]
  void* dx;            // [rows, cols]
  void* dweight;       // [cols]
  float* partials;     // [groups, cols], scratch
  int64_t groups;      // the result of rms_norm_backward_groups; the current device decides it
  int64_t rows;
  int64_t cols;
  DType dtype;
  bool float_parameters;
};
int64_t rms_norm_backward_groups(const RmsNormBackwardParams& params);
void launch_rms_norm_backward(const RmsNormBackwardParams& params, void* stream);

// out = GELU(gain * x / sqrt(mean(x^2) + eps)). A row of x that is brought to the length tau, x * tau / sqrt(sum(x^2) +
// e), is the same with a gain of tau / sqrt(cols) and an eps of e / cols.
struct RmsNormGeluParams {
  const void* x;  // [rows, cols]
  void* out;      // [rows, cols]
  int64_t rows;
  int64_t cols;
  float gain;
  float eps;
  DType dtype;
  bool tanh;  // the tanh approximation, not erf
};
void launch_rms_norm_gelu(const RmsNormGeluParams& params, void* stream);

struct RmsNormGeluBackwardParams {
  const void* dout;  // [rows, cols]
  const void* x;     // [rows, cols]
  void* dx;          // [rows, cols]
  int64_t rows;
  int64_t cols;
  float gain;
  float eps;
  DType dtype;
  bool tanh;
};
void launch_rms_norm_gelu_backward(const RmsNormGeluBackwardParams& params, void* stream);

// ---- supported configurations ----

inline constexpr SizeLimit kRowNormCols{.name = "max_cols", .max = kRowNormMaxCols, .as_number = true};

inline constexpr SupportedConfig kNormConfigs[] = {
    {.op = "add_bias_residual_layer_norm", .dtypes = kFloatTypes, .limits = {kRowNormCols}, .float_parameters = true},
    {.op = "add_bias_residual_layer_norm_backward",
     .dtypes = kFloatTypes,
     .limits = {kRowNormCols},
     .float_parameters = true},
    {.op = "add_residual_rms_norm", .dtypes = kFloatTypes, .limits = {kRowNormCols}, .float_parameters = true},
    {.op = "add_residual_rms_norm_backward", .dtypes = kFloatTypes, .limits = {kRowNormCols}, .float_parameters = true},
    {.op = "rms_norm_gelu", .dtypes = kFloatTypes, .limits = {kRowNormCols}, .option = kGeluForms},
    {.op = "rms_norm_gelu_backward", .dtypes = kFloatTypes, .limits = {kRowNormCols}, .option = kGeluForms},
};

}  // namespace warpform
