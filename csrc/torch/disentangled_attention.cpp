// Binding of disentangled attention: checks, the products that are dense and so the library's, launch.
#include <cmath>
#include <optional>
#include <vector>

#include "binding.h"
#include "heads.h"

namespace warpform {
namespace {

// The arguments that forward and backward share, in the schema's order.
struct Arguments {
  Tensor q, k, v;
  std::optional<Tensor> pos_key, pos_query;
  Tensor cu_seqlens;
  int64_t max_seqlen;
  std::optional<Tensor> positions;
  std::optional<double> softmax_scale;
  int64_t position_buckets, max_relative_positions;

  // What kernels read as it lies.
  void make_contiguous() {
    cu_seqlens = contiguous(cu_seqlens);
    positions = contiguous(positions);
  }

  bool has_terms() const { return pos_key || pos_query; }
  int64_t span() const { return has_terms() ? (pos_key ? *pos_key : *pos_query).size(0) / 2 : 0; }
};

void check_arguments(const char* op, const Arguments& a) {
  for (const auto& [name, t] : {std::pair{"q", &a.q}, {"k", &a.k}, {"v", &a.v}}) check_heads(op, name, *t);
  if (a.pos_key) check_heads(op, "pos_key", *a.pos_key, "2 * span");
  if (a.pos_query) check_heads(op, "pos_query", *a.pos_query, "2 * span");
  check_floating(op, "q", a.q);
  const int64_t heads = a.q.size(1), head_dim = a.q.size(2);
  check(head_dim > 0, op, ": head_dim must be at least 1, got q ", Got{a.q});
  for (const auto& [name, t] : {std::pair{"k", &a.k}, {"v", &a.v}}) {
    check(same_sizes(*t, a.q), op, ": ", name, " must be of shape ", Shape{a.q}, " as q is, got ", Got{*t});
  }
  const auto check_table = [&](const char* name, const std::optional<Tensor>& t) {
    check(!t || (t->size(0) >= 2 && t->size(0) % 2 == 0 && t->size(1) == heads && t->size(2) == head_dim), op, ": ",
          name, " must be of shape [2 * span, ", heads, ", ", head_dim, "] with span at least 1, got ",
          Got{t ? *t : a.q});
  };
  check_table("pos_key", a.pos_key);
  check_table("pos_query", a.pos_query);
  if (a.pos_key && a.pos_query) {
    check(same_sizes(*a.pos_key, *a.pos_query), op, ": pos_query must be of shape ", Shape{*a.pos_key},
          " as pos_key is, got ", Got{*a.pos_query});
  }
  const auto check_as_q = [&](const char* name, const Tensor& t) {
    check_type(t.scalar_type() == a.q.scalar_type(), op, ": ", name, " must be ", dtype_name(a.q.scalar_type()),
               " as q is, got ", Got{t});
    check_same_device(op, name, t, "q", a.q);
  };
  check_as_q("k", a.k);
  check_as_q("v", a.v);
  if (a.pos_key) check_as_q("pos_key", *a.pos_key);
  if (a.pos_query) check_as_q("pos_query", *a.pos_query);
  check_offsets(op, "cu_seqlens", a.cu_seqlens, a.q);
  if (a.positions) {
    const Tensor& p = *a.positions;
    check_type(p.scalar_type() == ScalarType::Long, op, ": positions must be int64, got ", Got{p});
    check(p.dim() == 1 && p.size(0) == a.q.size(0), op, ": positions must be of shape [", a.q.size(0),
          "], the rows of q, got ", Got{p});
    check_same_device(op, "positions", p, "q", a.q);
  }
  const int64_t buckets = a.position_buckets;
  check(buckets == 0 || buckets >= 2, op, ": position_buckets must be 0 or at least 2, got ", buckets);
  check(buckets == 0 || a.max_relative_positions - 1 > buckets / 2, op, ": max_relative_positions must be at least ",
        buckets / 2 + 2, " with ", buckets, " position_buckets, got ", a.max_relative_positions);
  check_finite(op, "softmax_scale", a.softmax_scale.value_or(1));
  check(a.max_seqlen >= 0, op, ": max_seqlen must not be negative, got ", a.max_seqlen);
}

// From this distance on the table's row stays the same, both ways, at most 2^40.
int64_t saturated_distance(const Arguments& a) {
  const int64_t span = a.span(), mid = a.position_buckets / 2;
  double saturated = span;
  if (mid == 1) {
    saturated = 1;  // two buckets: all that is past 1 is as 1
  } else if (mid > 0 && span > mid) {
    const double octaves = std::log2(static_cast<double>(a.max_relative_positions - 1) / mid);
    saturated = mid * std::exp2(octaves * (span - mid - 1) / (mid - 1)) + 2;
  }
  return static_cast<int64_t>(std::min(saturated, 0x1p40));
}

// The relative positions that some pair of tokens can have, as columns of the tables: embeddings [first, first +
// width).
struct Columns {
  int64_t first, width, centre, reach, mid;
  float buckets_per_octave;
};

Columns columns_of(const Arguments& a) {
  const int64_t span = a.span(), mid = a.position_buckets / 2;
  // If the logarithm is a whole number, floating point may give a little more, and must not give the next bucket.
  constexpr double kBelow = 1 - 0x1p-21;
  const double octaves = mid > 0 ? std::log2(static_cast<double>(a.max_relative_positions - 1) / mid) : 1;
  const auto buckets_per_octave = static_cast<float>(kBelow * (mid - 1) / octaves);
  const int64_t farthest = a.positions ? INT64_MAX : std::max<int64_t>(std::min(a.max_seqlen, a.q.size(0)) - 1, 0);
  const int64_t reach = std::min(saturated_distance(a), farthest);
  int64_t bucket = reach;
  if (mid > 0 && reach > mid) {
    const float logarithm = std::log2(static_cast<float>(reach) / static_cast<float>(mid));
    bucket = mid + static_cast<int64_t>(std::ceil(logarithm * buckets_per_octave));
  }
  // Whole groups of eight, so that rows of the products are aligned wherever all of them are.
  const int64_t first = std::max<int64_t>(span - bucket, 0) / 8 * 8;
  const int64_t last = std::min((std::min(span + bucket, 2 * span - 1) / 8 + 1) * 8, 2 * span);
  return {first, last - first, span - first, reach, mid, buckets_per_octave};
}

// Why no kernel serves the call, or null.
const char* no_kernel(const Launch& launch, const Arguments& a, const Columns& columns, bool backward) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  if (launch.on_cpu()) {
    return no_cpu_attention_kernel(a.q.scalar_type(), a.q.size(2), a.q.size(0), a.q.size(0), a.softmax_scale);
  }
  const auto head_dim = static_cast<int>(std::min<int64_t>(a.q.size(2), INT32_MAX));
  if (const char* reason = no_attention_kernel(a.q, a.q, a.softmax_scale)) return reason;
  if (!a.has_terms()) return launch.ask<&attention_unsupported>(head_dim, backward);
  if (columns.width > INT16_MAX) return "more than 32767 relative positions";
  return launch.ask<&disentangled_attention_unsupported>(head_dim, columns.reach, backward);
}

// What the kernels ask for on top.
void check_for_kernels(const char* op, const Launch& launch, const Arguments& a) {
  if (launch.on_cpu()) {
    check_offset_values(op, "cu_seqlens", a.cu_seqlens, a.q.size(0), "max_seqlen", a.max_seqlen);
    return;
  }
  check_aligned(op, "q", a.q);
  check_aligned(op, "k", a.k);
  check_aligned(op, "v", a.v);
}

// [rows, heads, x] as a batch over heads, [heads, rows, x]; no copy.
Tensor by_head(const Tensor& t) { return transpose(t, 0, 1); }

// The embeddings of the columns, [heads, width, head_dim].
Tensor embeddings(const Tensor& table, const Columns& columns) {
  return by_head(narrow(table, 0, columns.first, columns.width));
}

// A function of torch's of two tensors.
Tensor call(const char* op, const char* name, const char* overload, const Tensor& a, const Tensor& b) {
  StableIValue stack[2] = {detail::box(a.as_torch()), detail::box(b.as_torch())};
  torch_check(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION), op);
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

Tensor product(const char* op, const Tensor& a, const Tensor& b) { return call(op, "aten::bmm", "", a, b); }

float softmax_scale(const Arguments& a) {
  const int terms = 1 + (a.pos_key ? 1 : 0) + (a.pos_query ? 1 : 0);
  return static_cast<float>(a.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(a.q.size(2) * terms))));
}

