// Bindings of the padding-free encoder's ops, but for attention: checks, allocation, launch.
#include "kernels/encoder/launch.h"

#include <torch/csrc/stable/ops.h>

#include "tensor.h"

#if defined(WARPFORM_WITH_CUDA) || defined(WARPFORM_SIMT)
namespace warpform {
namespace {

using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Plan packing_plan(Tensor mask, int64_t capacity) {
  constexpr const char* kOp = "packing_plan";
  check(mask.dim() == 2, kOp, ": mask must be of shape [batch, seqlen], got ", Got{mask});
  check(!is_float(mask.scalar_type()), kOp, ": mask must be bool or integer, got ", Got{mask});
  check(capacity >= 0, kOp, ": capacity must not be negative, got ", capacity);
  const int64_t batch = mask.size(0), seqlen = mask.size(1);
  check(batch * seqlen <= INT32_MAX && capacity <= INT32_MAX, kOp,
        ": mask and capacity must count at most 2^31 - 1 tokens, since cu_seqlens is int32; got ", Got{mask},
        " and capacity ", capacity);
  const int mask_bytes = static_cast<int>(mask.element_size());
  const Launch launch(kOp, mask);
  const char* reason = launch.unusable();
  if (reason == nullptr && (mask_bytes == 2 || (seqlen > 1 && mask.stride(1) != 1))) {
    reason = "the mask is int16 or its last dimension is not contiguous";
  }
  if (reason != nullptr) {
    return call_reference<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(kOp, reason, mask, capacity);
  }
  Plan plan{empty(kOp, {batch + 1}, ScalarType::Int, mask),     empty(kOp, {batch}, ScalarType::Int, mask),
            empty(kOp, {capacity}, ScalarType::Long, mask),     empty(kOp, {capacity}, ScalarType::Long, mask),
            empty(kOp, {batch, seqlen}, ScalarType::Int, mask), empty(kOp, {2}, ScalarType::Long, mask)};
  launch_packing_plan({.mask = launch.in(mask),
                       .mask_bytes = mask_bytes,
                       .mask_stride = mask.stride(0),
                       .batch = batch,
                       .seqlen = seqlen,
                       .capacity = capacity,
                       .cu_seqlens = launch.out<int32_t>(std::get<0>(plan)),
                       .lengths = launch.out<int32_t>(std::get<1>(plan)),
                       .indices = launch.out<int64_t>(std::get<2>(plan)),
                       .position_ids = launch.out<int64_t>(std::get<3>(plan)),
                       .ranks = launch.out<int32_t>(std::get<4>(plan)),
                       .summary = launch.out<int64_t>(std::get<5>(plan))},
                      launch.stream());
  return plan;
}

// pack and unpack are one gather: the rows of `x` (its first `in_dims` dimensions) are read where `index` says. x is
// contiguous: gradients often are not, and are copied before.
Tensor gather(const char* op, const Launch& launch, const Tensor& x, int in_dims, const Tensor& index) {
  std::vector<int64_t> sizes = sizes_of(index);
  int64_t in_rows = 1, row = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (i < in_dims) {
      in_rows *= x.size(i);
    } else {
      sizes.push_back(x.size(i));
      row *= x.size(i);
    }
  }
  Tensor out = empty(op, sizes, x.scalar_type(), x);
  const int64_t row_bytes = row * static_cast<int64_t>(x.element_size());
  launch_gather_rows({.in = launch.in(x),
                      .out = launch.out(out),
                      .index = launch.in(index),
                      .index_bytes = static_cast<int>(index.element_size()),
                      .in_rows = in_rows,
                      .out_rows = index.numel(),
                      .row_bytes = row_bytes,
                      .in_stride = row_bytes},
                     launch.stream());
  return out;
}

void check_packing(const char* op, const Tensor& x, const Tensor& indices, const Tensor& ranks) {
  check(indices.dim() == 1 && indices.scalar_type() == ScalarType::Long, op,
        ": indices must be int64 of shape [total], got ", Got{indices});
  check(ranks.dim() == 2 && ranks.scalar_type() == ScalarType::Int, op,
        ": ranks must be int32 of shape [batch, seqlen], got ", Got{ranks});
  check_same_device(op, "indices", indices, x);
  check_same_device(op, "ranks", ranks, x);
  check_contiguous(op, "indices", indices);
  check_contiguous(op, "ranks", ranks);
}

Tensor pack(Tensor x, Tensor indices, Tensor ranks) {
  constexpr const char* kOp = "pack";
  check_packing(kOp, x, indices, ranks);
  check(x.dim() >= 2 && x.size(0) == ranks.size(0) && x.size(1) == ranks.size(1), kOp, ": x must be of shape [",
        ranks.size(0), ", ", ranks.size(1), ", ...] as the mask was, got ", Got{x});
  const Launch launch(kOp, x);
  if (const char* reason = launch.unusable()) {
    return std::get<0>(call_reference<Tensor>(kOp, reason, x, indices, ranks));
  }
  return gather(kOp, launch, torch::stable::contiguous(x), 2, indices);
}

Tensor unpack(Tensor t, Tensor indices, Tensor ranks) {
  constexpr const char* kOp = "unpack";
  check_packing(kOp, t, indices, ranks);
  check(t.dim() >= 1 && t.size(0) == indices.size(0), kOp, ": t must be of shape [", indices.size(0),
        ", ...], the packed rows, got ", Got{t});
  const Launch launch(kOp, t);
  if (const char* reason = launch.unusable()) {
    return std::get<0>(call_reference<Tensor>(kOp, reason, t, indices, ranks));
  }
  return gather(kOp, launch, torch::stable::contiguous(t), 1, ranks);
}

// ---- add_bias_residual_layer_norm and bias_gelu ----

// The activations of an op: [..., cols], seen as [rows, cols].
struct Rows {
  int64_t rows;
  int64_t cols;
};

Rows rows_of(const char* op, const char* name, const Tensor& t) {
  check(t.dim() >= 1 && is_float(t.scalar_type()), op, ": ", name,
        " must be a floating-point tensor of shape [..., hidden], got ", Got{t});
  const int64_t cols = t.size(t.dim() - 1);
  return {cols == 0 ? 0 : t.numel() / cols, cols};
}

void check_like(const char* op, const char* name, const Tensor& t, const char* as_name, const Tensor& as) {
  check(t.scalar_type() == as.scalar_type() && sizes_of(t) == sizes_of(as), op, ": ", name, " must be ", Got{as},
        " as ", as_name, " is, got ", Got{t});
  check_same_device(op, name, t, as);
}

void check_parameter(const char* op, const char* name, const Tensor& t, int64_t cols, const Tensor& x) {
  const ScalarType dtype = t.scalar_type();
  check(t.dim() == 1 && t.size(0) == cols && (dtype == x.scalar_type() || dtype == ScalarType::Float), op, ": ", name,
        " must be ", x.scalar_type() == ScalarType::Float ? "" : dtype_name(x.scalar_type()),
        x.scalar_type() == ScalarType::Float ? "" : " or ", "float32 of shape [", cols, "], got ", Got{t});
  check_same_device(op, name, t, x);
}

void check_statistics(const char* op, const char* name, const Tensor& t, int64_t rows, const Tensor& x) {
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == rows, op, ": ", name, " must be ", dtype_name(dtype),
        " of shape [", rows, "], got ", Got{t});
  check_same_device(op, name, t, x);
}

