// Bindings of window attention: checks, allocation, launch.
#include "kernels/window/launch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "binding.h"
#include "cpu/supported.h"

namespace warpform {
namespace {

// The arguments that forward and backward share, in the schema's order.
struct Arguments {
  Tensor qkv;
  std::optional<Tensor> table, logit_scale, qkv_bias;
  std::vector<int64_t> window_size, shift_size;
  std::optional<double> scale;
  double mask_value;

  int64_t axes() const { return qkv.dim() - 4; }
  int64_t heads() const { return qkv.size(-2); }
  int64_t head_dim() const { return qkv.size(-1); }
  int64_t tokens() const {  // of a window
    int64_t n = 1;
    for (const int64_t w : window_size) n *= w;
    return n;
  }
  int64_t windows() const {  // of an image
    int64_t n = 1;
    for (int64_t i = 0; i < axes(); ++i) n *= (qkv.size(1 + i) + window_size[i] - 1) / window_size[i];
    return n;
  }
};

// Every axis of a window holds at most so many tokens, so that numbers of tokens and of a table's rows fit an int64.
constexpr int64_t kLongestAxis = int64_t{1} << 20;

void check_arguments(const char* op, const Arguments& a) {
  check_floating(op, "qkv", a.qkv);
  check((a.qkv.dim() == 6 || a.qkv.dim() == 7) && a.qkv.size(-3) == 3, op,
        ": qkv must be of shape [batch, height, width, 3, heads, head_dim], or with depth before height, got ",
        Shape{a.qkv});
  check(a.head_dim() > 0, op, ": head_dim must be at least 1, got qkv of shape ", Shape{a.qkv});
  const int64_t axes = a.axes();
  for (const auto& [name, sizes] : {std::pair{"window_size", &a.window_size}, {"shift_size", &a.shift_size}}) {
    check(static_cast<int64_t>(sizes->size()) == axes, op, ": ", name, " must be an int or ", axes,
          " of them, one for each axis, got ", Numbers{*sizes});
  }
  int64_t entries = 1;
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t w = a.window_size[i], s = a.shift_size[i];
    check(w >= 1, op, ": window_size must be at least 1, got ", Numbers{a.window_size});
    check(s >= 0 && s < w, op, ": shift_size must be at least 0 and below window_size ", Numbers{a.window_size},
          ", got ", Numbers{a.shift_size});
    check(w <= kLongestAxis, op, ": window_size must be at most 2^20 on every axis, got ", Numbers{a.window_size});
    entries *= 2 * w - 1;
  }
  const auto check_shape = [&](const char* name, const std::optional<Tensor>& t, std::vector<int64_t> sizes) {
    if (!t) return;
    check(std::ranges::equal(t->sizes(), sizes), op, ": ", name, " must be of shape ", Numbers{sizes}, ", got ",
          Shape{*t});
  };
  check_shape("relative_position_bias_table", a.table, {entries, a.heads()});
  check_shape("logit_scale", a.logit_scale, {a.heads()});
  check_shape("qkv_bias", a.qkv_bias, {3, a.heads(), a.head_dim()});
  check(!(a.logit_scale && a.scale), op, ": scale must be None where logit_scale is given, got ",
        Number{a.scale.value_or(0)});
  const auto check_parameter = [&](const char* name, const std::optional<Tensor>& t) {
    if (!t) return;
    check_type(t->scalar_type() == a.qkv.scalar_type() || t->scalar_type() == ScalarType::Float, op, ": ", name,
               " must be ", dtype_name(a.qkv.scalar_type()), " as qkv is, or float32, got ", Got{*t});
    check_same_device(op, name, *t, "qkv", a.qkv);
  };
  check_parameter("relative_position_bias_table", a.table);
  check_parameter("logit_scale", a.logit_scale);
  check_parameter("qkv_bias", a.qkv_bias);
  check_finite(op, "scale", a.scale.value_or(1));
  if (a.mask_value != -std::numeric_limits<double>::infinity()) check_finite(op, "mask_value", a.mask_value);
}

// The problem by its sizes and dtypes; `table` is not read; it tells only whether there is one.
WindowProblem problem(const Arguments& a) {
  const auto bounded = [](int64_t x) { return static_cast<int>(std::min<int64_t>(x, INT32_MAX)); };
  WindowProblem p{};
  p.table = a.table ? a.table->const_data_ptr() : nullptr;
  p.table_dtype = a.table ? element_type(*a.table) : DType::kFloat32;
  p.logit_scale_dtype = a.logit_scale ? element_type(*a.logit_scale) : DType::kFloat32;
  p.dtype = element_type(a.qkv);
  p.batch = bounded(a.qkv.size(0));
  p.heads = bounded(a.heads());
  p.head_dim = bounded(a.head_dim());
  for (int64_t axis = 0; axis < 3; ++axis) {
    const int64_t i = axis - (3 - a.axes());  // a grid of two axes has no depth
    p.size[axis] = i < 0 ? 1 : bounded(a.qkv.size(1 + i));
    p.window[axis] = i < 0 ? 1 : static_cast<int>(a.window_size[i]);
    p.shift[axis] = i < 0 ? 0 : static_cast<int>(a.shift_size[i]);
  }
  p.scale = static_cast<float>(a.scale.value_or(1.0 / std::sqrt(static_cast<double>(a.head_dim()))));
  p.mask_value = static_cast<float>(a.mask_value);
  return p;
}

// With its pointers and all that follows from the sizes.
WindowProblem problem(const Launch& launch, const Arguments& a) {
  WindowProblem p = problem(a);
  p.qkv = launch.in(a.qkv);
  p.table = launch.in_or_null(a.table);
  p.logit_scale = launch.in_or_null(a.logit_scale);
  p.qkv_bias = launch.in_or_null(a.qkv_bias);
  if (launch.on_cpu()) {
    // Finite numbers that only a double holds count as the largest of float32.
    constexpr double kLargest = std::numeric_limits<float>::max();
    const bool hides = a.mask_value == -std::numeric_limits<double>::infinity();
    p.mask_value = static_cast<float>(hides ? a.mask_value : std::clamp(a.mask_value, -kLargest, kLargest));
  }
  p.derive();
  return p;
}

// Why no CPU kernel serves the call, or null.
const char* no_cpu_kernel(const Arguments& a) {
  if (const char* reason = cpu::kFloats.why_not(dtype_name(a.qkv.scalar_type()))) return reason;
  if (a.qkv_bias && a.qkv_bias->scalar_type() != a.qkv.scalar_type()) return "qkv_bias is not of qkv's dtype";
  if (const char* reason = cpu::kWindowTokens.why_not(a.tokens())) return reason;
  const auto fits = [](int64_t n) { return n <= INT32_MAX; };
  bool all = fits(a.qkv.size(0) * a.windows()) && fits(a.heads()) && fits(a.head_dim());
  for (int64_t i = 0; i <= a.axes(); ++i) all = all && fits(a.qkv.size(i));
  return all ? nullptr : "a size is larger than int32 holds";
}

// Why no kernel serves the call, or null.
const char* no_kernel(const Launch& launch, const Arguments& a, bool backward) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  if (launch.on_cpu()) return no_cpu_kernel(a);
  if (const char* reason = kHalfTypes.why_not(dtype_name(a.qkv.scalar_type()))) return reason;
  if (a.qkv_bias && a.qkv_bias->scalar_type() != a.qkv.scalar_type()) return "qkv_bias is not of qkv's dtype";
  return launch.ask<&window_attention_unsupported>(problem(a), backward);
}

