// Bindings of window mixing: checks, allocation, launch.
#include "kernels/window_mix/launch.h"

#include <optional>
#include <string>

#include "binding.h"
#include "kernels/norm/launch.h"
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

// Elements from a token to the next in the order of the grid, where all of them are as far apart and have their
// channels side by side: x and the gate are halves of one product.
std::optional<int64_t> token_stride(const Tensor& t) {
  if (t.numel() == 0 || t.is_contiguous()) return t.size(3);
  if (t.size(3) > 1 && t.stride(3) != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t tokens = 1;
  for (int64_t dim = 2; dim >= 0; tokens *= t.size(dim), --dim) {
    if (t.size(dim) == 1) continue;
    if (!stride && dim == 2) stride = t.stride(dim);
    if (!stride && t.stride(dim) % tokens == 0) stride = t.stride(dim) / tokens;
    if (!stride || t.stride(dim) != *stride * tokens) return std::nullopt;
  }
  if (!stride) return t.size(3);  // one token
  return *stride >= t.size(3) ? stride : std::nullopt;
}

// `t` with such a stride; copied where it has none, as expanded tensors do not.
Tensor with_token_rows(const Tensor& t) { return token_stride(t) ? t : dense_copy(t); }

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

// The problem by its sizes and dtypes, where they fit.
WindowMixProblem problem(const Arguments& a) {
  WindowMixProblem p{};
  p.dtype = element_type(a.x);
  p.float_norm = a.norm_weight && a.norm_weight->scalar_type() == ScalarType::Float;
  p.dilated = a.dilated;
  p.batch = static_cast<int>(a.x.size(0));
  p.height = static_cast<int>(a.x.size(1));
  p.width = static_cast<int>(a.x.size(2));
  p.channels = static_cast<int>(a.x.size(3));
  p.window[0] = static_cast<int>(a.window_size[0]);
  p.window[1] = static_cast<int>(a.window_size[1]);
  return p;
}

// With its pointers and all that follows from the sizes.
WindowMixProblem problem(const Launch& launch, const Arguments& a) {
  WindowMixProblem p = problem(a);
  p.x = launch.in(a.x);
  p.x_stride = *token_stride(a.x);
  p.gate = launch.in_or_null(a.gate);
  p.gate_stride = a.gate ? *token_stride(*a.gate) : 0;
  p.weight = launch.in(a.weight);
  p.bias = launch.in_or_null(a.bias);
  p.norm_weight = launch.in_or_null(a.norm_weight);
  p.norm_bias = launch.in_or_null(a.norm_bias);
  p.derive();
  return p;
}

// Why no kernel serves the call, or nothing.
std::string no_kernel(const Launch& launch, const Arguments& a, bool backward) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  if (const char* reason = kFloatTypes.why_not(dtype_name(a.x.scalar_type()))) return reason;
  if (const char* reason = kWindowMixTokens.why_not(a.tokens())) return reason;
  const auto fits = [](int64_t n) { return n <= INT32_MAX / 2; };
  const int64_t channels = a.x.size(3), windows = a.grid_tokens() / a.tokens();
  if (!fits(a.x.size(0)) || !fits(a.x.size(1)) || !fits(a.x.size(2)) || !fits(channels) || !fits(windows) ||
      !fits(windows * ((channels + 3) / 4))) {
    return "a size is larger than int32 holds";
  }
  if (backward && !launch.on_cpu() && a.norm_weight && !kRowNormCols.allows(channels)) {
    return "rows of " + std::to_string(channels) + " elements; the kernels of LayerNorm take up to " +
           std::to_string(kRowNormCols.max);
  }
  const char* reason = launch.ask<&window_mix_unsupported>(problem(a));
  return reason == nullptr ? "" : reason;
}

void make_readable(Arguments& a) {
  a.x = with_token_rows(a.x);
  a.weight = contiguous(a.weight);
  a.bias = contiguous(a.bias);
  a.norm_weight = contiguous(a.norm_weight);
  a.norm_bias = contiguous(a.norm_bias);
  if (a.gate) a.gate = with_token_rows(*a.gate);
}

std::tuple<Tensor, Tensor, Tensor> window_mix(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                                              std::optional<Tensor> gate, std::vector<int64_t> window_size,
                                              bool dilated, double eps) {
  constexpr const char* kOp = "window_mix";
  Arguments a{x, weight, bias, norm_weight, norm_bias, gate, window_size, dilated};
  check_arguments(kOp, a);
  check_eps(kOp, eps);
  const Launch launch(kOp, x);
  if (const std::string reason = no_kernel(launch, a, /*backward=*/false); !reason.empty()) {
    return UseReference(reason);
  }
  make_readable(a);
  const int64_t rows = norm_weight ? a.grid_tokens() : 0;
  const Tensor out = empty(kOp, sizes_of(x), x.scalar_type(), x);
  const Tensor mean = empty(kOp, {rows}, ScalarType::Float, x);
  const Tensor rstd = empty(kOp, {rows}, ScalarType::Float, x);
  WindowMixParams params{.problem = problem(launch, a), .out = launch.out(out)};
  params.problem.mean = launch.out<float>(mean);
  params.problem.rstd = launch.out<float>(rstd);
  params.problem.eps = static_cast<float>(eps);
  launch.run<&launch_window_mix, &cpu::Kernels::window_mix>(params);
  return {out, mean, rstd};
}