// The exponent e of the power of two that products with the tables are stored over. A float16 product overflows past
// 65504 where its score, softmax_scale times as large, is an ordinary number: with 2^e = 2^8 / softmax_scale (or the
// power of two below) scores of 2^23 still fit, and what a score loses where the stored number is subnormal is at most
// 2^-25 * 2^8. More than 12 bits are not taken, as half of them are taken off each factor.
int product_exponent(const Arguments& a) {
  if (a.q.scalar_type() != ScalarType::Half) return 0;
  return std::clamp(8 - static_cast<int>(std::ceil(std::log2(softmax_scale(a)))), 0, 12);
}

// t / 2^exponent, which rounds nothing but to a subnormal. The stable ABI passes no number to a product, so the factor
// is a tensor of one element.
Tensor over_power_of_two(const char* op, const Tensor& t, int exponent) {
  if (exponent == 0) return t;
  torch::stable::Tensor factor = empty(op, {1}, t.scalar_type(), t).as_torch();
  torch::stable::fill_(factor, std::ldexp(1.0, -exponent));
  return call(op, "aten::mul", "Tensor", t, Tensor(factor));
}

// c2p of q and pos_key or p2c of k and pos_query over 2^product_exponent, [heads, total, width].
std::optional<Tensor> relative_scores(const char* op, const Arguments& a, const Tensor& x,
                                      const std::optional<Tensor>& table, const Columns& columns) {
  if (!table) return std::nullopt;
  const int exponent = product_exponent(a);
  const Tensor left = over_power_of_two(op, x, exponent / 2);
  const Tensor right = over_power_of_two(op, embeddings(*table, columns), exponent - exponent / 2);
  return product(op, by_head(left), transpose(right, 1, 2));
}

