// Bindings of packing: checks, allocation, launch.
#include "kernels/packing/launch.h"

#include "binding.h"

namespace warpform {
namespace {

bool is_bool_or_integer(ScalarType t) {
  switch (t) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64: return true;
    default: return false;
  }
}

using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Plan packing_plan(Tensor mask, int64_t capacity) {
  constexpr const char* kOp = "packing_plan";
  check(mask.dim() == 2, kOp, ": mask must be of shape [batch, seqlen], got ", Got{mask});
  check_type(is_bool_or_integer(mask.scalar_type()), kOp, ": mask must be bool or integer, got ", Got{mask});
  check(capacity >= 0, kOp, ": capacity must not be negative, got ", capacity);
  const int64_t batch = mask.size(0), seqlen = mask.size(1);
  check(batch * seqlen <= INT32_MAX && capacity <= INT32_MAX, kOp,
        ": mask and capacity must count at most 2^31 - 1 tokens, since cu_seqlens is int32; got ", Got{mask},
        " and capacity ", capacity);
  const int mask_bytes = static_cast<int>(mask.element_size());
  const Launch launch(kOp, mask);
  const char* reason = launch.unusable_anywhere();
  if (reason == nullptr && !launch.on_cpu() && (mask_bytes == 2 || (seqlen > 1 && mask.stride(1) != 1))) {
    reason = "the mask is int16 or its last dimension is not contiguous";
  }
  if (reason != nullptr) {
    return UseReference(reason);
  }
  Plan plan{empty(kOp, {batch + 1}, ScalarType::Int, mask),     empty(kOp, {batch}, ScalarType::Int, mask),
            empty(kOp, {capacity}, ScalarType::Long, mask),     empty(kOp, {capacity}, ScalarType::Long, mask),
            empty(kOp, {batch, seqlen}, ScalarType::Int, mask), empty(kOp, {2}, ScalarType::Long, mask)};
  launch.run<&launch_packing_plan, &cpu::Kernels::packing_plan>(
      PackingPlanParams{.mask = launch.in(mask),
                        .mask_bytes = mask_bytes,
                        .mask_stride = mask.stride(0),
                        .mask_column_stride = seqlen > 1 ? mask.stride(1) : 1,
                        .batch = batch,
                        .seqlen = seqlen,
                        .capacity = capacity,
                        .cu_seqlens = launch.out<int32_t>(std::get<0>(plan)),
                        .lengths = launch.out<int32_t>(std::get<1>(plan)),
                        .indices = launch.out<int64_t>(std::get<2>(plan)),
                        .position_ids = launch.out<int64_t>(std::get<3>(plan)),
                        .ranks = launch.out<int32_t>(std::get<4>(plan)),
                        .summary = launch.out<int64_t>(std::get<5>(plan))});
  return plan;
}

// Whether x is rows that are contiguous each, at equal distances over its first `dims` dimensions.
bool has_even_rows(const Tensor& x, int dims) {
  int64_t expected = 1;
  for (int64_t i = x.dim(); i-- > dims; expected *= x.size(i)) {
    if (x.size(i) != 1 && x.stride(i) != expected) return false;
  }
  return dims == 1 || x.size(0) == 1 || x.size(1) == 1 || x.stride(0) == x.size(1) * x.stride(1);
}

// Elements from row to row of such an x, which is not empty.
int64_t row_stride(const Tensor& x, int dims) { return x.stride(dims == 2 && x.size(1) == 1 ? 0 : dims - 1); }

// pack and unpack are one gather: the rows of `x` (its first `in_dims` dimensions) are read where `index` says. Gradients
// often are not contiguous: they are copied before, but for a CPU only where their rows are not contiguous either.
Tensor gather(const char* op, const Launch& launch, Tensor x, int in_dims, const Tensor& index) {
  const bool in_place = launch.on_cpu() && x.numel() > 0 && has_even_rows(x, in_dims);
  if (!in_place) x = contiguous(x);
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
  const int64_t in_stride = in_place ? row_stride(x, in_dims) * static_cast<int64_t>(x.element_size()) : row_bytes;
  launch.run<&launch_gather_rows, &cpu::Kernels::gather_rows>(
      GatherRowsParams{.in = launch.in(x),
                       .out = launch.out(out),
                       .index = launch.in(index),
                       .index_bytes = static_cast<int>(index.element_size()),
                       .in_rows = in_rows,
                       .out_rows = index.numel(),
                       .row_bytes = row_bytes,
                       .in_stride = in_stride});
  return out;
}

// Why no kernel moves the rows of x, or null.
const char* no_kernel(const Launch& launch, const Tensor& x) {
  if (const char* reason = launch.unusable_anywhere()) return reason;
  return x.scalar_type() == ScalarType::Undefined ? "a dtype that torch's stable headers have no name for" : nullptr;
}

void check_packing(const char* op, const char* x_name, const Tensor& x, const Tensor& indices, const Tensor& ranks) {
  check(indices.dim() == 1 && indices.scalar_type() == ScalarType::Long, op,
        ": indices must be int64 of shape [total], got ", Got{indices});
  check(ranks.dim() == 2 && ranks.scalar_type() == ScalarType::Int, op,
        ": ranks must be int32 of shape [batch, seqlen], got ", Got{ranks});
  check_same_device(op, "indices", indices, x_name, x);
  check_same_device(op, "ranks", ranks, x_name, x);
}

Tensor pack(Tensor x, Tensor indices, Tensor ranks) {
  constexpr const char* kOp = "pack";
  check_packing(kOp, "x", x, indices, ranks);
  check(x.dim() >= 2 && x.size(0) == ranks.size(0) && x.size(1) == ranks.size(1), kOp, ": x must be of shape [",
        ranks.size(0), ", ", ranks.size(1), ", '...'] as the mask was, got ", Got{x});
  const Launch launch(kOp, x);
  if (const char* reason = no_kernel(launch, x)) {
    return UseReference(reason);
  }
  return gather(kOp, launch, x, 2, contiguous(indices));
}

Tensor unpack(Tensor t, Tensor indices, Tensor ranks) {
  constexpr const char* kOp = "unpack";
  check_packing(kOp, "t", t, indices, ranks);
  check(t.dim() >= 1 && t.size(0) == indices.size(0), kOp, ": t must be of shape [", indices.size(0),
        ", '...'], the packed rows, got ", Got{t});
  const Launch launch(kOp, t);
  if (const char* reason = no_kernel(launch, t)) {
    return UseReference(reason);
  }
  return gather(kOp, launch, t, 1, contiguous(ranks));
}

}  // namespace

std::span<const Body> packing_ops() {
  static constexpr Body kOps[] = {body<"packing_plan", &packing_plan>(), body<"pack", &pack>(),
                                  body<"unpack", &unpack>()};
  return kOps;
}

}  // namespace warpform
