// Shared by the bindings of attention ops: tensors of heads as the kernels take them, and the offsets of sequences.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/supported.h"
#include "kernels/attention/launch.h"
#include "launch.h"

namespace warpform {

inline void check_last_dimension(const char* op, const char* name, const Tensor& t) {
  check(last_dimension_is_contiguous(t), op, ": the last dimension of ", name, " must be contiguous, got stride ",
        t.stride(-1), "; call ", name, ".contiguous()");
}

// [total, heads, head_dim], the last dimension contiguous.
inline void check_heads(const char* op, const char* name, const Tensor& t, const char* rows = "total") {
  check(t.dim() == 3, op, ": ", name, " must be of shape [", rows, ", heads, head_dim], got ", Got{t});
  check_last_dimension(op, name, t);
}

inline void check_same_dtype(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_type(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op, ": k and v must be ",
             dtype_name(q.scalar_type()), " as q is, got ", dtype_name(k.scalar_type()), " and ",
             dtype_name(v.scalar_type()));
}

inline void check_offsets(const char* op, const char* name, const Tensor& cu_seqlens, const Tensor& q) {
  constexpr const char* kWanted = " must be int32 of shape [batch + 1], got ";
  check_type(cu_seqlens.scalar_type() == ScalarType::Int, op, ": ", name, kWanted, Got{cu_seqlens});
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, op, ": ", name, kWanted, Got{cu_seqlens});
  check_same_device(op, name, cu_seqlens, "q", q);
}

inline void check_window(const char* op, int64_t left, int64_t right) {
  check(left >= -1 && right >= -1, op, ": window_size must be at least -1, which is unbounded, got (", left, ", ",
        right, ")");
}

// Why none of the attention kernels serves tensors like these, or null.
inline const char* no_attention_kernel(ScalarType dtype, int64_t total_q, int64_t total_k, int64_t heads,
                                       std::optional<double> softmax_scale) {
  if (const char* reason = kHalfTypes.why_not(dtype_name(dtype))) return reason;
  const auto scale = static_cast<float>(softmax_scale.value_or(1));
  if (!(scale > 0) || !std::isnormal(scale) || scale > 1e30f) return "softmax_scale is not a positive float32";
  if (total_q > kMaxTokens || total_k > kMaxTokens) return "more than 2^30 tokens";
  if (heads > 65535) return "more than 65535 heads";
  return nullptr;
}
inline const char* no_attention_kernel(const Tensor& q, const Tensor& k, std::optional<double> softmax_scale) {
  return no_attention_kernel(q.scalar_type(), q.size(0), k.size(0), q.size(1), softmax_scale);
}

// The same for the CPU kernels: any scale by which a product of float32 keeps its digits, 0 too.
inline const char* no_cpu_attention_kernel(ScalarType dtype, int64_t head_dim, int64_t total_q, int64_t total_k,
                                           std::optional<double> softmax_scale) {
  if (const char* reason = cpu::kFloats.why_not(dtype_name(dtype))) return reason;
  const double scale = std::abs(softmax_scale.value_or(1));
  if (scale != 0 && (scale < 1e-30 || scale > 1e30)) return "softmax_scale is beyond 1e-30 to 1e30";
  if (head_dim > cpu::kAttentionHeadDim.max) return cpu::kAttentionHeadDim.otherwise;
  if (total_q > kMaxTokens || total_k > kMaxTokens) return "more than 2^30 tokens";
  return nullptr;
}

// What the reference says about cu_seqlens, which a CPU reads without waiting for anything.
inline void check_offset_values(const char* op, const char* name, const Tensor& cu_seqlens, int64_t rows,
                                const char* max_name, int64_t max_seqlen) {
  const auto* const offsets = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  int64_t longest = 0;
  check(offsets[0] == 0, op, ": ", name, " must begin with 0, got ", offsets[0]);
  const int64_t count = cu_seqlens.size(0);
  for (int64_t i = 1; i < count; ++i) {
    const int64_t length = static_cast<int64_t>(offsets[i]) - offsets[i - 1];
    check(length >= 0, op, ": ", name, " must not decrease, got ", offsets[i - 1], " then ", offsets[i], " at [", i,
          "]");
    longest = std::max(longest, length);
  }
  check(offsets[count - 1] <= rows, op, ": ", name, " must not pass the end of its tensor of ", rows, " rows, got ",
        offsets[count - 1], " last");
  check(longest <= max_seqlen, op, ": ", max_name, " must be at least the longest sequence of ", name, ", ", longest,
        ", got ", max_seqlen);
}

// The kernels copy 16 bytes at a time. A copy of q, k or v would cost as much as some calls do, so it is left to the
// caller.
inline void check_aligned(const char* op, const char* name, const Tensor& t) {
  check(last_dimension_is_contiguous(t), op, ": ", name,
        " must be contiguous in its last dimension; call .contiguous()");
  check(has_aligned_rows(t), op, ": ", name,
        " must be 16-byte aligned, its rows and heads too, got a slice that is not; call .clone()");
}

// A gradient or a result as the kernels read it: 16 bytes at a time on a GPU, rows of elements on a CPU.
inline Tensor readable_rows(const Launch& launch, const Tensor& t) {
  return with_aligned_rows(t, launch.on_cpu() ? static_cast<int64_t>(t.element_size()) : 16);
}

inline HeadsView view(const Launch& launch, const Tensor& t) {
  return {launch.in(t), stride_of(t, t.dim() - 3), stride_of(t, t.dim() - 2)};
}

}  // namespace warpform
