// Bindings of add_bias_residual_layer_norm: checks, allocation, launch.
#include "kernels/norm/launch.h"

#include <optional>

#include "binding.h"
#include "rows.h"

namespace warpform {
namespace {

void check_statistics(const char* op, const char* name, const Tensor& t, int64_t rows, const Tensor& x) {
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == rows, op, ": ", name, " must be ", dtype_name(dtype),
        " of shape [", rows, "], got ", Got{t});
  check_same_device(op, name, t, x);
}

// Why no LayerNorm kernel takes x, or nothing.
std::string layer_norm_unsupported(const Launch& launch, const Tensor& x, int64_t cols) {
  if (const char* reason = launch.unusable()) return reason;
  if (const char* reason = kFloatTypes.why_not(dtype_name(x.scalar_type()))) return reason;
  if (!kLayerNormCols.allows(cols)) {
    return "rows of " + std::to_string(cols) + " elements; the kernels take up to " +
           std::to_string(kLayerNormCols.max);
  }
  return "";
}

using Quadruple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Quadruple add_bias_residual_layer_norm(Tensor x, std::optional<Tensor> bias, std::optional<Tensor> residual,
                                       Tensor weight, Tensor ln_bias, double eps, bool return_sum) {
  constexpr const char* kOp = "add_bias_residual_layer_norm";
  const auto [rows, cols] = rows_of(kOp, "x", x);
  if (residual) check_like(kOp, "residual", *residual, "x", x);
  check_parameter(kOp, "weight", weight, cols, x);
  check_parameter(kOp, "ln_bias", ln_bias, cols, x);
  if (bias) check_parameter(kOp, "bias", *bias, cols, x);
  check(ln_bias.scalar_type() == weight.scalar_type() && (!bias || bias->scalar_type() == weight.scalar_type()), kOp,
        ": weight, ln_bias and bias must be of one dtype, got ", dtype_name(weight.scalar_type()), ", ",
        dtype_name(ln_bias.scalar_type()), " and ", bias ? dtype_name(bias->scalar_type()) : "none");
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
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
  launch_layer_norm({.x = launch.in(x),
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
                     .float_parameters = weight.scalar_type() == ScalarType::Float},
                    launch.stream());
  return {out, sum, mean, rstd};
}

Quadruple add_bias_residual_layer_norm_backward(Tensor dout, std::optional<Tensor> dsum, Tensor sum, Tensor weight,
                                                Tensor mean, Tensor rstd) {
  constexpr const char* kOp = "add_bias_residual_layer_norm_backward";
  const auto [rows, cols] = rows_of(kOp, "sum", sum);
  check_like(kOp, "dout", dout, "sum", sum);
  if (dsum) check_like(kOp, "dsum", *dsum, "sum", sum);
  check_parameter(kOp, "weight", weight, cols, sum);
  check_statistics(kOp, "mean", mean, rows, sum);
  check_statistics(kOp, "rstd", rstd, rows, sum);
  if constexpr (!kHasKernels) return UseReference(without_kernels(sum));
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
  params.groups = layer_norm_backward_groups(params);
  Tensor partials = empty(kOp, {3, params.groups, cols}, ScalarType::Float, sum);
  params.partials = launch.out<float>(partials);
  launch_layer_norm_backward(params, launch.stream());
  return {dx, dbias, dweight, dln_bias};
}

}  // namespace

std::span<const Body> norm_ops() {
  static constexpr Body kOps[] = {
      body<"add_bias_residual_layer_norm", &add_bias_residual_layer_norm>(),
      body<"add_bias_residual_layer_norm_backward", &add_bias_residual_layer_norm_backward>()};
  return kOps;
}

}  // namespace warpform
