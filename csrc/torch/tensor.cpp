#include "tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace warpform {
namespace {

// The codes of DLPack: signed, unsigned, floating-point, bfloat16, complex, bool, four of 8 bits.
ScalarType dtype_of(const api::TensorView& t) {
  switch (t.dtype_code << 8 | t.dtype_bits) {
    case 0 << 8 | 8: return ScalarType::Char;
    case 0 << 8 | 16: return ScalarType::Short;
    case 0 << 8 | 32: return ScalarType::Int;
    case 0 << 8 | 64: return ScalarType::Long;
    case 1 << 8 | 8: return ScalarType::Byte;
    case 2 << 8 | 16: return ScalarType::Half;
    case 2 << 8 | 32: return ScalarType::Float;
    case 2 << 8 | 64: return ScalarType::Double;
    case 4 << 8 | 16: return ScalarType::BFloat16;
    case 5 << 8 | 32: return ScalarType::ComplexHalf;
    case 5 << 8 | 64: return ScalarType::ComplexFloat;
    case 5 << 8 | 128: return ScalarType::ComplexDouble;
    case 6 << 8 | 8: return ScalarType::Bool;
    case 1 << 8 | 16: return ScalarType::UInt16;
    case 1 << 8 | 32: return ScalarType::UInt32;
    case 1 << 8 | 64: return ScalarType::UInt64;
    case 10 << 8 | 8: return ScalarType::Float8_e4m3fn;
    case 11 << 8 | 8: return ScalarType::Float8_e4m3fnuz;
    case 12 << 8 | 8: return ScalarType::Float8_e5m2;
    case 13 << 8 | 8: return ScalarType::Float8_e5m2fnuz;
    default: return ScalarType::Undefined;
  }
}

int32_t device_type_of(const api::TensorView& t) {
  switch (t.device_type) {
    case api::TensorView::kCpu: return aoti_torch_device_type_cpu();
    case api::TensorView::kCuda: return aoti_torch_device_type_cuda();
    case api::TensorView::kMeta: return aoti_torch_device_type_meta();
    default: throw std::runtime_error("a tensor on a device that no op runs on");
  }
}

}  // namespace

void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kFromBytes = uintptr_t{32} << 20, kHugePage = uintptr_t{2} << 20;
  if (bytes < kFromBytes) return;
  // The part that is whole huge pages: what else lies in the first and the last belongs to others.
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage,
                  last = (begin + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor::Tensor(const api::TensorView& lent)
    : lent_data_(lent.data),
      sizes_(lent.sizes),
      strides_(lent.strides),
      dims_(lent.dims),
      dtype_(dtype_of(lent)),
      device_type_(device_type_of(lent)),
      device_index_(lent.device_type == api::TensorView::kCpu ? -1 : lent.device_index) {}

size_t Tensor::element_size() const {
  switch (dtype_) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Float8_e5m2:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e4m3fnuz:
    case ScalarType::Bool: return 1;
    case ScalarType::Short:
    case ScalarType::UInt16:
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Int:
    case ScalarType::UInt32:
    case ScalarType::Float:
    case ScalarType::ComplexHalf: return 4;
    case ScalarType::Long:
    case ScalarType::UInt64:
    case ScalarType::Double:
    case ScalarType::ComplexFloat: return 8;
    case ScalarType::ComplexDouble: return 16;
    default: return as_torch().element_size();  // never lent
  }
}

torch::stable::Tensor Tensor::as_torch() const {
  if (torch_) return *torch_;
  AtenTensorHandle handle = nullptr;
  if (is_meta()) {
    torch_check(aoti_torch_empty_strided(dims_, sizes_, strides_, torch_code(dtype_), device_type_, 0, &handle),
                "warpform");
  } else {
    torch_check(aoti_torch_create_tensor_from_blob(lent_data_, dims_, sizes_, strides_, 0, torch_code(dtype_),
                                                   device_type_, is_cpu() ? 0 : device_index_, &handle),
                "warpform");
  }
  return torch::stable::Tensor(handle);
}

Tensor empty(const char* op, const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  constexpr size_t kDims = 16;
  int64_t few[kDims];
  std::vector<int64_t> many(sizes.size() > kDims ? sizes.size() : 0);
  int64_t* strides = many.empty() ? few : many.data();
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  const int32_t code =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, torch_code(dtype),
                               like.device_type(), like.get_device_index(), &handle);
  if (code != 0) {
    const char* what = torch_error();
    std::string text = what ? what : std::string(op) + ": allocation of an output failed";
    // Code that retries with a smaller batch looks for these words.
    if (like.is_cuda() && text.find("CUDA out of memory.") != 0) text = "CUDA out of memory. " + text;
    throw std::runtime_error(text);
  }
  Tensor out{torch::stable::Tensor(handle)};
  if (out.is_cpu()) {
    ask_for_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  }
#ifdef WARPFORM_SIMT
  if (out.is_cpu()) std::memset(out.mutable_data_ptr(), 0xff, static_cast<size_t>(out.numel()) * out.element_size());
#endif
  return out;
}

}  // namespace warpform
