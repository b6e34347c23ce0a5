// Tensors as the bodies of the ops see them, and what bodies ask of torch on top of its stable headers: allocation with
// errors that keep their text, and the few functions that are torch's.
//
// A tensor comes from torch's dispatcher or, without it, from warpform._C, which lends its address and its shape. Both
// look the same here; one that was lent becomes a tensor of torch only where a function of torch takes it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <ostream>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "api.h"
#include "kernels/common/dtype.h"

#ifdef WARPFORM_SIMT
#define WARPFORM_NAMESPACE warpform_simt
#else
#define WARPFORM_NAMESPACE warpform
#endif

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace warpform {

using torch::headeronly::ScalarType;

// Torch's own words for what went wrong last. The function came after torch 2.10, hence weak; without it torch prints
// the text.
inline const char* torch_error() {
  return torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
}

// Checks the return code of a call into torch.
inline void torch_check(int32_t code, const char* op) {
  if (code == 0) [[likely]]
    return;
  const char* what = torch_error();
  throw std::runtime_error(std::string(op) + ": " + (what ? what : "a call into torch failed; stderr says why"));
}

inline int32_t torch_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Undefined for a dtype that torch's stable headers have no name for. `pack` takes tensors of any dtype.
inline ScalarType dtype_of(int32_t code) {
  try {
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(code));
  } catch (const std::exception&) {
    return ScalarType::Undefined;
  }
}

class Tensor {
 public:
  Tensor() = default;
  // A tensor of torch.
  Tensor(torch::stable::Tensor t) : torch_(std::move(t)) {
    const AtenTensorHandle handle = torch_->get();
    int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
    int32_t dtype = 0;
    torch_check(aoti_torch_get_dim(handle, &dims), "warpform");
    torch_check(aoti_torch_get_sizes(handle, &sizes), "warpform");
    torch_check(aoti_torch_get_strides(handle, &strides), "warpform");
    torch_check(aoti_torch_get_dtype(handle, &dtype), "warpform");
    torch_check(aoti_torch_get_device_type(handle, &device_type_), "warpform");
    torch_check(aoti_torch_get_device_index(handle, &device_index_), "warpform");
    dims_ = static_cast<int32_t>(dims);
    sizes_ = sizes;
    strides_ = strides;
    dtype_ = dtype_of(dtype);
  }
  // A tensor that the caller keeps alive. Its dtype is Undefined where the ops have no name for it.
  explicit Tensor(const api::TensorView& lent);

  int64_t dim() const { return dims_; }
  // Of a dimension, counted from the last one where it is negative.
  int64_t size(int64_t dim) const { return sizes_[dim < 0 ? dim + dims_ : dim]; }
  int64_t stride(int64_t dim) const { return strides_[dim < 0 ? dim + dims_ : dim]; }
  std::span<const int64_t> sizes() const { return {sizes_, static_cast<size_t>(dims_)}; }
  int64_t numel() const {
    int64_t n = 1;
    for (int32_t i = 0; i < dims_; ++i) n *= sizes_[i];
    return n;
  }
  bool is_contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int32_t i = dims_; i-- > 0; expected *= sizes_[i]) {
      if (sizes_[i] != 1 && strides_[i] != expected) return false;
    }
    return true;
  }
  ScalarType scalar_type() const { return dtype_; }
  size_t element_size() const;

  bool is_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type_ == aoti_torch_device_type_cuda(); }
  int32_t device_type() const { return device_type_; }
  int32_t get_device_index() const { return device_index_; }
  bool on_device_of(const Tensor& other) const {
    return device_type_ == other.device_type_ && (is_cpu() || device_index_ == other.device_index_);
  }

  // A tensor without data, as plans have, gives an address that is never read: kernels take null for an absent tensor.
  const void* const_data_ptr() const { return is_meta() ? nowhere() : torch_ ? torch_->const_data_ptr() : lent_data_; }
  void* mutable_data_ptr() const { return is_meta() ? nowhere() : torch_ ? torch_->mutable_data_ptr() : lent_data_; }

  // As torch knows it.
  torch::stable::Tensor as_torch() const;

 private:
  bool is_meta() const { return device_type_ == aoti_torch_device_type_meta(); }
  // It is aligned as an allocator's is, and null where there is no element, as torch's tensors have it.
  void* nowhere() const { return numel() == 0 ? nullptr : reinterpret_cast<void*>(uintptr_t{1} << 20); }

  std::optional<torch::stable::Tensor> torch_;  // empty: lent
  void* lent_data_ = nullptr;
  const int64_t* sizes_ = nullptr;
  const int64_t* strides_ = nullptr;
  int32_t dims_ = 0;
  ScalarType dtype_ = ScalarType::Undefined;
  int32_t device_type_ = 0;
  int32_t device_index_ = 0;
};

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2fnuz: return "float8_e5m2fnuz";
    case ScalarType::Float8_e4m3fnuz: return "float8_e4m3fnuz";
    default: return "another dtype";
  }
}

