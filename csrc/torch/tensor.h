// Helpers of all bindings on top of torch's stable headers: allocation with errors that keep their text, layouts that
// kernels read, the pointers of a launch, and the call of the reference.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "kernels/common/dtype.h"
#include "usable.h"

#ifdef WARPFORM_SIMT
#include "simt/host.h"
#define WARPFORM_NAMESPACE warpform_simt
#define WARPFORM_DEVICE_KEY CPU
#else
#define WARPFORM_NAMESPACE warpform
#define WARPFORM_DEVICE_KEY CUDA
#endif

// A CPU build of torch lacks this function, hence weak.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace warpform {

// A new contiguous tensor on the device of `like`, its contents unset (in the emulator: every byte 0xff, so that an
// element that no kernel wrote reads as NaN).
inline Tensor empty(const char* op, const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type = 0;
  torch_check(aoti_torch_get_device_type(like.get(), &device_type), op);
  AtenTensorHandle handle = nullptr;
  const int32_t code = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                                device_type, like.get_device_index(), &handle);
  if (code != 0) {
    const char* what =
        torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
    std::string text = what ? what : std::string(op) + ": allocation of an output failed";
    // Code that retries with a smaller batch looks for these words.
    if (like.is_cuda() && text.find("CUDA out of memory.") != 0) text = "CUDA out of memory. " + text;
    throw std::runtime_error(text);
  }
  Tensor out(handle);
#ifdef WARPFORM_SIMT
  std::memset(out.mutable_data_ptr(), 0xff, static_cast<size_t>(out.numel()) * out.element_size());
#endif
  return out;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto s = t.sizes();
  return std::vector<int64_t>(s.begin(), s.end());
}

// ---- layouts that kernels read ----

inline bool is_aligned(const Tensor& t, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % static_cast<uintptr_t>(alignment) == 0;
}

// A copy whose elements lie end to end and begin at an address that the allocator aligns.
inline Tensor dense_copy(const Tensor& t) {
  return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
}

// `t` contiguous and at a multiple of `alignment` bytes; copied where it is not, as gradients of slices are not.
inline Tensor dense(const Tensor& t, int64_t alignment = 16) {
  return t.is_contiguous() && is_aligned(t, alignment) ? t : dense_copy(t);
}
inline std::optional<Tensor> dense(const std::optional<Tensor>& t, int64_t alignment = 16) {
  return t ? std::optional<Tensor>(dense(*t, alignment)) : std::nullopt;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
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

inline bool is_bfloat16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

// ---- launches ----

// Makes the tensors' device current for its lifetime, says whether kernels can run there, and hands a launch its
// pointers and its stream. An op makes it before it asks anything that depends on the device. In the emulator the same
// calls tell it which memory the kernel may touch.
class Launch {
 public:
  Launch(const char* op, const Tensor& on)
#ifndef WARPFORM_SIMT
      : device_(on.get_device_index()), guard_(device_) {
    check(aoti_torch_get_current_cuda_stream != nullptr, op,
          ": this torch has no CUDA stream function, although the tensor is on a GPU; install a CUDA build of torch");
    torch_check(aoti_torch_get_current_cuda_stream(device_, &stream_), op);
  }
#else
  {
    (void)on;
    simt::begin_launches(op);
  }
  ~Launch() { simt::end_launches(); }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
#endif

  // Why no kernel may run, whatever the arguments, or null: the first question of every op, and what sends it to its
  // reference.
  const char* unusable() const {
#ifdef WARPFORM_SIMT
    return kernels_unusable(-1);
#else
    return kernels_unusable(device_);
#endif
  }

  const void* in(const Tensor& t) const {
    const void* p = t.const_data_ptr();
#ifdef WARPFORM_SIMT
    simt::register_memory(p, extent(t), /*writable=*/false);
#endif
    return p;
  }
  void* out(const Tensor& t) const {
    void* p = t.mutable_data_ptr();
#ifdef WARPFORM_SIMT
    simt::register_memory(p, extent(t), /*writable=*/true);
#endif
    return p;
  }
  template <class T>
  const T* in(const Tensor& t) const {
    return static_cast<const T*>(in(t));
  }
  template <class T>
  T* out(const Tensor& t) const {
    return static_cast<T*>(out(t));
  }
  const void* in_or_null(const std::optional<Tensor>& t) const { return t ? in(*t) : nullptr; }
  template <class T>
  const T* in_or_null(const std::optional<Tensor>& t) const {
    return t ? in<T>(*t) : nullptr;
  }
  void* stream() const { return stream_; }

 private:
#ifdef WARPFORM_SIMT
  // Bytes from the first to past the last element of a strided tensor.
  static size_t extent(const Tensor& t) {
    if (t.numel() == 0) return 0;
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    return static_cast<size_t>(last + 1) * t.element_size();
  }
#else
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

namespace detail {
template <class T>
inline StableIValue box(const T& v) {
  return torch::stable::detail::from(v);
}
}  // namespace detail

// The text of an exception that a reference raised in this thread. Torch 2.10 and 2.11 drop that text on the way back
// into C++, so the reference leaves it here as well (`_keep_error`).
inline std::string& kept_error() {
  thread_local std::string text;
  return text;
}

namespace detail {
template <class T>
std::tuple<const T&> as_tuple(const T& t) {
  return {t};
}
template <class... T>
std::tuple<T...> as_tuple(const std::tuple<T...>& t) {
  return t;
}
}  // namespace detail

// Calls warpform::NAME_reference(reason, args...) through the dispatcher: PyTorch code that warns once and names the
// reason. An argument that is a tuple counts as its elements. In the emulator there is no way out: a configuration
// without a kernel is an error there.
template <class... Results, class... Args>
inline std::tuple<Results...> call_reference(const char* name, const std::string& reason,
                                             [[maybe_unused]] const Args&... args) {
#ifdef WARPFORM_SIMT
  throw std::runtime_error(std::string(name) + ": no kernel: " + reason);
#else
  const auto call = [&](const auto&... each) {
    constexpr size_t kArgs = 1 + sizeof...(each);
    constexpr size_t kSlots = kArgs > sizeof...(Results) ? kArgs : sizeof...(Results);
    StableIValue stack[kSlots] = {detail::box(reason), detail::box(each)...};
    const std::string op = std::string("warpform::") + name + "_reference";
    kept_error().clear();
    const auto code = torch_call_dispatcher(op.c_str(), "", stack, TORCH_ABI_VERSION);
    if (code != 0 && !kept_error().empty()) throw std::runtime_error(kept_error());
    torch_check(code, name);
    return torch::stable::detail::unbox_to_tuple<Results...>(stack);
  };
  return std::apply(call, std::tuple_cat(detail::as_tuple(args)...));
#endif
}

}  // namespace warpform
