// Bindings of LayerNorm, RMSNorm and RMSNorm with GELU: checks, allocation, launch.
#include "kernels/norm/launch.h"

#include <optional>

#include "binding.h"
#include "rows.h"

namespace warpform {
namespace {

void check_rows(const char* op, const char* name, const Tensor& x) {
  check(x.dim() > 0, op, ": ", name, " must be of shape [..., width], got ", Got{x});
  check_floating(op, name, x);
}

void check_residual(const char* op, const std::optional<Tensor>& residual, const Tensor& x) {
  if (!residual) return;
  check(same_sizes(*residual, x), op, ": residual must be of shape ", Shape{x}, ", got ", Got{*residual});
  check_type(residual->scalar_type() == x.scalar_type(), op, ": residual must be ", dtype_name(x.scalar_type()),
             " as x is, got ", Got{*residual});
  check_same_device(op, "residual", *residual, "x", x);
}

void check_layer_norm(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& ln_bias, double eps) {
  check_rows(op, "x", x);
  const int64_t width = x.size(-1);
  const ScalarType dtype = weight.scalar_type();
  const auto check_one = [&](const char* name, const Tensor& t) {
    check(t.dim() == 1 && t.size(0) == width, op, ": ", name, " must be of shape [", width, "], got ", Got{t});
    check_type(t.scalar_type() == dtype && (dtype == x.scalar_type() || dtype == ScalarType::Float), op,
               ": bias, weight and ln_bias must all be ", dtype_name(x.scalar_type()), " as x is, or all float32, got ",
               name, " ", Got{t});
    check_same_device(op, name, t, "x", x);
  };
  if (bias) check_one("bias", *bias);
  check_one("weight", weight);
  check_one("ln_bias", ln_bias);
  check_residual(op, residual, x);
  check_eps(op, eps);
}

// mean or rstd: one element for each row of `sum`.
void check_statistics(const char* op, const char* name, const Tensor& t, int64_t rows, const Tensor& sum) {
  const ScalarType dtype = sum.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == rows, op, ": ", name, " must be ", dtype_name(dtype),
        " of shape [", rows, "], got ", Got{t});
  check_same_device(op, name, t, "sum", sum);
}

// What the backward of LayerNorm and that of RMSNorm take.
void check_backward(const char* op, const Tensor& dout, const std::optional<Tensor>& dsum, const Tensor& sum,
                    const Tensor& weight) {
  check_rows(op, "sum", sum);
  check_like(op, "dout", dout, "sum", sum);
  if (dsum) check_like(op, "dsum", *dsum, "sum", sum);
  check_parameter(op, "weight", weight, sum.size(-1), "sum", sum);
}

void check_rms_norm(const char* op, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                    double eps) {
  check_rows(op, "x", x);
  check_parameter(op, "weight", weight, x.size(-1), "x", x);
  check_residual(op, residual, x);
  check_eps(op, eps);
}

void check_rms_norm_gelu(const char* op, const Tensor& x, std::optional<double> scale, double eps,
                         const std::string& approximate) {
  check_rows(op, "x", x);
  check_finite(op, "scale", scale.value_or(1));
  check_eps(op, eps);
  check_gelu_form(op, approximate);
}

// Why no LayerNorm kernel takes x, or nothing.
std::string layer_norm_unsupported(const Launch& launch, const Tensor& x, int64_t cols) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  if (const char* reason = kFloatTypes.why_not(dtype_name(x.scalar_type()))) return reason;
  if (!launch.on_cpu() && !kLayerNormCols.allows(cols)) {
    return "rows of " + std::to_string(cols) + " elements; the kernels take up to " +
           std::to_string(kLayerNormCols.max);
  }
  return "";
}

using Quadruple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Quadruple add_bias_residual_layer_norm(Tensor x, std::optional<Tensor> bias, std::optional<Tensor> residual,
                                       Tensor weight, Tensor ln_bias, double eps, bool return_sum) {
  constexpr const char* kOp = "add_bias_residual_layer_norm";
  check_layer_norm(kOp, x, bias, residual, weight, ln_bias, eps);
  const auto [rows, cols] = rows_of(x);
  const Launch launch(kOp, x);
  if (const std::string reason = layer_norm_unsupported(launch, x, cols); !reason.empty()) {
    return UseReference(reason);
  }
  x = contiguous(x);
  residual = contiguous(residual);
  bias = contiguous(bias);
  weight = contiguous(weight);
  ln_bias = contiguous(ln_bias);
  Tensor out = empty(kOp, sizes_of(x), x.scalar_type(), x);
  Tensor sum = empty(kOp, return_sum ? sizes_of(x) : std::vector<int64_t>{0}, x.scalar_type(), x);
  Tensor mean = empty(kOp, {rows}, ScalarType::Float, x);
  Tensor rstd = empty(kOp, {rows}, ScalarType::Float, x);
  const LayerNormParams params{.x = launch.in(x),
                               .residual = launch.in_or_null(residual),
                               .bias = launch.in_or_null(bias),
                               .weight = launch.in(weight),
                               .ln_bias = launch.in(ln_bias),
                               .out = launch.out(out),
                               .sum = return_sum ? launch.out(sum) : nullptr,
                               .mean = launch.out<float>(mean),
                               .rstd = launch.out<float>(rstd),
                               .rows = rows,
                               .cols = cols,
                               .eps = static_cast<float>(eps),
                               .dtype = element_type(x),
                               .float_parameters = weight.scalar_type() == ScalarType::Float};
  launch.run<&launch_layer_norm, &cpu::Kernels::layer_norm>(params);
  return {out, sum, mean, rstd};
}

