// Bindings of LayerNorm, RMSNorm and RMSNorm with GELU: checks, allocation, launch.
#include "kernels/norm/launch.h"

#include <algorithm>
#include <cmath>
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
  // Beyond it the cube in GELU's approximation by tanh would leave float32.
  check(std::abs(scale.value_or(1)) <= 1e10, op, ": scale must be from -1e10 to 1e10, got ", Number{scale.value_or(1)});
  check_eps(op, eps);
  check_gelu_form(op, approximate);
}

// Why no kernel takes x, or nothing.
std::string no_kernel(const Launch& launch, const Tensor& x, int64_t cols) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  if (const char* reason = kFloatTypes.why_not(dtype_name(x.scalar_type()))) return reason;
  if (!launch.on_cpu() && !kRowNormCols.allows(cols)) {
    return "rows of " + std::to_string(cols) + " elements; the kernels take up to " + std::to_string(kRowNormCols.max);
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
  if (const std::string reason = no_kernel(launch, x, cols); !reason.empty()) {
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
  check_statistics(kOp, "mean", mean, rows, "sum", sum);
  check_statistics(kOp, "rstd", rstd, rows, "sum", sum);
  const Launch launch(kOp, sum);
  if (const std::string reason = no_kernel(launch, sum, cols); !reason.empty()) {
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
  const auto [rows, cols] = rows_of(x);
  const Launch launch(kOp, x);
  if (const std::string reason = no_kernel(launch, x, cols); !reason.empty()) return UseReference(reason);
  x = contiguous(x);
  residual = contiguous(residual);
  weight = contiguous(weight);
  Tensor out = empty(kOp, sizes_of(x), x.scalar_type(), x);
  Tensor sum = empty(kOp, return_sum ? sizes_of(x) : std::vector<int64_t>{0}, x.scalar_type(), x);
  Tensor rstd = empty(kOp, {rows}, ScalarType::Float, x);
  const RmsNormParams params{.x = launch.in(x),
                             .residual = launch.in_or_null(residual),
                             .weight = launch.in(weight),
                             .out = launch.out(out),
                             .sum = return_sum ? launch.out(sum) : nullptr,
                             .rstd = launch.out<float>(rstd),
                             .rows = rows,
                             .cols = cols,
                             .eps = static_cast<float>(eps),
                             .dtype = element_type(x),
                             .float_parameters = weight.scalar_type() == ScalarType::Float};
  launch.run<&launch_rms_norm, &cpu::Kernels::rms_norm>(params);
  return {out, sum, rstd};
}

std::tuple<Tensor, Tensor> add_residual_rms_norm_backward(Tensor dout, std::optional<Tensor> dsum, Tensor sum,
                                                          Tensor weight, Tensor rstd) {
  constexpr const char* kOp = "add_residual_rms_norm_backward";
  check_backward(kOp, dout, dsum, sum, weight);
  const auto [rows, cols] = rows_of(sum);
  check_statistics(kOp, "rstd", rstd, rows, "sum", sum);
  const Launch launch(kOp, sum);
  if (const std::string reason = no_kernel(launch, sum, cols); !reason.empty()) return UseReference(reason);
  dout = contiguous(dout);
  dsum = contiguous(dsum);
  sum = contiguous(sum);
  weight = contiguous(weight);
  rstd = contiguous(rstd);
  Tensor dx = empty(kOp, sizes_of(sum), sum.scalar_type(), sum);
  Tensor dweight = empty(kOp, {cols}, weight.scalar_type(), sum);
  RmsNormBackwardParams params{.dout = launch.in(dout),
                               .dsum = launch.in_or_null(dsum),
                               .sum = launch.in(sum),
                               .weight = launch.in(weight),
                               .rstd = launch.in<float>(rstd),
                               .dx = launch.out(dx),
                               .dweight = launch.out(dweight),
                               .partials = nullptr,
                               .groups = 0,
                               .rows = rows,
                               .cols = cols,
                               .dtype = element_type(sum),
                               .float_parameters = weight.scalar_type() == ScalarType::Float};
  std::optional<Tensor> partials;
  if (!launch.on_cpu()) {
    params.groups = launch.ask<&rms_norm_backward_groups>(params);
    partials = empty(kOp, {params.groups, cols}, ScalarType::Float, sum);
    params.partials = launch.out<float>(*partials);
  }
  launch.run<&launch_rms_norm_backward, &cpu::Kernels::rms_norm_backward>(params);
  return {dx, dweight};
}

// Rows brought to the length `scale` are normalised by their root mean square and multiplied by this; and what is added
// to the sum of squares, to the mean.
struct Normalisation {
  float gain;
  float eps;
  Normalisation(std::optional<double> scale, double eps_of_sum, int64_t cols) {
    const double count = static_cast<double>(std::max<int64_t>(cols, 1));
    gain = scale ? static_cast<float>(*scale / std::sqrt(count)) : 1.0f;
    eps = static_cast<float>(eps_of_sum / count);
  }
};

Tensor rms_norm_gelu(Tensor x, std::optional<double> scale, double eps, std::string approximate) {
  constexpr const char* kOp = "rms_norm_gelu";
  check_rms_norm_gelu(kOp, x, scale, eps, approximate);
  const auto [rows, cols] = rows_of(x);
  const Launch launch(kOp, x);
  if (const std::string reason = no_kernel(launch, x, cols); !reason.empty()) return UseReference(reason);
  x = contiguous(x);
  const Normalisation norm(scale, eps, cols);
  Tensor out = empty(kOp, sizes_of(x), x.scalar_type(), x);
  const RmsNormGeluParams params{.x = launch.in(x),
                                 .out = launch.out(out),
                                 .rows = rows,
                                 .cols = cols,
                                 .gain = norm.gain,
                                 .eps = norm.eps,
                                 .dtype = element_type(x),
                                 .tanh = approximate == "tanh"};
  launch.run<&launch_rms_norm_gelu, &cpu::Kernels::rms_norm_gelu>(params);
  return out;
}

Tensor rms_norm_gelu_backward(Tensor dout, Tensor x, std::optional<double> scale, double eps, std::string approximate) {
  constexpr const char* kOp = "rms_norm_gelu_backward";
  check_rms_norm_gelu(kOp, x, scale, eps, approximate);
  check_like(kOp, "dout", dout, "x", x);
  const auto [rows, cols] = rows_of(x);
  const Launch launch(kOp, x);
  if (const std::string reason = no_kernel(launch, x, cols); !reason.empty()) return UseReference(reason);
  dout = contiguous(dout);
  x = contiguous(x);
  const Normalisation norm(scale, eps, cols);
  Tensor dx = empty(kOp, sizes_of(x), x.scalar_type(), x);
  const RmsNormGeluBackwardParams params{.dout = launch.in(dout),
                                         .x = launch.in(x),
                                         .dx = launch.out(dx),
                                         .rows = rows,
                                         .cols = cols,
                                         .gain = norm.gain,
                                         .eps = norm.eps,
                                         .dtype = element_type(x),
                                         .tanh = approximate == "tanh"};
  launch.run<&launch_rms_norm_gelu_backward, &cpu::Kernels::rms_norm_gelu_backward>(params);
  return dx;
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
