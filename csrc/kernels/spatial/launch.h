// Launch functions of the stencils on grids of tokens with channels last, pool_mixer and depthwise_conv2d: pointers into
// device memory, sizes, and an opaque stream. They launch and return; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/supported.h"

namespace warpform {

// Sizes of a tensor [batch, height, width, channels] that lies in memory end to end.
struct SpatialShape {
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t channels;
};

// out = x + scale weight rstd (P x - x), P the mean over the neighbours of a square of `pool_size` that exist. x and out
// are of `dtype`; weight and scale are both of `dtype` or, with float_parameters, both float32.
struct PoolMixerParams {
  const void* x;       // [batch, height, width, channels]
  const void* weight;  // [channels]
  const void* scale;   // [channels] or null, which is a scale of 1
  void* out;           // [batch, height, width, channels]
  float* mean;         // [batch]
  float* rstd;         // [batch]
  float* partials;     // [batch, chunks, 2], scratch
  int64_t chunks;      // the result of pool_mixer_chunks; the shape alone decides it
  SpatialShape shape;
  int pool_size;
  float eps;
  DType dtype;
  bool float_parameters;
};
int64_t pool_mixer_chunks(const PoolMixerParams& params);
void launch_pool_mixer(const PoolMixerParams& params, void* stream);

struct PoolMixerBackwardParams {
  const void* dout;    // [batch, height, width, channels]
  const void* x;       // [batch, height, width, channels]
  const void* weight;  // [channels]
  const void* scale;   // [channels] or null
  const float* mean;   // [batch]
  const float* rstd;   // [batch]
  void* dx;            // [batch, height, width, channels]
  void* dweight;       // [channels]
  void* dscale;        // [channels]; not written without a scale
  float* partials;     // scratch, as many as pool_mixer_backward_partials says; the shape alone decides it
  SpatialShape shape;
  int pool_size;
  DType dtype;
  bool float_parameters;
};
int64_t pool_mixer_backward_partials(const PoolMixerBackwardParams& params);
void launch_pool_mixer_backward(const PoolMixerBackwardParams& params, void* stream);

enum class Activation { kLinear, kGelu, kRelu };  // GELU by erf

// out = activation(bias + sum over i, j of weight[.., i, j] x[.., y + i - k / 2, x + j - k / 2, ..]), zeros beyond the
// grid. All are of `dtype`.
struct DepthwiseConv2dParams {
  const void* x;       // [batch, height, width, channels]
  const void* weight;  // [channels, kernel_size, kernel_size]
  const void* bias;    // [channels] or null
  void* out;           // [batch, height, width, channels]
  SpatialShape shape;
  int kernel_size;
  Activation activation;
  DType dtype;
};
void launch_depthwise_conv2d(const DepthwiseConv2dParams& params, void* stream);

struct DepthwiseConv2dBackwardParams {
  const void* dout;    // [batch, height, width, channels]
  const void* x;       // [batch, height, width, channels]
  const void* weight;  // [channels, kernel_size, kernel_size]
  const void* bias;    // [channels] or null
  void* dpre;          // [batch, height, width, channels], scratch: the gradient before the activation; null if linear
  void* dx;            // [batch, height, width, channels]
  void* dweight;       // [channels, kernel_size, kernel_size]
  void* dbias;         // [channels]; not written without a bias
  float* partials;     // [groups, channels, kernel_size^2] and behind them, with a bias, [groups, channels]: scratch
  int64_t groups;      // the result of depthwise_conv2d_backward_groups; the current device decides it
  SpatialShape shape;
  int kernel_size;
  Activation activation;
  DType dtype;
};
int64_t depthwise_conv2d_backward_groups(const DepthwiseConv2dBackwardParams& params);
void launch_depthwise_conv2d_backward(const DepthwiseConv2dBackwardParams& params, void* stream);

// ---- supported configurations ----

// Odd sizes alone reach the kernels: the ops refuse even ones.
inline constexpr SizeLimit kPoolSizes{.name = "max_pool_size",
                                      .min = 3,
                                      .max = 7,
                                      .otherwise = "the kernels take a pool_size of 3, 5 or 7",
                                      .as_number = true};
inline constexpr SizeLimit kDepthwiseSizes{.name = "max_kernel_size",
                                           .min = 3,
                                           .max = 7,
                                           .otherwise = "the kernels take weights of 3, 5 or 7 by as many taps",
                                           .as_number = true};
inline constexpr SupportedOption kActivations{"activation", {"linear", "gelu", "relu"}};

inline constexpr SupportedConfig kSpatialConfigs[] = {
    {.op = "pool_mixer", .dtypes = kFloatTypes, .limits = {kPoolSizes}, .float_parameters = true},
    {.op = "pool_mixer_backward", .dtypes = kFloatTypes, .limits = {kPoolSizes}, .float_parameters = true},
    {.op = "depthwise_conv2d", .dtypes = kFloatTypes, .limits = {kDepthwiseSizes}, .option = kActivations},
    {.op = "depthwise_conv2d_backward", .dtypes = kFloatTypes, .limits = {kDepthwiseSizes}, .option = kActivations},
};

}  // namespace warpform
