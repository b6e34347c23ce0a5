// Bindings of window mixing: checks, allocation, launch.
#include "kernels/window_mix/launch.h"

#include <algorithm>
#include <optional>

#include "binding.h"
#include "rows.h"

namespace warpform {
namespace {

// The arguments that forward and backward share, in the schema's order.
struct Arguments {
  Tensor x, weight;
  std::optional<Tensor> bias, norm_weight, norm_bias, gate;
  std::vector<int64_t> window_size;
  bool dilated;

  int64_t tokens() const { return window_size[0] * window_size[1]; }  // of a window
  int64_t grid_tokens() const { return x.size(0) * x.size(1) * x.size(2); }
};

// Every axis of a window holds at most so many tokens, so that their product and its square fit an int64.
constexpr int64_t kLongestAxis = int64_t{1} << 15;

void check_arguments(const char* op, const Arguments& a) {
  check_floating(op, "x", a.x);
  check(a.x.dim() == 4, op, ": x must be of shape [batch, height, width, channels], got ", Shape{a.x});
  check(a.x.size(3) > 0, op, ": x must have at least 1 channel, got ", Shape{a.x});
  check(a.window_size.size() == 2, op, ": window_size must be an int or 2 of them, one for each axis, got ",
        Numbers{a.window_size});
  for (const int64_t w : a.window_size) {
    check(w >= 1, op, ": window_size must be at least 1, got ", Numbers{a.window_size});
    check(w <= kLongestAxis, op, ": window_size must be at most 2^15 on every axis, got ", Numbers{a.window_size});
  }
  check(a.x.size(1) % a.window_size[0] == 0 && a.x.size(2) % a.window_size[1] == 0, op,
        ": window_size must divide the height and width of x, ", Shape{a.x}, ", got ", Numbers{a.window_size});
  const int64_t n = a.tokens(), channels = a.x.size(3);
  check(a.weight.dim() == 2 && a.weight.size(0) == n && a.weight.size(1) == n, op, ": weight must be of shape [", n,
        ", ", n, "], got ", Shape{a.weight});
  check_dtype_of(op, "weight", a.weight, "x", a.x);
  check_same_device(op, "weight", a.weight, "x", a.x);
  if (a.bias) {
    check(a.bias->dim() == 1 && a.bias->size(0) == n, op, ": bias must be of shape [", n, "], got ", Shape{*a.bias});
    check_dtype_of(op, "bias", *a.bias, "x", a.x);
    check_same_device(op, "bias", *a.bias, "x", a.x);
  }
  check(a.norm_weight || !a.norm_bias, op, ": norm_bias must be None where norm_weight is None");
  if (a.norm_weight) check_parameter(op, "norm_weight", *a.norm_weight, channels, "x", a.x);
  if (a.norm_bias) {
    check_parameter(op, "norm_bias", *a.norm_bias, channels, "x", a.x);
    check_dtype_of(op, "norm_bias", *a.norm_bias, "norm_weight", *a.norm_weight);
  }
  if (a.gate) check_like(op, "gate", *a.gate, "x", a.x);
}

// mean or rstd: an element for each token of the grid, none without a norm.
void check_statistics(const char* op, const char* name, const Tensor& t, const Arguments& a) {
  const bool wide = a.x.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = a.norm_weight ? a.grid_tokens() : 0;
  check(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == rows, op, ": ", name, " must be ", dtype_name(dtype),
        " of shape [", rows, "], got ", Got{t});
  check_same_device(op, name, t, "x", a.x);
}

// Why no kernel serves the call, or null.
const char* no_kernel(const Launch& launch, const Arguments& a) {
  if (const char* reason = launch.unusable()) return reason;
  if (const char* reason = kFloatTypes.why_not(dtype_name(a.x.scalar_type()))) return reason;
  if (const char* reason = kWindowMixTokens.why_not(a.tokens())) return reason;
  return "window_mix has no kernel yet";
}

std::tuple<Tensor, Tensor, Tensor> window_mix(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                                              std::optional<Tensor> gate, std::vector<int64_t> window_size,
                                              bool dilated, double eps) {
  constexpr const char* kOp = "window_mix";
  Arguments a{x, weight, bias, norm_weight, norm_bias, gate, window_size, dilated};
  check_arguments(kOp, a);
  check_eps(kOp, eps);
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  const Launch launch(kOp, x);
  return UseReference(no_kernel(launch, a));
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult window_mix_backward(Tensor dout, Tensor x, Tensor weight, std::optional<Tensor> bias,
                                   std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                                   std::optional<Tensor> gate, Tensor mean, Tensor rstd,
                                   std::vector<int64_t> window_size, bool dilated) {
  constexpr const char* kOp = "window_mix_backward";
  Arguments a{x, weight, bias, norm_weight, norm_bias, gate, window_size, dilated};
  check_arguments(kOp, a);
  check_like(kOp, "dout", dout, "x", x);
  check_statistics(kOp, "mean", mean, a);
  check_statistics(kOp, "rstd", rstd, a);
  if constexpr (!kHasKernels) return UseReference(without_kernels(x));
  const Launch launch(kOp, x);
  return UseReference(no_kernel(launch, a));
}

}  // namespace

std::span<const Body> window_mix_ops() {
  static constexpr Body kOps[] = {body<"window_mix", &window_mix>(),
                                  body<"window_mix_backward", &window_mix_backward>()};
  return kOps;
}

}  // namespace warpform