AttentionProblem problem(const Launch& launch, const Arguments& a, const Columns& columns,
                         const std::optional<Tensor>& c2p, const std::optional<Tensor>& p2c) {
  const auto total = static_cast<int>(a.q.size(0)), heads = static_cast<int>(a.q.size(1));
  const auto head_dim = static_cast<int>(a.q.size(2));
  const auto max_seqlen = static_cast<int>(std::min<int64_t>(a.max_seqlen, kMaxTokens));
  const auto* cu_seqlens = launch.in<int32_t>(a.cu_seqlens);
  return {.q = view(launch, a.q),
          .k = view(launch, a.k),
          .v = view(launch, a.v),
          .cu_seqlens_q = cu_seqlens,
          .cu_seqlens_k = cu_seqlens,
          .batch = static_cast<int>(a.cu_seqlens.size(0) - 1),
          .total_q = total,
          .total_k = total,
          .max_seqlen_q = max_seqlen,
          .max_seqlen_k = max_seqlen,
          .heads_q = heads,
          .heads_kv = heads,
          .head_dim = head_dim,
          .dtype = element_type(a.q),
          .softmax_scale = softmax_scale(a),
          .window_left = -1,
          .window_right = -1,
          .softcap = 0.f,
          .softcap_exponent = 0.f,
          .alibi_slopes = nullptr,
          .alibi_batch_stride = 0,
          .relative = {.c2p = c2p ? launch.in(*c2p) : nullptr,
                       .p2c = p2c ? launch.in(*p2c) : nullptr,
                       .positions = a.positions ? launch.in<int64_t>(*a.positions) : nullptr,
                       .width = static_cast<int>(columns.width),
                       .centre = static_cast<int>(columns.centre),
                       .reach = static_cast<int>(columns.reach),
                       .mid = static_cast<int>(columns.mid),
                       .buckets_per_octave = columns.buckets_per_octave,
                       .unit = std::ldexp(1.f, product_exponent(a))}};
}

