// Binding of _wgmma_product: what a layout's name says, checks, allocation, launch.
#include "wgmma_product.h"

#include <string_view>

#include "kernels/wgmma_product/launch.h"
#include "launch.h"

namespace warpform {
namespace {

constexpr const char* kOp = "_wgmma_product";

template <class T>
struct Choice {
  std::string_view text;
  T value;
};
constexpr Choice<ProductLeft> kLefts[] = {{"a_shared_outer", ProductLeft::kOuter},
                                          {"a_shared", ProductLeft::kDepth},
                                          {"a_registers", ProductLeft::kRegisters}};
constexpr Choice<bool> kRights[] = {{"_b_depth", false}, {"_b_outer", true}};
constexpr Choice<int> kSpans[] = {{"_k128", 128}, {"_k64", 64}, {"_k32", 32}, {"_none", 16}};
constexpr Choice<bool> kWays[] = {{"_stores", true}, {"", false}};

// Takes the first of the texts that `rest` begins with off it. False where there is none.
template <class T, size_t kCount>
bool take(std::string_view& rest, const Choice<T> (&choices)[kCount], T& value) {
  for (const Choice<T>& choice : choices) {
    if (rest.starts_with(choice.text)) {
      rest.remove_prefix(choice.text.size());
      value = choice.value;
      return true;
    }
  }
  return false;
}

void check_operand(const char* name, const Tensor& t, bool outer, const char* shape) {
  check_type(t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16, kOp, ": ", name,
             " must be float16 or bfloat16, got ", Got{t});
  const int64_t depth = t.dim() == 2 ? t.size(outer ? 0 : 1) : 0;
  check(t.dim() == 2 && t.size(outer ? 1 : 0) == 64 && depth > 0 && depth <= kProductMaxDepth && depth % 16 == 0, kOp,
        ": ", name, " must be of shape ", shape, ", depth 16, 32, 48 or 64, got ", Got{t});
  check_contiguous(kOp, name, t);
  check(is_aligned(t, 16), kOp, ": ", name, " must begin at a multiple of 16 bytes");
}

}  // namespace

torch::stable::Tensor wgmma_product(torch::stable::Tensor a_, torch::stable::Tensor b_, std::string layout) {
  const Tensor a(a_), b(b_);
  WgmmaProductParams p{};
  std::string_view rest = layout;
  const bool known = take(rest, kLefts, p.left) && take(rest, kRights, p.outer_b) && take(rest, kSpans, p.span) &&
                     take(rest, kWays, p.by_stores) && rest.empty();
  check(known, kOp,
        ": layout must be a_shared, a_shared_outer or a_registers, _b_depth or _b_outer, _k128, _k64, _k32 or _none, "
        "and possibly _stores, one behind the other, got ",
        layout);
  const bool outer_a = p.left == ProductLeft::kOuter;
  check_operand("a", a, outer_a, outer_a ? "[depth, 64]" : "[64, depth]");
  check_operand("b", b, p.outer_b, p.outer_b ? "[depth, 64]" : "[64, depth]");
  check_dtype_of(kOp, "b", b, "a", a);
  check_same_device(kOp, "b", b, "a", a);
  const int64_t depth = a.size(outer_a ? 0 : 1), depth_b = b.size(p.outer_b ? 0 : 1);
  check(depth == depth_b, kOp, ": b must have the depth ", depth, " that a has, got ", Got{b});

  const Launch launch(kOp, a);
  if (const char* reason = launch.unusable()) throw std::runtime_error(std::string(kOp) + ": no kernel: " + reason);
  Tensor out = empty(kOp, {kProductRows, kProductCols}, ScalarType::Float, a);
  p.a = launch.in(a);
  p.b = launch.in(b);
  p.out = launch.out<float>(out);
  p.depth = static_cast<int>(depth);
  p.dtype = element_type(a);
  if constexpr (kHasKernels) launch_wgmma_product(p, launch.stream());
  return out.as_torch();
}

}  // namespace warpform
