// Bindings of a step of attention: checks, allocation, launch.
#include <algorithm>
#include <cmath>
#include <optional>

#include "binding.h"
#include "heads.h"

namespace warpform {
namespace {

// The arguments that forward and backward share, in the schema's order.
struct Arguments {
  Tensor q, k, v;
  std::optional<double> softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  int64_t q_offset, k_offset, q_stride, k_stride;
  std::optional<Tensor> cu_seqlens_q, cu_seqlens_k;

  // What kernels read as it lies.
  void make_contiguous() {
    cu_seqlens_q = contiguous(cu_seqlens_q);
    cu_seqlens_k = contiguous(cu_seqlens_k);
  }

  bool varlen() const { return cu_seqlens_q.has_value(); }
  int64_t batch() const { return varlen() ? cu_seqlens_q->size(0) - 1 : q.size(0); }
  // Rows that one sequence may have.
  int64_t rows(const Tensor& t) const { return t.size(varlen() ? 0 : 1); }
  int64_t tokens(const Tensor& t) const { return varlen() ? t.size(0) : t.size(0) * t.size(1); }
  int64_t heads(const Tensor& t) const { return t.size(t.dim() - 2); }
  int64_t head_dim() const { return q.size(q.dim() - 1); }
  // The shape of lse and delta: [heads, total], or [batch, heads, length] without cu_seqlens.
  std::vector<int64_t> row_sizes() const {
    if (varlen()) return {q.size(1), q.size(0)};
    return {q.size(0), q.size(2), q.size(1)};
  }
};

void check_arguments(const char* op, const Arguments& a) {
  check(a.cu_seqlens_q.has_value() == a.cu_seqlens_k.has_value(), op,
        ": cu_seqlens_q and cu_seqlens_k must both be given, or neither");
  const char* shape = a.varlen() ? "[total, heads, head_dim]" : "[batch, length, heads, head_dim]";
  for (const auto& [name, t] : {std::pair{"q", &a.q}, {"k", &a.k}, {"v", &a.v}}) {
    check(t->dim() == (a.varlen() ? 3 : 4), op, ": ", name, " must be of shape ", shape,
          a.varlen() ? " with" : " without", " cu_seqlens, got ", Got{*t});
    check_last_dimension(op, name, *t);
  }
  check_floating(op, "q", a.q);
  check(a.head_dim() > 0, op, ": head_dim must be at least 1, got q ", Got{a.q});
  check(same_sizes(a.v, a.k) && a.k.size(-1) == a.head_dim() && (a.varlen() || a.k.size(0) == a.q.size(0)), op,
        ": k and v must be of one shape ", shape, ", batch and head_dim as q's, got q ", Got{a.q}, ", k ", Got{a.k},
        " and v ", Got{a.v});
  check(a.heads(a.k) > 0 && a.heads(a.q) % a.heads(a.k) == 0, op, ": the ", a.heads(a.q),
        " heads of q must be a multiple of the heads of k and v, got ", a.heads(a.k));
  for (const auto& [name, t] : {std::pair{"k", &a.k}, {"v", &a.v}}) {
    check_type(t->scalar_type() == a.q.scalar_type(), op, ": ", name, " must be ", dtype_name(a.q.scalar_type()),
               " as q is, got ", Got{*t});
    check_same_device(op, name, *t, "q", a.q);
  }
  check_window(op, a.window_left, a.window_right);
  check(a.q_stride >= 1 && a.k_stride >= 1, op, ": q_stride and k_stride must be at least 1, got ", a.q_stride, " and ",
        a.k_stride);
  if (a.varlen()) {
    check_offsets(op, "cu_seqlens_q", *a.cu_seqlens_q, a.q);
    check_offsets(op, "cu_seqlens_k", *a.cu_seqlens_k, a.q);
    check(a.cu_seqlens_q->size(0) == a.cu_seqlens_k->size(0), op, ": cu_seqlens_k must be of shape ",
          Shape{*a.cu_seqlens_q}, " as cu_seqlens_q is, got ", Got{*a.cu_seqlens_k});
  }
  check_finite(op, "softmax_scale", a.softmax_scale.value_or(1));
}

// A tensor of the carried state, with any strides, in the dtype that sums have.
void check_state(const char* op, const char* name, const Tensor& t, std::span<const int64_t> sizes, const Tensor& q) {
  const ScalarType dtype = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_type(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), " for q in ",
             dtype_name(q.scalar_type()), ", got ", Got{t});
  check(std::ranges::equal(t.sizes(), sizes), op, ": ", name, " must be of shape ", Numbers{sizes}, ", got ", Got{t});
  check_same_device(op, name, t, "q", q);
}

bool offset_too_far(int64_t offset) {
  constexpr int64_t kFarthest = int64_t{1} << 62;
  return offset <= -kFarthest || offset >= kFarthest;
}

// What the kernels ask for on top.
void check_for_kernels(const char* op, const Launch& launch, const Arguments& a) {
  if (launch.on_cpu()) {
    if (!a.varlen()) return;
    check_offset_values(op, "cu_seqlens_q", *a.cu_seqlens_q, a.q.size(0), "max_seqlen_q", a.q.size(0));
    check_offset_values(op, "cu_seqlens_k", *a.cu_seqlens_k, a.k.size(0), "max_seqlen_k", a.k.size(0));
    return;
  }
  check_aligned(op, "q", a.q);
  check_aligned(op, "k", a.k);
  check_aligned(op, "v", a.v);
  for (const int64_t offset : {a.q_offset, a.k_offset}) {
    check(!offset_too_far(offset), op, ": offsets must be within 2^62, got ", offset);
  }
}

bool steps_too_far(int64_t rows, int64_t stride) { return rows > 1 && stride > kMaxStepSpan / (rows - 1); }

// Why no kernel serves the call, or null.
const char* no_kernel(const Launch& launch, const Arguments& a, bool backward) {
  const char* reason = launch.unusable_anywhere();
  if (reason == nullptr && launch.on_cpu()) {
    reason = no_cpu_attention_kernel(a.q.scalar_type(), a.head_dim(), a.tokens(a.q), a.tokens(a.k), a.softmax_scale);
    if (offset_too_far(a.q_offset) || offset_too_far(a.k_offset)) reason = "offsets beyond 2^62";
  } else if (reason == nullptr) {
    reason = no_attention_kernel(a.q.scalar_type(), a.tokens(a.q), a.tokens(a.k), a.heads(a.q), a.softmax_scale);
  }
  if (reason != nullptr) return reason;
  if (a.batch() > kMaxTokens) return "more than 2^30 sequences";
  if (steps_too_far(a.rows(a.q), a.q_stride) || steps_too_far(a.rows(a.k), a.k_stride)) {
    return "positions of one block more than 2^29 apart";
  }
  return launch.ask<&attention_step_unsupported>(static_cast<int>(std::min<int64_t>(a.head_dim(), INT32_MAX)),
                                                 backward);
}

// ---- tensors as the kernels take them ----

int64_t row_stride(const Tensor& t) { return stride_of(t, t.dim() - 3); }
int64_t head_stride(const Tensor& t) { return stride_of(t, t.dim() - 2); }
int64_t batch_offset(const Tensor& t) { return t.dim() == 4 ? stride_of(t, 0) - t.size(1) * row_stride(t) : 0; }

std::optional<Tensor> readable_state(const Launch& launch, const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(with_aligned_rows(*t, launch.on_cpu() ? 4 : 8)) : std::nullopt;
}

StateView state_view(const Launch& launch, const std::optional<Tensor>& t) {
  if (!t) return {nullptr, 0, 0, 0};
  return {launch.in<float>(*t), row_stride(*t), head_stride(*t), batch_offset(*t)};
}

AttentionProblem problem(const Launch& launch, const Arguments& a) {
  const auto head_dim = static_cast<int>(a.head_dim());
  return {.q = view(launch, a.q),
          .k = view(launch, a.k),
          .v = view(launch, a.v),
          .cu_seqlens_q = a.varlen() ? launch.in<int32_t>(*a.cu_seqlens_q) : nullptr,
          .cu_seqlens_k = a.varlen() ? launch.in<int32_t>(*a.cu_seqlens_k) : nullptr,
          .batch = static_cast<int>(a.batch()),
          .total_q = static_cast<int>(a.tokens(a.q)),
          .total_k = static_cast<int>(a.tokens(a.k)),
          .max_seqlen_q = static_cast<int>(a.rows(a.q)),
          .max_seqlen_k = static_cast<int>(a.rows(a.k)),
          .heads_q = static_cast<int>(a.heads(a.q)),
          .heads_kv = static_cast<int>(a.heads(a.k)),
          .head_dim = head_dim,
          .dtype = element_type(a.q),
          .softmax_scale =
              a.softmax_scale ? static_cast<float>(*a.softmax_scale) : 1.f / std::sqrt(static_cast<float>(head_dim)),
          .window_left = -1,
          .window_right = a.causal || a.window_right >= 0 ? 0 : -1,
          .softcap = 0.f,
          .softcap_exponent = 0.f,
          .alibi_slopes = nullptr,
          .alibi_batch_stride = 0};
}

// Row i of `q_rows` queries is at position q_offset + i * q_stride, keys alike, and sees keys from `left` before to
// `right` after its position; negative: all. Strides positive, offsets within 2^62, (rows - 1) * stride <=
// kMaxStepSpan.
StepPositions step_positions(int64_t q_offset, int64_t k_offset, int64_t q_stride, int64_t k_stride, int64_t left,
                             int64_t right, int64_t q_rows, int64_t k_rows) {
  // Twice the longest span: added to a position of one side, it exceeds all positions of the other, and it stays within
  // 32 bits.
  constexpr int64_t kFar = 2 * (kMaxStepSpan + 1);
  const auto bounded = [=](int64_t x) { return static_cast<int>(std::clamp(x, -kFar, kFar)); };
  // A side of one row may have any stride: no position depends on it.
  if (q_rows <= 1) q_stride = 1;
  if (k_rows <= 1) k_stride = 1;
  const int64_t distance = std::clamp(q_offset - k_offset, -4 * kFar, 4 * kFar);
  left = std::min(left, 8 * kFar);
  right = std::min(right, 8 * kFar);
  return {.q_stride = static_cast<int>(q_stride),
          .k_stride = static_cast<int>(k_stride),
          .first_key = left < 0 ? bounded(-kFar) : bounded(distance - left + k_stride - 1),
          .last_key = right < 0 ? bounded(kFar) : bounded(distance + right + k_stride),
          .first_query = right < 0 ? bounded(-kFar) : bounded(-distance - right + q_stride - 1),
          .last_query = left < 0 ? bounded(kFar) : bounded(-distance + left + q_stride),
          .by_q_stride = divisor_of(static_cast<int>(q_stride)),
          .by_k_stride = divisor_of(static_cast<int>(k_stride))};
}

StepLayout layout(const Arguments& a, const Tensor* dout) {
  const auto by_length = [&](const Tensor& t) { return divisor_of(a.varlen() ? 0 : static_cast<int>(a.rows(t))); };
  return {.positions = step_positions(a.q_offset, a.k_offset, a.q_stride, a.k_stride, a.window_left,
                                      a.causal ? 0 : a.window_right, a.rows(a.q), a.rows(a.k)),
          .by_q_length = by_length(a.q),
          .by_k_length = by_length(a.k),
          .q_batch_offset = batch_offset(a.q),
          .k_batch_offset = batch_offset(a.k),
          .v_batch_offset = batch_offset(a.v),
          .dout_batch_offset = dout != nullptr ? batch_offset(*dout) : 0,
          .head_rows = a.rows(a.q),
          .sequence_rows = a.varlen() ? 0 : (a.heads(a.q) - 1) * a.rows(a.q)};
}

// ---- ops ----

using ForwardResult = std::tuple<Tensor, Tensor>;

ForwardResult attention_step(Tensor q, Tensor k, Tensor v, std::optional<Tensor> out, std::optional<Tensor> lse,
                             std::optional<double> softmax_scale, bool causal, int64_t window_left,
                             int64_t window_right, int64_t q_offset, int64_t k_offset, int64_t q_stride,
                             int64_t k_stride, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k) {
  constexpr const char* kOp = "attention_step";
  Arguments a(q, k, v, softmax_scale, causal, window_left, window_right, q_offset, k_offset, q_stride, k_stride,
              cu_seqlens_q, cu_seqlens_k);
  check_arguments(kOp, a);
  check(out.has_value() == lse.has_value(), kOp, ": out and lse must both be given, or neither");
  if (out) {
    check_state(kOp, "out", *out, q.sizes(), q);
    check_state(kOp, "lse", *lse, a.row_sizes(), q);
  }
  const Launch launch(kOp, q);
  if (const char* reason = no_kernel(launch, a, /*backward=*/false)) {
    return UseReference(reason);
  }
  a.make_contiguous();
  check_for_kernels(kOp, launch, a);
  out = readable_state(launch, out);
  lse = contiguous(lse);
  ForwardResult result{empty(kOp, sizes_of(q), ScalarType::Float, q), empty(kOp, a.row_sizes(), ScalarType::Float, q)};
  launch.run<&launch_attention_step, &cpu::Kernels::attention_step>(
      AttentionStepParams{.problem = problem(launch, a),
                          .step = layout(a, nullptr),
                          .out_before = state_view(launch, out),
                          .lse_before = lse ? launch.in<float>(*lse) : nullptr,
                          .out = launch.out<float>(std::get<0>(result)),
                          .lse = launch.out<float>(std::get<1>(result))});
  return result;
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;

BackwardResult attention_step_backward(Tensor dout, Tensor delta, Tensor q, Tensor k, Tensor v, Tensor lse,
                                       std::optional<Tensor> dq, std::optional<Tensor> dk, std::optional<Tensor> dv,
                                       std::optional<double> softmax_scale, bool causal, int64_t window_left,
                                       int64_t window_right, int64_t q_offset, int64_t k_offset, int64_t q_stride,
                                       int64_t k_stride, std::optional<Tensor> cu_seqlens_q,
                                       std::optional<Tensor> cu_seqlens_k, bool deterministic) {
  constexpr const char* kOp = "attention_step_backward";
  Arguments a(q, k, v, softmax_scale, causal, window_left, window_right, q_offset, k_offset, q_stride, k_stride,
              cu_seqlens_q, cu_seqlens_k);
  check_arguments(kOp, a);
  check_floating(kOp, "dout", dout);
  check(same_sizes(dout, q), kOp, ": dout must be of shape ", Shape{q}, " as q is, got ", Got{dout});
  check_same_device(kOp, "dout", dout, "q", q);
  check_state(kOp, "delta", delta, a.row_sizes(), q);
  check_state(kOp, "lse", lse, a.row_sizes(), q);
  if (dq) check_state(kOp, "dq", *dq, q.sizes(), q);
  if (dk) check_state(kOp, "dk", *dk, k.sizes(), q);
  if (dv) check_state(kOp, "dv", *dv, v.sizes(), q);
  check_type(dout.scalar_type() == q.scalar_type(), kOp, ": dout must be ", dtype_name(q.scalar_type()),
             " as q is, got ", Got{dout});
  const Launch launch(kOp, q);
  if (const char* reason = no_kernel(launch, a, /*backward=*/true)) {
    return UseReference(reason);
  }
  a.make_contiguous();
  check_for_kernels(kOp, launch, a);
  dout = readable_rows(launch, dout);
  delta = contiguous(delta);
  lse = contiguous(lse);
  dk = readable_state(launch, dk);
  dv = readable_state(launch, dv);
  BackwardResult result{empty(kOp, sizes_of(q), ScalarType::Float, q), empty(kOp, sizes_of(k), ScalarType::Float, q),
                        empty(kOp, sizes_of(v), ScalarType::Float, q)};
  if (deterministic || launch.on_cpu()) {
    dq = readable_state(launch, dq);
  } else {
    // The atomics add to what is there.
    if (dq) {
      copy_(std::get<0>(result), *dq);
    } else {
      zero_(std::get<0>(result));
    }
    dq = std::nullopt;
  }
  launch.run<&launch_attention_step_backward, &cpu::Kernels::attention_step_backward>(
      AttentionStepBackwardParams{.problem = problem(launch, a),
                                  .step = layout(a, &dout),
                                  .dout = view(launch, dout),
                                  .lse = launch.in<float>(lse),
                                  .delta = launch.in<float>(delta),
                                  .dq_before = state_view(launch, dq),
                                  .dk_before = state_view(launch, dk),
                                  .dv_before = state_view(launch, dv),
                                  .dq_accumulator = launch.out<float>(std::get<0>(result)),
                                  .dk = launch.out<float>(std::get<1>(result)),
                                  .dv = launch.out<float>(std::get<2>(result)),
                                  .dq_mode = deterministic ? DqMode::kSeparate : DqMode::kAccumulate});
  return result;
}

}  // namespace

std::span<const Body> attention_step_ops() {
  static constexpr Body kOps[] = {body<"attention_step", &attention_step>(),
                                  body<"attention_step_backward", &attention_step_backward>()};
  return kOps;
}

}  // namespace warpform
