// Bindings of bias_gelu: checks, allocation, launch.
#include "kernels/activation/launch.h"

#include <optional>

#include "binding.h"
#include "rows.h"

namespace warpform {
namespace {

void check_arguments(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                     const std::string& approximate) {
  check_floating(op, "x", x);
  check_gelu_form(op, approximate);
  if (!bias) return;
  check(x.dim() > 0, op, ": bias must be of shape [width], and x of shape [..., width], got ", Got{*bias});
  check_parameter(op, "bias", *bias, x.size(-1), "x", x);
}

// Why no kernel takes x, or null.
const char* no_kernel(const Launch& launch, const Tensor& x) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  return kFloatTypes.why_not(dtype_name(x.scalar_type()));
}

Tensor bias_gelu(Tensor x, std::optional<Tensor> bias, std::string approximate) {
  constexpr const char* kOp = "bias_gelu";
  check_arguments(kOp, x, bias, approximate);
  const Launch launch(kOp, x);
  if (const char* reason = no_kernel(launch, x)) {
    return UseReference(reason);
  }
  x = contiguous(x);
  bias = contiguous(bias);
  const auto [rows, cols] = rows_of(x);
  Tensor out = empty(kOp, sizes_of(x), x.scalar_type(), x);
  const BiasGeluParams params{.x = launch.in(x),
                              .bias = launch.in_or_null(bias),
                              .out = launch.out(out),
                              .rows = rows,
                              .cols = cols,
                              .dtype = element_type(x),
                              .float_parameters = bias && bias->scalar_type() == ScalarType::Float,
                              .tanh = approximate == "tanh"};
  launch.run<&launch_bias_gelu, &cpu::Kernels::bias_gelu>(params);
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor dout, Tensor x, std::optional<Tensor> bias,
                                              std::string approximate) {
  constexpr const char* kOp = "bias_gelu_backward";
  check_arguments(kOp, x, bias, approximate);
  check_like(kOp, "dout", dout, "x", x);
  const Launch launch(kOp, x);
  if (const char* reason = no_kernel(launch, x)) {
    return UseReference(reason);
  }
  dout = contiguous(dout);
  x = contiguous(x);
  bias = contiguous(bias);
  const auto [rows, cols] = rows_of(x);
  Tensor dx = empty(kOp, sizes_of(x), x.scalar_type(), x);
  Tensor dbias = empty(kOp, {bias ? cols : 0}, bias ? bias->scalar_type() : x.scalar_type(), x);
  BiasGeluBackwardParams params{.dout = launch.in(dout),
                                .x = launch.in(x),
                                .bias = launch.in_or_null(bias),
                                .dx = launch.out(dx),
                                .dbias = launch.out(dbias),
                                .partials = nullptr,
                                .groups = 0,
                                .rows = rows,
                                .cols = cols,
                                .dtype = element_type(x),
                                .float_parameters = bias && bias->scalar_type() == ScalarType::Float,
                                .tanh = approximate == "tanh"};
  params.groups = launch.ask<&bias_gelu_backward_groups>(params);
  Tensor partials = empty(kOp, {params.groups, cols}, ScalarType::Float, x);
  params.partials = launch.out<float>(partials);
  launch.run<&launch_bias_gelu_backward, &cpu::Kernels::bias_gelu_backward>(params);
  return {dx, dbias};
}

}  // namespace

std::span<const Body> activation_ops() {
  static constexpr Body kOps[] = {body<"bias_gelu", &bias_gelu>(), body<"bias_gelu_backward", &bias_gelu_backward>()};
  return kOps;
}

}  // namespace warpform
