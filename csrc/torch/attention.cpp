// Bindings of the attention ops: checks, allocation, launch.
#include <cmath>
#include <optional>

#include "binding.h"
#include "heads.h"

namespace warpform {
namespace {

// The arguments that forward and backward share, in the schema's order.
struct Arguments {
  Tensor q, k, v, cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  std::optional<double> softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap;
  std::optional<Tensor> alibi_slopes;
  bool deterministic;

  // What kernels read as it lies.
  void make_contiguous() {
    cu_seqlens_q = contiguous(cu_seqlens_q);
    cu_seqlens_k = contiguous(cu_seqlens_k);
    alibi_slopes = contiguous(alibi_slopes);
  }
};

void check_arguments(const char* op, const Arguments& a) {
  for (const auto& [name, t] : {std::pair{"q", &a.q}, {"k", &a.k}, {"v", &a.v}}) check_heads(op, name, *t);
  check_floating(op, "q", a.q);
  const int64_t head_dim = a.q.size(2);
  check(head_dim > 0, op, ": head_dim must be at least 1, got q ", Got{a.q});
  check(same_sizes(a.v, a.k) && a.k.size(2) == head_dim, op, ": k and v must both be of shape [total_k, heads_k, ",
        head_dim, "], got k ", Got{a.k}, " and v ", Got{a.v});
  check(a.k.size(1) > 0 && a.q.size(1) % a.k.size(1) == 0, op, ": the ", a.q.size(1),
        " heads of q must be a multiple of the heads of k and v, got ", a.k.size(1));
  check_same_dtype(op, a.q, a.k, a.v);
  check_offsets(op, "cu_seqlens_q", a.cu_seqlens_q, a.q);
  check_offsets(op, "cu_seqlens_k", a.cu_seqlens_k, a.q);
  check(a.cu_seqlens_q.size(0) == a.cu_seqlens_k.size(0), op, ": cu_seqlens_k must be of shape ", Shape{a.cu_seqlens_q},
        " as cu_seqlens_q is, got ", Got{a.cu_seqlens_k});
  check_same_device(op, "k", a.k, "q", a.q);
  check_same_device(op, "v", a.v, "q", a.q);
  check_window(op, a.window_left, a.window_right);
  check_finite(op, "softmax_scale", a.softmax_scale.value_or(1));
  check_finite(op, "softcap", a.softcap);
  check(a.softcap >= 0, op, ": softcap must not be negative, got ", Number{a.softcap});
  if (a.alibi_slopes) {
    const Tensor& s = *a.alibi_slopes;
    const int64_t batch = a.cu_seqlens_q.size(0) - 1, heads = a.q.size(1);
    // Of float64 attention they may be float64.
    check_type(s.scalar_type() == ScalarType::Float ||
                   (s.scalar_type() == ScalarType::Double && a.q.scalar_type() == ScalarType::Double),
               op, ": alibi_slopes must be float32, got ", Got{s});
    check((s.dim() == 1 && s.size(0) == heads) || (s.dim() == 2 && s.size(0) == batch && s.size(1) == heads), op,
          ": alibi_slopes must be of shape [", heads, "] or [", batch, ", ", heads, "], got ", Got{s});
    check_same_device(op, "alibi_slopes", s, "q", a.q);
  }
  check(a.max_seqlen_q >= 0 && a.max_seqlen_k >= 0, op, ": max_seqlen_q and max_seqlen_k must not be negative, got ",
        a.max_seqlen_q, ", ", a.max_seqlen_k);
}

// dout or out: as q in everything but strides.
void check_like_q(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check(same_sizes(t, q) && t.scalar_type() == q.scalar_type(), op, ": ", name, " must have the shape and dtype of q, ",
        Got{q}, ", got ", Got{t});
  check_same_device(op, name, t, "q", q);
}

// Why no kernel serves the call, or null.
const char* no_kernel(const Launch& launch, const Arguments& a, bool backward) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  if (launch.on_cpu())
    return no_cpu_attention_kernel(a.q.scalar_type(), a.q.size(2), a.q.size(0), a.k.size(0), a.softmax_scale);
  if (const char* reason = no_attention_kernel(a.q, a.k, a.softmax_scale)) return reason;
  return launch.ask<&attention_unsupported>(static_cast<int>(std::min<int64_t>(a.q.size(2), INT32_MAX)), backward);
}

// What the kernels ask for on top.
void check_for_kernels(const char* op, const Launch& launch, const Arguments& a) {
  if (launch.on_cpu()) {
    check_offset_values(op, "cu_seqlens_q", a.cu_seqlens_q, a.q.size(0), "max_seqlen_q", a.max_seqlen_q);
    check_offset_values(op, "cu_seqlens_k", a.cu_seqlens_k, a.k.size(0), "max_seqlen_k", a.max_seqlen_k);
    return;
  }
  check_aligned(op, "q", a.q);
  check_aligned(op, "k", a.k);
  check_aligned(op, "v", a.v);
}

// A softcap that float32 holds with its inverse. No float32 score tells one beyond these bounds from the bound: below,
// every capped score counts as 0; above, none is capped.
double representable_softcap(double softcap) { return softcap > 0 ? std::clamp(softcap, 1e-30, 1e30) : 0; }

AttentionProblem problem(const Launch& launch, const Arguments& a) {
  const double softcap = representable_softcap(a.softcap);
  const auto head_dim = static_cast<int>(a.q.size(2));
  const auto bounded = [](int64_t x) { return static_cast<int>(std::min<int64_t>(x, kMaxTokens)); };
  const int64_t right = a.causal && a.window_right != 0 ? 0 : a.window_right;
  return {.q = view(launch, a.q),
          .k = view(launch, a.k),
          .v = view(launch, a.v),
          .cu_seqlens_q = launch.in<int32_t>(a.cu_seqlens_q),
          .cu_seqlens_k = launch.in<int32_t>(a.cu_seqlens_k),
          .batch = static_cast<int>(a.cu_seqlens_q.size(0) - 1),
          .total_q = static_cast<int>(a.q.size(0)),
          .total_k = static_cast<int>(a.k.size(0)),
          .max_seqlen_q = bounded(a.max_seqlen_q),
          .max_seqlen_k = bounded(a.max_seqlen_k),
          .heads_q = static_cast<int>(a.q.size(1)),
          .heads_kv = static_cast<int>(a.k.size(1)),
          .head_dim = head_dim,
          .dtype = element_type(a.q),
          .softmax_scale = static_cast<float>(a.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)))),
          .window_left = bounded(a.window_left),
          .window_right = bounded(right),
          .softcap = static_cast<float>(softcap),
          .softcap_exponent = softcap > 0 ? static_cast<float>(2.0 / std::log(2.0) / softcap) : 0.f,
          .alibi_slopes = a.alibi_slopes ? launch.in<float>(*a.alibi_slopes) : nullptr,
          .alibi_batch_stride = a.alibi_slopes && a.alibi_slopes->dim() == 2 ? static_cast<int>(a.q.size(1)) : 0};
}