// [batch, grid..., heads * head_dim]
std::vector<int64_t> out_sizes(const Arguments& a) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i <= a.axes(); ++i) sizes.push_back(a.qkv.size(i));
  sizes.push_back(a.heads() * a.head_dim());
  return sizes;
}

std::vector<int64_t> lse_sizes(const Arguments& a) {
  if (a.tokens() <= kWindowBlock) return {0};
  return {a.qkv.size(0), a.windows(), a.heads(), a.tokens()};
}

// CUDA kernels ask for aligned tensors too.
template <class T>
T as_kernels_read(const Launch& launch, const T& t) {
  return launch.on_cpu() ? contiguous(t) : dense(t);
}

void make_dense(const Launch& launch, Arguments& a) {
  a.qkv = as_kernels_read(launch, a.qkv);
  a.table = as_kernels_read(launch, a.table);
  a.logit_scale = as_kernels_read(launch, a.logit_scale);
  a.qkv_bias = as_kernels_read(launch, a.qkv_bias);
}

using ForwardResult = std::tuple<Tensor, Tensor>;

ForwardResult window_attention(Tensor qkv, std::optional<Tensor> relative_position_bias_table,
                               std::optional<Tensor> logit_scale, std::optional<Tensor> qkv_bias,
                               std::vector<int64_t> window_size, std::vector<int64_t> shift_size,
                               std::optional<double> scale, double mask_value) {
  constexpr const char* kOp = "window_attention";
  Arguments a{qkv, relative_position_bias_table, logit_scale, qkv_bias, window_size, shift_size, scale, mask_value};
  check_arguments(kOp, a);
  const Launch launch(kOp, qkv);
  if (const char* reason = no_kernel(launch, a, /*backward=*/false)) {
    return UseReference(reason);
  }
  make_dense(launch, a);
  ForwardResult result{empty(kOp, out_sizes(a), qkv.scalar_type(), qkv),
                       empty(kOp, lse_sizes(a), ScalarType::Float, qkv)};
  launch.run<&launch_window_attention, &cpu::Kernels::window_attention>(
      WindowForwardParams{.problem = problem(launch, a),
                          .out = launch.out(std::get<0>(result)),
                          .lse = a.tokens() > kWindowBlock ? launch.out<float>(std::get<1>(result)) : nullptr});
  return result;
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

BackwardResult window_attention_backward(Tensor dout, Tensor qkv, std::optional<Tensor> relative_position_bias_table,
                                         std::optional<Tensor> logit_scale, std::optional<Tensor> qkv_bias, Tensor out,
                                         Tensor lse, std::vector<int64_t> window_size, std::vector<int64_t> shift_size,
                                         std::optional<double> scale, double mask_value) {
  constexpr const char* kOp = "window_attention_backward";
  Arguments a{qkv, relative_position_bias_table, logit_scale, qkv_bias, window_size, shift_size, scale, mask_value};
  check_arguments(kOp, a);
  for (const auto& [name, t] : {std::pair{"dout", dout}, std::pair{"out", out}}) {
    check(sizes_of(t) == out_sizes(a) && t.scalar_type() == qkv.scalar_type(), kOp, ": ", name,
          " must have the shape and dtype of the output for qkv, ", Got{qkv}, ", got ", Got{t});
    check_same_device(kOp, name, t, "qkv", qkv);
  }
  const Launch launch(kOp, qkv);
  if (const char* reason = no_kernel(launch, a, /*backward=*/true)) {
    return UseReference(reason);
  }
  check(sizes_of(lse) == lse_sizes(a) && lse.scalar_type() == ScalarType::Float, kOp,
        ": lse must be float32 as the forward returned it, got ", Got{lse});
  check_same_device(kOp, "lse", lse, "qkv", qkv);
  make_dense(launch, a);
  dout = as_kernels_read(launch, dout);
  if (!launch.on_cpu()) {  // CPU kernels do not read them
    out = dense(out);
    lse = dense(lse);
  }

  const auto like = [&](const std::optional<Tensor>& t) {
    return t ? empty(kOp, sizes_of(*t), t->scalar_type(), *t) : empty(kOp, {0}, qkv.scalar_type(), qkv);
  };
  BackwardResult result{like(a.qkv), like(a.table), like(a.logit_scale), like(a.qkv_bias)};
  WindowBackwardParams params{};
  params.problem = problem(launch, a);
  const WindowShares shares = launch.ask<&window_backward_shares>(params.problem);
  const bool whole = a.tokens() <= kWindowBlock;
  const auto workspace = [&](bool wanted, std::vector<int64_t> sizes) {
    return empty(kOp, wanted && !launch.on_cpu() ? sizes : std::vector<int64_t>{0}, ScalarType::Float, qkv);
  };
  const Tensor delta = workspace(!whole, {qkv.numel() / std::max<int64_t>(1, 3 * a.head_dim())});
  const Tensor table_sums = workspace(a.table.has_value(), {shares.table_shares, a.heads(), a.tokens(), a.tokens()});
  const Tensor scale_sums = workspace(a.logit_scale.has_value(), {shares.shares, a.heads()});
  const Tensor padding_sums = workspace(a.qkv_bias.has_value(), {shares.shares, 3, a.heads(), a.head_dim()});
  params.dout = launch.in(dout);
  params.out = launch.in(out);
  params.lse = launch.in<float>(lse);
  params.dqkv = launch.out(std::get<0>(result));
  params.dtable = launch.out(std::get<1>(result));
  params.dlogit_scale = launch.out(std::get<2>(result));
  params.dqkv_bias = launch.out(std::get<3>(result));
  params.delta = launch.out<float>(delta);
  params.table_sums = launch.out<float>(table_sums);
  params.scale_sums = launch.out<float>(scale_sums);
  params.padding_sums = launch.out<float>(padding_sums);
  params.shares = shares.shares;
  params.table_shares = shares.table_shares;
  launch.run<&launch_window_attention_backward, &cpu::Kernels::window_attention_backward>(params);
  return result;
}

}  // namespace

std::span<const Body> window_ops() {
  static constexpr Body kOps[] = {body<"window_attention", &window_attention>(),
                                  body<"window_attention_backward", &window_attention_backward>()};
  return kOps;
}

}  // namespace warpform