// ---- on a CPU ----

// The rows of the tables by distance, for the CPU kernels; the same as relative_index of the reference.
struct Distances {
  int64_t reach = 0;
  std::vector<int32_t> rows;  // of the distances from -reach to reach
};

// Distances that have rows of their own, at most. A list of them is made in every call.
constexpr int64_t kMostDistances = 1 << 20;
constexpr const char* kTooManyDistances = "more than 2^20 relative positions";

// The farthest distance of two tokens of a sequence, at least; at most `most`.
int64_t farthest_distance(const Arguments& a, int64_t most) {
  const auto* const offsets = static_cast<const int32_t*>(a.cu_seqlens.const_data_ptr());
  const auto* const positions = a.positions ? static_cast<const int64_t*>(a.positions->const_data_ptr()) : nullptr;
  int64_t farthest = 0;
  for (int64_t b = 0; b + 1 < a.cu_seqlens.size(0) && farthest < most; ++b) {
    const int64_t begin = offsets[b], end = offsets[b + 1];
    if (positions == nullptr) {
      farthest = std::max(farthest, end - begin - 1);
      continue;
    }
    if (begin == end) continue;
    const auto [least, largest] = std::minmax_element(positions + begin, positions + end);
    const uint64_t between = static_cast<uint64_t>(*largest) - static_cast<uint64_t>(*least);
    farthest = static_cast<int64_t>(std::max<uint64_t>(farthest, std::min<uint64_t>(between, INT64_MAX)));
  }
  return std::min(farthest, most);
}

Distances distances_of(const Arguments& a) {
  Distances found;
  found.reach = farthest_distance(a, saturated_distance(a));
  if (found.reach > kMostDistances) return found;
  const int64_t span = a.span(), mid = a.position_buckets / 2;
  const double per_log = std::log(static_cast<double>(a.max_relative_positions - 1) / static_cast<double>(mid));
  // The error that floating point may make in an exact integer.
  constexpr double kSlack = 0x1p-32;
  found.rows.resize(static_cast<size_t>(2 * found.reach + 1));
  int32_t* const of_zero = found.rows.data() + found.reach;
  for (int64_t distance = 0; distance <= found.reach; ++distance) {
    int64_t bucket = distance;
    if (mid > 0 && distance > mid) {
      const double steps = std::log(static_cast<double>(distance) / static_cast<double>(mid)) / per_log;
      bucket = mid + static_cast<int64_t>(std::ceil(steps * static_cast<double>(mid - 1) - kSlack));
    }
    of_zero[-distance] = static_cast<int32_t>(std::max<int64_t>(span - bucket, 0));
    of_zero[distance] = static_cast<int32_t>(std::min(span + bucket, 2 * span - 1));
  }
  return found;
}

cpu::RelativeTables tables_of(const Launch& launch, const Arguments& a, const Distances& distances) {
  const auto table = [&](const std::optional<Tensor>& t) { return t ? view(launch, *t) : HeadsView{nullptr, 0, 0}; };
  return {.pos_key = table(a.pos_key),
          .pos_query = table(a.pos_query),
          .rows = 2 * a.span(),
          .row_of_distance = distances.rows.data(),
          .reach = distances.reach,
          .positions = a.positions ? launch.in<int64_t>(*a.positions) : nullptr};
}

using ForwardResult = std::tuple<Tensor, Tensor>;

