// Bindings of the stencils on grids of tokens, pool_mixer and depthwise_conv2d: checks, allocation, launch.
#include "kernels/spatial/launch.h"

#include <optional>

#include "binding.h"
#include "rows.h"

namespace warpform {
namespace {

SpatialShape shape_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

void check_grid(const char* op, const Tensor& x) {
  check_floating(op, "x", x);
  check(x.dim() == 4, op, ": x must be of shape [batch, height, width, channels], got ", Shape{x});
}

// ---- pool_mixer ----

void check_pool_mixer(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                      int64_t pool_size) {
  check_grid(op, x);
  check_parameter(op, "weight", weight, x.size(3), "x", x);
  if (scale) {
    check_parameter(op, "scale", *scale, x.size(3), "x", x);
    check_dtype_of(op, "scale", *scale, "weight", weight);
  }
  check(pool_size > 0 && pool_size % 2 == 1, op, ": pool_size must be odd and positive, got ", pool_size);
}

// Why no kernel serves the call, or null.
const char* no_kernel(const Launch& launch, const Tensor& x, const SizeLimit& sizes, int64_t size) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  if (const char* reason = kFloatTypes.why_not(dtype_name(x.scalar_type()))) return reason;
  const bool has_kernel = size >= kStencilMinSize && sizes.allows(size);
  return has_kernel ? nullptr : "the kernels take stencils of 3, 5 or 7 positions a side";
}

std::tuple<Tensor, Tensor, Tensor> pool_mixer(Tensor x, Tensor weight, std::optional<Tensor> scale, int64_t pool_size,
                                              double eps) {
  constexpr const char* kOp = "pool_mixer";
  check_pool_mixer(kOp, x, weight, scale, pool_size);
  check_eps(kOp, eps);
  const Launch launch(kOp, x);
  if (const char* reason = no_kernel(launch, x, kPoolSizes, pool_size)) return UseReference(reason);
  x = contiguous(x);
  weight = contiguous(weight);
  scale = contiguous(scale);
  const SpatialShape shape = shape_of(x);
  Tensor out = empty(kOp, sizes_of(x), x.scalar_type(), x);
  Tensor mean = empty(kOp, {shape.batch}, ScalarType::Float, x);
  Tensor rstd = empty(kOp, {shape.batch}, ScalarType::Float, x);
  PoolMixerParams params{.x = launch.in(x),
                         .weight = launch.in(weight),
                         .scale = launch.in_or_null(scale),
                         .out = launch.out(out),
                         .mean = launch.out<float>(mean),
                         .rstd = launch.out<float>(rstd),
                         .partials = nullptr,
                         .chunks = 0,
                         .shape = shape,
                         .pool_size = static_cast<int>(pool_size),
                         .eps = static_cast<float>(eps),
                         .dtype = element_type(x),
                         .float_parameters = weight.scalar_type() == ScalarType::Float};
  params.chunks = launch.ask<&pool_mixer_chunks>(params);
  Tensor partials = empty(kOp, {shape.batch, params.chunks, 2}, ScalarType::Float, x);
  params.partials = launch.out<float>(partials);
  launch.run<&launch_pool_mixer, &cpu::Kernels::pool_mixer>(params);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> pool_mixer_backward(Tensor dout, Tensor x, Tensor weight,
                                                       std::optional<Tensor> scale, Tensor mean, Tensor rstd,
                                                       int64_t pool_size) {
  constexpr const char* kOp = "pool_mixer_backward";
  check_pool_mixer(kOp, x, weight, scale, pool_size);
  check_like(kOp, "dout", dout, "x", x);
  check_statistics(kOp, "mean", mean, x.size(0), "x", x);
  check_statistics(kOp, "rstd", rstd, x.size(0), "x", x);
  const Launch launch(kOp, x);
  if (const char* reason = no_kernel(launch, x, kPoolSizes, pool_size)) return UseReference(reason);
  dout = contiguous(dout);
  x = contiguous(x);
  weight = contiguous(weight);
  scale = contiguous(scale);
  mean = contiguous(mean);
  rstd = contiguous(rstd);
  const SpatialShape shape = shape_of(x);
  Tensor dx = empty(kOp, sizes_of(x), x.scalar_type(), x);
  Tensor dweight = empty(kOp, {shape.channels}, weight.scalar_type(), x);
  Tensor dscale = empty(kOp, {scale ? shape.channels : 0}, weight.scalar_type(), x);
  PoolMixerBackwardParams params{.dout = launch.in(dout),
                                 .x = launch.in(x),
                                 .weight = launch.in(weight),
                                 .scale = launch.in_or_null(scale),
                                 .mean = launch.in<float>(mean),
                                 .rstd = launch.in<float>(rstd),
                                 .dx = launch.out(dx),
                                 .dweight = launch.out(dweight),
                                 .dscale = launch.out(dscale),
                                 .partials = nullptr,
                                 .shape = shape,
                                 .pool_size = static_cast<int>(pool_size),
                                 .dtype = element_type(x),
                                 .float_parameters = weight.scalar_type() == ScalarType::Float};
  Tensor partials = empty(kOp, {launch.ask<&pool_mixer_backward_partials>(params)}, ScalarType::Float, x);
  params.partials = launch.out<float>(partials);
  launch.run<&launch_pool_mixer_backward, &cpu::Kernels::pool_mixer_backward>(params);
  return {dx, dweight, dscale};
}

// ---- depthwise_conv2d ----

void check_depthwise(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::string& activation) {
  check_grid(op, x);
  const int64_t channels = x.size(3);
  check(weight.dim() == 3 && weight.size(0) == channels && weight.size(1) == weight.size(2) && weight.size(1) % 2 == 1,
        op, ": weight must be of shape [", channels, ", k, k] with an odd k, got ", Shape{weight});
  check_dtype_of(op, "weight", weight, "x", x);
  check_same_device(op, "weight", weight, "x", x);
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == channels, op, ": bias must be of shape [", channels, "], got ",
          Shape{*bias});
    check_dtype_of(op, "bias", *bias, "x", x);
    check_same_device(op, "bias", *bias, "x", x);
  }
  check(activation == "linear" || activation == "gelu" || activation == "relu", op,
        ": activation must be \"linear\", \"gelu\" or \"relu\", got '", activation, "'");
}