// Streams as "int64 of shape [5]".
struct Got {
  const Tensor& t;
  friend std::ostream& operator<<(std::ostream& os, const Got& g) {
    os << dtype_name(g.t.scalar_type()) << " of shape [";
    for (int64_t i = 0; i < g.t.dim(); ++i) os << (i ? ", " : "") << g.t.size(i);
    return os << "]";
  }
};

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto s = t.sizes();
  return std::vector<int64_t>(s.begin(), s.end());
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::memcmp(a.sizes().data(), b.sizes().data(), a.sizes().size_bytes()) == 0;
}

// A new contiguous tensor on the device of `like`, its contents unset (in the emulator: every byte 0xff, so that an
// element that no kernel wrote reads as NaN).
Tensor empty(const char* op, const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like);

// Asks for huge pages under large memory of a CPU, 32 MiB and more, which is fresh from the system: the first touch of
// every 4 KiB of it costs more than what a kernel writes there. Where the system grants none nothing changes.
void ask_for_huge_pages(void* data, size_t bytes);

// ---- functions of torch ----

inline Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t.as_torch()); }
inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(contiguous(*t)) : std::nullopt;
}
inline Tensor transpose(const Tensor& t, int64_t a, int64_t b) { return torch::stable::transpose(t.as_torch(), a, b); }
inline Tensor narrow(const Tensor& t, int64_t dim, int64_t start, int64_t length) {
  torch::stable::Tensor whole = t.as_torch();
  return torch::stable::narrow(whole, dim, start, length);
}
inline Tensor zero_(const Tensor& t) {
  torch::stable::Tensor self = t.as_torch();
  torch::stable::zero_(self);
  return t;
}
inline void copy_(const Tensor& to, const Tensor& from) {
  torch::stable::Tensor self = to.as_torch();
  torch::stable::copy_(self, from.as_torch());
}

// ---- layouts that kernels read ----

inline bool is_aligned(const Tensor& t, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % static_cast<uintptr_t>(alignment) == 0;
}

// A copy whose elements lie end to end and begin at an address that the allocator aligns.
inline Tensor dense_copy(const Tensor& t) {
  return t.is_contiguous() ? torch::stable::clone(t.as_torch()) : torch::stable::contiguous(t.as_torch());
}

// `t` contiguous and at a multiple of `alignment` bytes; copied where it is not, as gradients of slices are not.
inline Tensor dense(const Tensor& t, int64_t alignment = 16) {
  return t.is_contiguous() && is_aligned(t, alignment) ? t : dense_copy(t);
}
inline std::optional<Tensor> dense(const std::optional<Tensor>& t, int64_t alignment = 16) {
  return t ? std::optional<Tensor>(dense(*t, alignment)) : std::nullopt;
}

// Elements from one index of `dim` to the next. A dimension of one element may have any stride and no address is made
// of it: 0.
inline int64_t stride_of(const Tensor& t, int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 0; }

inline bool last_dimension_is_contiguous(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1;
}

// True if the last dimension is contiguous and begins at a multiple of `alignment` bytes for every index before it.
inline bool has_aligned_rows(const Tensor& t, int64_t alignment = 16) {
  const auto bytes = static_cast<int64_t>(t.element_size());
  if (!last_dimension_is_contiguous(t) || !is_aligned(t, alignment)) return false;
  for (int64_t dim = 0; dim + 1 < t.dim(); ++dim) {
    if (stride_of(t, dim) * bytes % alignment != 0) return false;
  }
  return true;
}

// `t` with aligned rows; copied where it has none, as expanded gradients do not.
inline Tensor with_aligned_rows(const Tensor& t, int64_t alignment = 16) {
  return has_aligned_rows(t, alignment) ? t : dense_copy(t);
}

// The dtype as kernels name it; everything else than float16 and bfloat16 is float32 to them.
inline DType element_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

}  // namespace warpform