ForwardResult disentangled_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> pos_key,
                                     std::optional<Tensor> pos_query, Tensor cu_seqlens, int64_t max_seqlen,
                                     std::optional<Tensor> positions, std::optional<double> softmax_scale,
                                     int64_t position_buckets, int64_t max_relative_positions) {
  constexpr const char* kOp = "disentangled_attention";
  Arguments a(q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, positions, softmax_scale, position_buckets,
              max_relative_positions);
  check_arguments(kOp, a);
  const Launch launch(kOp, q);
  const Columns columns = columns_of(a);
  if (const char* reason = no_kernel(launch, a, columns, /*backward=*/false)) {
    return UseReference(reason);
  }
  a.make_contiguous();
  check_for_kernels(kOp, launch, a);
  Distances distances;
  if (launch.on_cpu() && a.has_terms()) {
    distances = distances_of(a);
    if (distances.rows.empty()) return UseReference(kTooManyDistances);
  }
  std::optional<Tensor> c2p, p2c;
  if (!launch.on_cpu()) {
    c2p = relative_scores(kOp, a, q, pos_key, columns);
    p2c = relative_scores(kOp, a, k, pos_query, columns);
  }
  ForwardResult result{empty(kOp, sizes_of(q), q.scalar_type(), q),
                       empty(kOp, {q.size(1), q.size(0)}, ScalarType::Float, q)};
  const AttentionForwardParams params{.problem = problem(launch, a, columns, c2p, p2c),
                                      .out = launch.out(std::get<0>(result)),
                                      .lse = launch.out<float>(std::get<1>(result))};
  if (!a.has_terms()) {
    launch.run<&launch_varlen_attention, &cpu::Kernels::varlen_attention>(params);
  } else if (launch.on_cpu()) {
    launch.run_on_cpu<&cpu::Kernels::disentangled_attention>(
        cpu::DisentangledParams{.attention = params, .tables = tables_of(launch, a, distances)});
  } else if constexpr (kHasKernels) {
    launch_disentangled_attention(params, launch.stream());
  }
  return result;
}

// Zeros, and where a term is missing nothing.
std::optional<Tensor> zeros_like(const char* op, const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  Tensor zeros = empty(op, sizes_of(*t), t->scalar_type(), *t);
  zero_(zeros);
  return zeros;
}

// dx, [total, heads, head_dim], with its part through a table of relative scores.
Tensor add_relative(const char* op, const Tensor& dx, const std::optional<Tensor>& dscores,
                    const std::optional<Tensor>& table, const Columns& columns) {
  if (!dscores) return dx;
  const Tensor part = by_head(product(op, *dscores, embeddings(*table, columns)));
  return torch::stable::subtract(dx.as_torch(), part.as_torch(), -1.0);
}