// Of a dtype that has kernels.
DType element_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

// Rows lie end to end in the kernels. An input that does not is copied, gradients of slices above all.
std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(*t);
}

const void* in_or_null(const Launch& launch, const std::optional<Tensor>& t) { return t ? launch.in(*t) : nullptr; }

// Why no LayerNorm kernel takes x, or nothing.
std::string layer_norm_unsupported(const Launch& launch, const Tensor& x, int64_t cols) {
  if (const char* reason = launch.unusable()) return reason;
  if (x.scalar_type() == ScalarType::Double) return "float64";
  if (cols > kLayerNormMaxCols) {
    return "rows of " + std::to_string(cols) + " elements; the kernels take up to " + std::to_string(kLayerNormMaxCols);
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
  const Launch launch(kOp, x);
  if (const std::string reason = layer_norm_unsupported(launch, x, cols); !reason.empty()) {
    return call_reference<Tensor, Tensor, Tensor, Tensor>(kOp, reason, x, bias, residual, weight, ln_bias, eps,
                                                          return_sum);
  }
  x = torch::stable::contiguous(x);
  residual = contiguous(residual);
  bias = contiguous(bias);
  weight = torch::stable::contiguous(weight);
  ln_bias = torch::stable::contiguous(ln_bias);
  Tensor out = empty(kOp, sizes_of(x), x.scalar_type(), x);
  Tensor sum = empty(kOp, return_sum ? sizes_of(x) : std::vector<int64_t>{0}, x.scalar_type(), x);
  Tensor mean = empty(kOp, {rows}, ScalarType::Float, x);
  Tensor rstd = empty(kOp, {rows}, ScalarType::Float, x);
  launch_layer_norm({.x = launch.in(x),
                     .residual = in_or_null(launch, residual),
                     .bias = in_or_null(launch, bias),
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
  const Launch launch(kOp, sum);
  if (const std::string reason = layer_norm_unsupported(launch, sum, cols); !reason.empty()) {
    return call_reference<Tensor, Tensor, Tensor, Tensor>(kOp, reason, dout, dsum, sum, weight, mean, rstd);
  }
  dout = torch::stable::contiguous(dout);
  dsum = contiguous(dsum);
  sum = torch::stable::contiguous(sum);
  weight = torch::stable::contiguous(weight);
  mean = torch::stable::contiguous(mean);
  rstd = torch::stable::contiguous(rstd);
  Tensor dx = empty(kOp, sizes_of(sum), sum.scalar_type(), sum);
  Tensor dbias = empty(kOp, {cols}, weight.scalar_type(), sum);
  Tensor dweight = empty(kOp, {cols}, weight.scalar_type(), sum);
  Tensor dln_bias = empty(kOp, {cols}, weight.scalar_type(), sum);
  LayerNormBackwardParams params{.dout = launch.in(dout),
                                 .dsum = in_or_null(launch, dsum),
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

bool is_tanh(const char* op, const std::string& approximate) {
  check(approximate == "none" || approximate == "tanh", op, ": approximate must be \"none\" or \"tanh\", got \"",
        approximate, "\"");
  return approximate == "tanh";
}

// Why no GELU kernel takes x, or nothing.
std::string gelu_unsupported(const Launch& launch, const Tensor& x) {
  if (const char* reason = launch.unusable()) return reason;
  return x.scalar_type() == ScalarType::Double ? "float64" : "";
}

Tensor bias_gelu(Tensor x, std::optional<Tensor> bias, std::string approximate) {
  constexpr const char* kOp = "bias_gelu";
  const auto [rows, cols] = rows_of(kOp, "x", x);
  if (bias) check_parameter(kOp, "bias", *bias, cols, x);
  const bool tanh = is_tanh(kOp, approximate);
  const Launch launch(kOp, x);
  if (const std::string reason = gelu_unsupported(launch, x); !reason.empty()) {
    return std::get<0>(call_reference<Tensor>(kOp, reason, x, bias, approximate));
  }
  x = torch::stable::contiguous(x);
  bias = contiguous(bias);
  Tensor out = empty(kOp, sizes_of(x), x.scalar_type(), x);
  launch_bias_gelu({.x = launch.in(x),
                    .bias = in_or_null(launch, bias),
                    .out = launch.out(out),
                    .rows = rows,
                    .cols = cols,
                    .dtype = element_type(x),
                    .float_parameters = bias && bias->scalar_type() == ScalarType::Float,
                    .tanh = tanh},
                   launch.stream());
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor dout, Tensor x, std::optional<Tensor> bias,
                                              std::string approximate) {
  constexpr const char* kOp = "bias_gelu_backward";
  const auto [rows, cols] = rows_of(kOp, "x", x);
  check_like(kOp, "dout", dout, "x", x);
  if (bias) check_parameter(kOp, "bias", *bias, cols, x);
  const bool tanh = is_tanh(kOp, approximate);
  const Launch launch(kOp, x);
  if (const std::string reason = gelu_unsupported(launch, x); !reason.empty()) {
    return call_reference<Tensor, Tensor>(kOp, reason, dout, x, bias, approximate);
  }
  dout = torch::stable::contiguous(dout);
  x = torch::stable::contiguous(x);
  bias = contiguous(bias);
  Tensor dx = empty(kOp, sizes_of(x), x.scalar_type(), x);
  Tensor dbias = empty(kOp, {bias ? cols : 0}, bias ? bias->scalar_type() : x.scalar_type(), x);
  BiasGeluBackwardParams params{.dout = launch.in(dout),
                                .x = launch.in(x),
                                .bias = in_or_null(launch, bias),
                                .dx = launch.out(dx),
                                .dbias = launch.out(dbias),
                                .partials = nullptr,
                                .groups = 0,
                                .rows = rows,
                                .cols = cols,
                                .dtype = element_type(x),
                                .float_parameters = bias && bias->scalar_type() == ScalarType::Float,
                                .tanh = tanh};
  params.groups = bias_gelu_backward_groups(params);
  Tensor partials = empty(kOp, {params.groups, cols}, ScalarType::Float, x);
  params.partials = launch.out<float>(partials);
  launch_bias_gelu_backward(params, launch.stream());
  return {dx, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(WARPFORM_NAMESPACE, WARPFORM_DEVICE_KEY, m) {
  m.impl("packing_plan", TORCH_BOX(&packing_plan));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("add_bias_residual_layer_norm", TORCH_BOX(&add_bias_residual_layer_norm));
  m.impl("add_bias_residual_layer_norm_backward", TORCH_BOX(&add_bias_residual_layer_norm_backward));
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
}

}  // namespace warpform
#endif