Quadruple add_bias_residual_layer_norm_backward(Tensor dout, std::optional<Tensor> dsum, Tensor sum, Tensor weight,
                                                Tensor mean, Tensor rstd) {
  constexpr const char* kOp = "add_bias_residual_layer_norm_backward";
  check_backward(kOp, dout, dsum, sum, weight);
  const auto [rows, cols] = rows_of(sum);
  check_statistics(kOp, "mean", mean, rows, sum);
  check_statistics(kOp, "rstd", rstd, rows, sum);
  const Launch launch(kOp, sum);
  if (const std::string reason = layer_norm_unsupported(launch, sum, cols); !reason.empty()) {
    return UseReference(reason);
  }
  dout = contiguous(dout);
  dsum = contiguous(dsum);
  sum = contiguous(sum);
  weight = contiguous(weight);
  mean = contiguous(mean);
  rstd = contiguous(rstd);
  Tensor dx = empty(kOp, sizes_of(sum), sum.scalar_type(), sum);
  Tensor dbias = empty(kOp, {cols}, weight.scalar_type(), sum);
  Tensor dweight = empty(kOp, {cols}, weight.scalar_type(), sum);
  Tensor dln_bias = empty(kOp, {cols}, weight.scalar_type(), sum);
  LayerNormBackwardParams params{.dout = launch.in(dout),
                                 .dsum = launch.in_or_null(dsum),
                                 .sum = launch.in(sum),
                                 .weight = launch.in(weight),
                                 .mean = launch.in<float>(mean),
                                 .rstd = launch.in<float>(rstd),
                                 .dx = launch.out(dx),
                                 .dbias = launch.out(dbias),
                                 .dweight = launch.out(dweight),
                                 .dln_bias = launch.out(dln_bias),
                                 .partials = nullptr,
                                 .groups = 0,
                                 .rows = rows,
                                 .cols = cols,
                                 .dtype = element_type(sum),
                                 .float_parameters = weight.scalar_type() == ScalarType::Float};
  std::optional<Tensor> partials;
  if (!launch.on_cpu()) {
    params.groups = launch.ask<&layer_norm_backward_groups>(params);
    partials = empty(kOp, {3, params.groups, cols}, ScalarType::Float, sum);
    params.partials = launch.out<float>(*partials);
  }
  launch.run<&launch_layer_norm_backward, &cpu::Kernels::layer_norm_backward>(params);
  return {dx, dbias, dweight, dln_bias};
}

std::tuple<Tensor, Tensor, Tensor> add_residual_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                                         double eps, bool return_sum) {
  constexpr const char* kOp = "add_residual_rms_norm";
  check_rms_norm(kOp, x, residual, weight, eps);
  return UseReference("there is no kernel yet");
}

std::tuple<Tensor, Tensor> add_residual_rms_norm_backward(Tensor dout, std::optional<Tensor> dsum, Tensor sum,
                                                          Tensor weight, Tensor rstd) {
  constexpr const char* kOp = "add_residual_rms_norm_backward";
  check_backward(kOp, dout, dsum, sum, weight);
  check_statistics(kOp, "rstd", rstd, rows_of(sum).rows, sum);
  return UseReference("there is no kernel yet");
}

Tensor rms_norm_gelu(Tensor x, std::optional<double> scale, double eps, std::string approximate) {
  constexpr const char* kOp = "rms_norm_gelu";
  check_rms_norm_gelu(kOp, x, scale, eps, approximate);
  return UseReference("there is no kernel yet");
}

Tensor rms_norm_gelu_backward(Tensor dout, Tensor x, std::optional<double> scale, double eps, std::string approximate) {
  constexpr const char* kOp = "rms_norm_gelu_backward";
  check_rms_norm_gelu(kOp, x, scale, eps, approximate);
  check_like(kOp, "dout", dout, "x", x);
  return UseReference("there is no kernel yet");
}

}  // namespace

std::span<const Body> norm_ops() {
  static constexpr Body kOps[] = {
      body<"add_bias_residual_layer_norm", &add_bias_residual_layer_norm>(),
      body<"add_bias_residual_layer_norm_backward", &add_bias_residual_layer_norm_backward>(),
      body<"add_residual_rms_norm", &add_residual_rms_norm>(),
      body<"add_residual_rms_norm_backward", &add_residual_rms_norm_backward>(),
      body<"rms_norm_gelu", &rms_norm_gelu>(),
      body<"rms_norm_gelu_backward", &rms_norm_gelu_backward>()};
  return kOps;
}

}  // namespace warpform
