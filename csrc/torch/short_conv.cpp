// Bindings of the short convolution in front of a long one: checks, allocation, launch.
#include "kernels/short_conv/launch.h"

#include <optional>

#include "binding.h"

namespace warpform {
namespace {

void check_as_x(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_type(t.scalar_type() == x.scalar_type(), op, ": ", name, " must be ", dtype_name(x.scalar_type()),
             " as x is, got ", Got{t});
  check_same_device(op, name, t, "x", x);
}

void check_arguments(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_floating(op, "x", x);
  check_as_x(op, "weight", weight, x);
  if (bias) check_as_x(op, "bias", *bias, x);
  check(x.dim() == 3 && x.size(2) % 3 == 0, op, ": x must be of shape [batch, seqlen, 3 channels], got ", Shape{x});
  const int64_t rows = x.size(2);
  check(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) > 0, op, ": weight must be of shape [", rows,
        ", taps], got ", Shape{weight});
  check(!bias || (bias->dim() == 1 && bias->size(0) == rows), op, ": bias must be of shape [", rows, "], got ",
        Shape{bias ? *bias : x});
}

// dgated or dgate.
void check_gradient(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  const int64_t batch = x.size(0), seqlen = x.size(1), channels = x.size(2) / 3;
  check(t.dim() == 3 && t.size(0) == batch && t.size(1) == channels && t.size(2) == seqlen, op, ": ", name,
        " must be of shape [", batch, ", ", channels, ", ", seqlen, "], got ", Shape{t});
  check_as_x(op, name, t, x);
}

// Why no kernel takes the arguments, or nothing.
std::string unsupported(const Launch& launch, const Tensor& x, const Tensor& weight) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  if (const char* reason = kFloatTypes.why_not(dtype_name(x.scalar_type()))) return reason;
  if (!kShortConvTaps.allows(weight.size(1))) {
    return std::to_string(weight.size(1)) + " taps; the kernels take up to " + std::to_string(kShortConvTaps.max);
  }
  return "";
}

std::tuple<Tensor, Tensor> short_conv_gate(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  constexpr const char* kOp = "short_conv_gate";
  check_arguments(kOp, x, weight, bias);
  const Launch launch(kOp, x);
  if (const std::string reason = unsupported(launch, x, weight); !reason.empty()) {
    return UseReference(reason);
  }
  // Rows lie end to end in the kernels; what comes otherwise is copied.
  x = contiguous(x);
  weight = contiguous(weight);
  bias = contiguous(bias);
  const int64_t batch = x.size(0), seqlen = x.size(1), channels = x.size(2) / 3;
  Tensor gated = empty(kOp, {batch, channels, seqlen}, x.scalar_type(), x);
  Tensor gate = empty(kOp, {batch, channels, seqlen}, x.scalar_type(), x);
  launch.run<&launch_short_conv_gate, &cpu::Kernels::short_conv_gate>(
      ShortConvParams{.x = launch.in(x),
                      .weight = launch.in(weight),
                      .bias = launch.in_or_null(bias),
                      .gated = launch.out(gated),
                      .gate = launch.out(gate),
                      .batch = batch,
                      .seqlen = seqlen,
                      .channels = channels,
                      .taps = static_cast<int>(weight.size(1)),
                      .dtype = element_type(x)});
  return {gated, gate};
}

std::tuple<Tensor, Tensor, Tensor> short_conv_gate_backward(Tensor dgated, Tensor dgate, Tensor x, Tensor weight,
                                                            std::optional<Tensor> bias) {
  constexpr const char* kOp = "short_conv_gate_backward";
  check_arguments(kOp, x, weight, bias);
  check_gradient(kOp, "dgated", dgated, x);
  check_gradient(kOp, "dgate", dgate, x);
  const Launch launch(kOp, x);
  if (const std::string reason = unsupported(launch, x, weight); !reason.empty()) {
    return UseReference(reason);
  }
  dgated = contiguous(dgated);
  dgate = contiguous(dgate);
  x = contiguous(x);
  weight = contiguous(weight);
  bias = contiguous(bias);
  const int64_t batch = x.size(0), seqlen = x.size(1), channels = x.size(2) / 3, taps = weight.size(1);
  Tensor dx = empty(kOp, sizes_of(x), x.scalar_type(), x);
  Tensor dweight = empty(kOp, sizes_of(weight), weight.scalar_type(), x);
  Tensor dbias = empty(kOp, {bias ? 3 * channels : 0}, weight.scalar_type(), x);
  ShortConvBackwardParams params{.dgated = launch.in(dgated),
                                 .dgate = launch.in(dgate),
                                 .x = launch.in(x),
                                 .weight = launch.in(weight),
                                 .bias = launch.in_or_null(bias),
                                 .dx = launch.out(dx),
                                 .dweight = launch.out(dweight),
                                 .dbias = launch.out(dbias),
                                 .partials = nullptr,
                                 .groups = 0,
                                 .batch = batch,
                                 .seqlen = seqlen,
                                 .channels = channels,
                                 .taps = static_cast<int>(taps),
                                 .dtype = element_type(x)};
  params.groups = launch.ask<&short_conv_gate_backward_groups>(params);
  Tensor partials = empty(kOp, {params.groups, 3 * channels, taps + (bias ? 1 : 0)}, ScalarType::Float, x);
  params.partials = launch.out<float>(partials);
  launch.run<&launch_short_conv_gate_backward, &cpu::Kernels::short_conv_gate_backward>(params);
  return {dx, dweight, dbias};
}

}  // namespace

std::span<const Body> short_conv_ops() {
  static constexpr Body kOps[] = {body<"short_conv_gate", &short_conv_gate>(),
                                  body<"short_conv_gate_backward", &short_conv_gate_backward>()};
  return kOps;
}

}  // namespace warpform