using ForwardResult = std::tuple<Tensor, Tensor>;

ForwardResult varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                               int64_t max_seqlen_q, int64_t max_seqlen_k, std::optional<double> softmax_scale,
                               bool causal, int64_t window_left, int64_t window_right, double softcap,
                               std::optional<Tensor> alibi_slopes, bool deterministic) {
  constexpr const char* kOp = "varlen_attention";
  Arguments a(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left,
              window_right, softcap, alibi_slopes, deterministic);
  check_arguments(kOp, a);
  const Launch launch(kOp, q);
  if (const char* reason = no_kernel(launch, a, /*backward=*/false)) {
    return UseReference(reason);
  }
  a.make_contiguous();
  check_for_kernels(kOp, launch, a);
  ForwardResult result{empty(kOp, sizes_of(q), q.scalar_type(), q),
                       empty(kOp, {q.size(1), q.size(0)}, ScalarType::Float, q)};
  launch.run<&launch_varlen_attention, &cpu::Kernels::varlen_attention>(
      AttentionForwardParams{.problem = problem(launch, a),
                             .out = launch.out(std::get<0>(result)),
                             .lse = launch.out<float>(std::get<1>(result))});
  return result;
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;

BackwardResult varlen_attention_backward(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v,
                                         Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                         int64_t max_seqlen_q, int64_t max_seqlen_k,
                                         std::optional<double> softmax_scale, bool causal, int64_t window_left,
                                         int64_t window_right, double softcap, std::optional<Tensor> alibi_slopes,
                                         bool deterministic) {
  constexpr const char* kOp = "varlen_attention_backward";
  Arguments a(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left,
              window_right, softcap, alibi_slopes, deterministic);
  check_arguments(kOp, a);
  check_like_q(kOp, "dout", dout, q);
  check_like_q(kOp, "out", out, q);
  const Launch launch(kOp, q);
  if (const char* reason = no_kernel(launch, a, /*backward=*/true)) {
    return UseReference(reason);
  }
  const auto check_rows = [&](const char* name, const Tensor& t) {
    check(t.dim() == 2 && t.size(0) == q.size(1) && t.size(1) == q.size(0) && t.scalar_type() == ScalarType::Float, kOp,
          ": ", name, " must be float32 of shape [", q.size(1), ", ", q.size(0), "], got ", Got{t});
    check_same_device(kOp, name, t, "q", q);
  };
  check_rows("lse", lse);
  if (launch.on_cpu()) lse = contiguous(lse);
  check_contiguous(kOp, "lse", lse);
  if (dlse) {
    check_rows("dlse", *dlse);
    dlse = contiguous(*dlse);
  }
  a.make_contiguous();
  check_for_kernels(kOp, launch, a);
  dout = readable_rows(launch, dout);
  out = readable_rows(launch, out);
  BackwardResult result{empty(kOp, sizes_of(q), q.scalar_type(), q), empty(kOp, sizes_of(k), q.scalar_type(), q),
                        empty(kOp, sizes_of(v), q.scalar_type(), q)};
  const Tensor delta = empty(kOp, {launch.on_cpu() ? 0 : q.size(1), q.size(0)}, ScalarType::Float, q);
  const AttentionProblem shared = problem(launch, a);
  const DqMode mode = launch.ask<&attention_backward_dq_mode>(shared, deterministic);
  const Tensor accumulator = mode == DqMode::kAccumulate ? empty(kOp, sizes_of(q), ScalarType::Float, q)
                                                         : empty(kOp, {0}, ScalarType::Float, q);
  launch.run<&launch_varlen_attention_backward, &cpu::Kernels::varlen_attention_backward>(
      AttentionBackwardParams{.problem = shared,
                              .out = view(launch, out),
                              .dout = view(launch, dout),
                              .lse = launch.in<float>(lse),
                              .dlse = dlse ? launch.in<float>(*dlse) : nullptr,
                              .delta = launch.out<float>(delta),
                              .dq_accumulator = launch.out<float>(accumulator),
                              .dq = launch.out(std::get<0>(result)),
                              .dk = launch.out(std::get<1>(result)),
                              .dv = launch.out(std::get<2>(result)),
                              .dq_mode = mode});
  return result;
}

}  // namespace

std::span<const Body> attention_ops() {
  static constexpr Body kOps[] = {body<"varlen_attention", &varlen_attention>(),
                                  body<"varlen_attention_backward", &varlen_attention_backward>()};
  return kOps;
}

}  // namespace warpform
