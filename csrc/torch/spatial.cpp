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
  if (const char* reason = launch.unusable()) return reason;
  if (const char* reason = kFloatTypes.why_not(dtype_name(x.scalar_type()))) return reason;
  return sizes.why_not(size);
}

std::tuple<Tensor, Tensor, Tensor> pool_mixer(Tensor x, Tensor weight, std::optional<Tensor> scale, int64_t pool_size,
                                              double eps) {
  constexpr const char* kOp = "pool_mixer";
  check_pool_mixer(kOp, x, weight, scale, pool_size);
  check_eps(kOp, eps);
  const Launch launch(kOp, x);
  if (const char* reason = no_kernel(launch, x, kPoolSizes, pool_size)) return UseReference(reason);
  return UseReference("it has no kernel yet");
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
  return UseReference("it has no kernel yet");
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

Tensor depthwise_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string activation) {
  constexpr const char* kOp = "depthwise_conv2d";
  check_depthwise(kOp, x, weight, bias, activation);
  const Launch launch(kOp, x);
  if (const char* reason = no_kernel(launch, x, kDepthwiseSizes, weight.size(1))) return UseReference(reason);
  return UseReference("it has no kernel yet");
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor dout, Tensor x, Tensor weight,
                                                             std::optional<Tensor> bias, std::string activation) {
  constexpr const char* kOp = "depthwise_conv2d_backward";
  check_depthwise(kOp, x, weight, bias, activation);
  check_like(kOp, "dout", dout, "x", x);
  const Launch launch(kOp, x);
  if (const char* reason = no_kernel(launch, x, kDepthwiseSizes, weight.size(1))) return UseReference(reason);
  return UseReference("it has no kernel yet");
}

}  // namespace

std::span<const Body> spatial_ops() {
  static constexpr Body kOps[] = {body<"pool_mixer", &pool_mixer>(), body<"pool_mixer_backward", &pool_mixer_backward>(),
                                  body<"depthwise_conv2d", &depthwise_conv2d>(),
                                  body<"depthwise_conv2d_backward", &depthwise_conv2d_backward>()};
  return kOps;
}

}  // namespace warpform