Activation activation_of(const std::string& name) {
  return name == "gelu" ? Activation::kGelu : name == "relu" ? Activation::kRelu : Activation::kLinear;
}

Tensor depthwise_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string activation) {
  constexpr const char* kOp = "depthwise_conv2d";
  check_depthwise(kOp, x, weight, bias, activation);
  const Launch launch(kOp, x);
  if (const char* reason = no_kernel(launch, x, kDepthwiseSizes, weight.size(1))) return UseReference(reason);
  x = contiguous(x);
  weight = contiguous(weight);
  bias = contiguous(bias);
  Tensor out = empty(kOp, sizes_of(x), x.scalar_type(), x);
  const DepthwiseConv2dParams params{.x = launch.in(x),
                                     .weight = launch.in(weight),
                                     .bias = launch.in_or_null(bias),
                                     .out = launch.out(out),
                                     .shape = shape_of(x),
                                     .kernel_size = static_cast<int>(weight.size(1)),
                                     .activation = activation_of(activation),
                                     .dtype = element_type(x)};
  launch.run<&launch_depthwise_conv2d, &cpu::Kernels::depthwise_conv2d>(params);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor dout, Tensor x, Tensor weight,
                                                             std::optional<Tensor> bias, std::string activation) {
  constexpr const char* kOp = "depthwise_conv2d_backward";
  check_depthwise(kOp, x, weight, bias, activation);
  check_like(kOp, "dout", dout, "x", x);
  const Launch launch(kOp, x);
  if (const char* reason = no_kernel(launch, x, kDepthwiseSizes, weight.size(1))) return UseReference(reason);
  dout = contiguous(dout);
  x = contiguous(x);
  weight = contiguous(weight);
  bias = contiguous(bias);
  const SpatialShape shape = shape_of(x);
  const int64_t taps = weight.size(1) * weight.size(1);
  const bool needs_dpre = activation != "linear" && !launch.on_cpu();
  Tensor dx = empty(kOp, sizes_of(x), x.scalar_type(), x);
  Tensor dweight = empty(kOp, sizes_of(weight), weight.scalar_type(), x);
  Tensor dbias = empty(kOp, {bias ? shape.channels : 0}, weight.scalar_type(), x);
  Tensor dpre = empty(kOp, needs_dpre ? sizes_of(x) : std::vector<int64_t>{0}, x.scalar_type(), x);
  DepthwiseConv2dBackwardParams params{.dout = launch.in(dout),
                                       .x = launch.in(x),
                                       .weight = launch.in(weight),
                                       .bias = launch.in_or_null(bias),
                                       .dpre = needs_dpre ? launch.out(dpre) : nullptr,
                                       .dx = launch.out(dx),
                                       .dweight = launch.out(dweight),
                                       .dbias = launch.out(dbias),
                                       .partials = nullptr,
                                       .groups = 0,
                                       .shape = shape,
                                       .kernel_size = static_cast<int>(weight.size(1)),
                                       .activation = activation_of(activation),
                                       .dtype = element_type(x)};
  params.groups = launch.ask<&depthwise_conv2d_backward_groups>(params);
  Tensor partials = empty(kOp, {params.groups, shape.channels, taps + (bias ? 1 : 0)}, ScalarType::Float, x);
  params.partials = launch.out<float>(partials);
  launch.run<&launch_depthwise_conv2d_backward, &cpu::Kernels::depthwise_conv2d_backward>(params);
  return {dx, dweight, dbias};
}

}  // namespace

std::span<const Body> spatial_ops() {
  static constexpr Body kOps[] = {
      body<"pool_mixer", &pool_mixer>(), body<"pool_mixer_backward", &pool_mixer_backward>(),
      body<"depthwise_conv2d", &depthwise_conv2d>(), body<"depthwise_conv2d_backward", &depthwise_conv2d_backward>()};
  return kOps;
}

}  // namespace warpform
