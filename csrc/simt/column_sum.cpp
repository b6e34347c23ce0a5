// The column sums by themselves, for tests: every size, and pointers that no op passes.
#include "kernels/common/column_sum.h"

#include <torch/csrc/stable/library.h>

#include "torch/launch.h"

namespace warpform {
namespace {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

void column_sum(torch::stable::Tensor partials_, torch::stable::Tensor out_) {
  const Tensor partials(partials_), out(out_);
  check(partials.dim() == 3 && partials.size(0) <= 3 && partials.is_contiguous() && out.dim() == 2 &&
            out.size(0) == partials.size(0) && out.size(1) == partials.size(2) && out.stride(1) == 1,
        "_column_sum: partials must be of shape [sums, groups, cols] and out [sums, cols], got ", Got{partials},
        " and ", Got{out});
  const Launch launch("_column_sum", partials);
  auto* to = static_cast<char*>(launch.out(out));
  const int64_t row_bytes = out.stride(0) * static_cast<int64_t>(out.element_size());
  launch_column_sum("_column_sum",
                    {.partials = launch.in<float>(partials),
                     .out = {to, to + row_bytes, to + 2 * row_bytes},
                     .sums = static_cast<int>(partials.size(0)),
                     .groups = partials.size(1),
                     .cols = partials.size(2),
                     .dtype = dtype_of(out)},
                    launch.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(warpform_simt, m) {
  // out[s] = the sum of partials[s] over its groups.
  m.def("_column_sum(Tensor partials, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(warpform_simt, CompositeExplicitAutograd, m) {
  m.impl("_column_sum", TORCH_BOX(&column_sum));
}

}  // namespace warpform