// The gradient of pos_key or pos_query; empty where there is none.
Tensor relative_gradient(const char* op, const Tensor& x, const std::optional<Tensor>& dscores,
                         const std::optional<Tensor>& table, const Columns& columns) {
  const auto gradient = zeros_like(op, table);
  if (!gradient) return empty(op, {0}, x.scalar_type(), x);
  // Rows of no sequence have no gradient, but may hold what times 0 is NaN.
  StableIValue stack[4] = {detail::box(x.as_torch()), detail::box(std::optional<double>(0.0)),
                           detail::box(std::optional<double>(0.0)), detail::box(std::optional<double>(0.0))};
  torch_check(torch_call_dispatcher("aten::nan_to_num", "", stack, TORCH_ABI_VERSION), op);
  const Tensor finite = torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
  Tensor part = embeddings(*gradient, columns);
  copy_(part, product(op, transpose(*dscores, 1, 2), by_head(finite)));
  return *gradient;
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult disentangled_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, std::optional<Tensor> pos_key,
                                               std::optional<Tensor> pos_query, Tensor out, Tensor lse,
                                               Tensor cu_seqlens, int64_t max_seqlen, std::optional<Tensor> positions,
                                               std::optional<double> softmax_scale, int64_t position_buckets,
                                               int64_t max_relative_positions) {
  constexpr const char* kOp = "disentangled_attention_backward";
  Arguments a(q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, positions, softmax_scale, position_buckets,
              max_relative_positions);
  check_arguments(kOp, a);
  for (const auto& [name, t] : {std::pair{"dout", dout}, std::pair{"out", out}}) {
    check(same_sizes(t, q) && t.scalar_type() == q.scalar_type(), kOp, ": ", name,
          " must have the shape and dtype of q, ", Got{q}, ", got ", Got{t});
    check_same_device(kOp, name, t, "q", q);
  }
  const Launch launch(kOp, q);
  const Columns columns = columns_of(a);
  if (const char* reason = no_kernel(launch, a, columns, /*backward=*/true)) {
    return UseReference(reason);
  }
  check(
      lse.dim() == 2 && lse.size(0) == q.size(1) && lse.size(1) == q.size(0) && lse.scalar_type() == ScalarType::Float,
      kOp, ": lse must be float32 of shape [", q.size(1), ", ", q.size(0), "], got ", Got{lse});
  check_same_device(kOp, "lse", lse, "q", q);
  if (launch.on_cpu()) lse = contiguous(lse);
  check_contiguous(kOp, "lse", lse);
  a.make_contiguous();
  check_for_kernels(kOp, launch, a);
  Distances distances;
  if (launch.on_cpu() && a.has_terms()) {
    distances = distances_of(a);
    if (distances.rows.empty()) return UseReference(kTooManyDistances);
  }
  dout = readable_rows(launch, dout);
  out = readable_rows(launch, out);
  // Made again rather than kept from the forward: they are heads * width numbers a token.
  std::optional<Tensor> c2p, p2c;
  if (!launch.on_cpu()) {
    c2p = relative_scores(kOp, a, q, pos_key, columns);
    p2c = relative_scores(kOp, a, k, pos_query, columns);
  }
  const auto dc2p = zeros_like(kOp, c2p), dp2c = zeros_like(kOp, p2c);
  const Tensor dq = empty(kOp, sizes_of(q), q.scalar_type(), q), dk = empty(kOp, sizes_of(q), q.scalar_type(), q);
  const Tensor dv = empty(kOp, sizes_of(q), q.scalar_type(), q);
  const Tensor delta = empty(kOp, {launch.on_cpu() ? 0 : q.size(1), q.size(0)}, ScalarType::Float, q);
  AttentionBackwardParams params{.problem = problem(launch, a, columns, c2p, p2c),
                                 .out = view(launch, out),
                                 .dout = view(launch, dout),
                                 .lse = launch.in<float>(lse),
                                 .dlse = nullptr,
                                 .delta = launch.out<float>(delta),
                                 .dq_accumulator = nullptr,
                                 .dq = launch.out(dq),
                                 .dk = launch.out(dk),
                                 .dv = launch.out(dv),
                                 .dq_mode = DqMode::kSeparate,
                                 .dc2p = dc2p ? launch.out(*dc2p) : nullptr,
                                 .dp2c = dp2c ? launch.out(*dp2c) : nullptr};
  if (!a.has_terms()) {
    params.dq_mode = launch.ask<&attention_backward_dq_mode>(params.problem, /*deterministic=*/true);
    launch.run<&launch_varlen_attention_backward, &cpu::Kernels::varlen_attention_backward>(params);
  } else if (launch.on_cpu()) {
    const auto gradient_of = [&](const std::optional<Tensor>& table) {
      return table ? empty(kOp, sizes_of(*table), q.scalar_type(), q) : empty(kOp, {0}, q.scalar_type(), q);
    };
    const Tensor dpos_key = gradient_of(pos_key), dpos_query = gradient_of(pos_query);
    launch.run_on_cpu<&cpu::Kernels::disentangled_attention_backward>(
        cpu::DisentangledBackwardParams{.attention = params,
                                        .tables = tables_of(launch, a, distances),
                                        .dpos_key = launch.out(dpos_key),
                                        .dpos_query = launch.out(dpos_query)});
    return {dq, dk, dv, dpos_key, dpos_query};
  } else if constexpr (kHasKernels) {
    launch_disentangled_attention_backward(params, launch.stream());
  }
  return {add_relative(kOp, dq, dc2p, pos_key, columns), add_relative(kOp, dk, dp2c, pos_query, columns), dv,
          relative_gradient(kOp, q, dc2p, pos_key, columns), relative_gradient(kOp, k, dp2c, pos_query, columns)};
}

}  // namespace

std::span<const Body> disentangled_attention_ops() {
  static constexpr Body kOps[] = {body<"disentangled_attention", &disentangled_attention>(),
                                  body<"disentangled_attention_backward", &disentangled_attention_backward>()};
  return kOps;
}

}  // namespace warpform