// LayerNorm's backward for tokens that do not lie whole in a tile, of the gradient of the normalised x.
void norm_backward(const char* op, const Launch& launch, const Arguments& a, const Tensor& mean, const Tensor& rstd,
                   const Tensor& dnormalised, const Tensor& dx, const Tensor& dnorm_weight,
                   const std::optional<Tensor>& dnorm_bias) {
  const int64_t channels = a.x.size(3);
  const Tensor x = contiguous(a.x);
  const Tensor unused = empty(op, {2, channels}, ScalarType::Float, dx);
  float* const sums = launch.out<float>(unused);
  LayerNormBackwardParams params{.dout = launch.in(dnormalised),
                                 .dsum = nullptr,
                                 .sum = launch.in(x),
                                 .weight = launch.in(*a.norm_weight),
                                 .mean = launch.in<float>(mean),
                                 .rstd = launch.in<float>(rstd),
                                 .dx = launch.out(dx),
                                 .dbias = sums,
                                 .dweight = launch.out(dnorm_weight),
                                 .dln_bias = dnorm_bias ? launch.out(*dnorm_bias) : sums + channels,
                                 .partials = nullptr,
                                 .groups = 0,
                                 .rows = a.grid_tokens(),
                                 .cols = channels,
                                 .dtype = element_type(a.x),
                                 .float_parameters = a.norm_weight->scalar_type() == ScalarType::Float};
  params.groups = launch.ask<&layer_norm_backward_groups>(params);
  const Tensor partials = empty(op, {3, params.groups, channels}, ScalarType::Float, dx);
  params.partials = launch.out<float>(partials);
  launch.run<&launch_layer_norm_backward, &cpu::Kernels::layer_norm_backward>(params);
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
  const Launch launch(kOp, x);
  if (const std::string reason = no_kernel(launch, a, /*backward=*/true); !reason.empty()) {
    return UseReference(reason);
  }
  make_readable(a);
  dout = dense(dout);
  mean = contiguous(mean);
  rstd = contiguous(rstd);
  const auto like = [&](const std::optional<Tensor>& t) {
    return t ? empty(kOp, sizes_of(*t), t->scalar_type(), *t) : empty(kOp, {0}, x.scalar_type(), x);
  };
  const auto workspace = [&](bool wanted, std::vector<int64_t> sizes) {
    return empty(kOp, wanted ? sizes : std::vector<int64_t>{0}, ScalarType::Float, x);
  };
  const auto out_or_null = [&](const std::optional<Tensor>& wanted, const Tensor& t) {
    return wanted ? launch.out(t) : nullptr;
  };
  BackwardResult result{like(x), like(weight), like(bias), like(norm_weight), like(norm_bias), like(gate)};
  auto& [dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate] = result;
  WindowMixBackwardParams params{};
  params.problem = problem(launch, a);
  params.problem.mean = const_cast<float*>(launch.in<float>(mean));
  params.problem.rstd = const_cast<float*>(launch.in<float>(rstd));
  const bool apart = !launch.on_cpu() && norm_weight && !params.problem.whole_tokens;
  params.shares = launch.ask<&window_mix_shares>(params.problem);
  const Tensor weight_sums = workspace(true, {params.shares, a.tokens(), a.tokens()});
  const Tensor bias_sums = workspace(bias.has_value(), {params.shares, a.tokens()});
  const Tensor norm_sums = workspace(!launch.on_cpu() && norm_weight && !apart, {2, params.problem.windows, x.size(3)});
  params.dout = launch.in(dout);
  params.dx = launch.out(dx);
  params.dgate = out_or_null(gate, dgate);
  params.dweight = launch.out(dweight);
  params.dbias = out_or_null(bias, dbias);
  params.dnorm_weight = out_or_null(norm_weight, dnorm_weight);
  params.dnorm_bias = out_or_null(norm_bias, dnorm_bias);
  params.weight_sums = launch.out<float>(weight_sums);
  params.bias_sums = launch.out<float>(bias_sums);
  params.norm_sums = launch.out<float>(norm_sums);
  launch.run<&launch_window_mix_backward, &cpu::Kernels::window_mix_backward>(params);
  if (apart) {
    const Tensor dnormalised = dx;
    dx = empty(kOp, sizes_of(x), x.scalar_type(), x);
    norm_backward(kOp, launch, a, mean, rstd, dnormalised, dx, dnorm_weight,
                  norm_bias ? std::optional<Tensor>(dnorm_bias) : std::nullopt);
  }
  return result;
}

}  // namespace

std::span<const Body> window_mix_ops() {
  static constexpr Body kOps[] = {body<"window_mix", &window_mix>(),
                                  body<"window_mix_backward", &window_mix_backward>()};
  return kOps;
}

}  // namespace warpform
