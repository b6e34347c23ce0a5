// What stands between the checks of an op and its kernels: whether kernels can run where the tensors are, the launch
// itself, and the way to the reference.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "check.h"
#include "cpu.h"
#include "kernels/common/plan.h"
#include "tensor.h"
#include "usable.h"

#ifdef WARPFORM_SIMT
#include "simt/host.h"
#endif

// A CPU build of torch lacks this function, hence weak.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace warpform {

// False in a library that was built without nvcc: on a GPU its ops check their arguments and go to their references.
#if defined(WARPFORM_WITH_CUDA) || defined(WARPFORM_SIMT)
inline constexpr bool kHasKernels = true;
#else
inline constexpr bool kHasKernels = false;
#endif

// False in the emulator's library, where tensors on a CPU are for the CUDA kernels.
#ifdef WARPFORM_SIMT
inline constexpr bool kHasCpuKernels = false;
#else
inline constexpr bool kHasCpuKernels = true;
#endif

inline constexpr const char* kOnCpu = "the tensors are on a CPU";
inline constexpr const char* kNoKernels = "warpform was built without CUDA kernels";

inline const char* without_kernels(const Tensor& on) { return on.is_cuda() ? kNoKernels : kOnCpu; }

// What an op returns to say that no kernel serves the call: whoever called it runs the reference, or, in the emulator,
// raises an error.
class UseReference {
 public:
  explicit UseReference(std::string reason);
  // Empty results, which the caller discards.
  template <class Results>
  operator Results() const {
    return Results{};
  }
};

// Makes the tensors' device current for its lifetime, says whether kernels can run there, hands a launch its pointers and
// its stream, and launches. An op makes it before it asks anything that depends on the device. In the emulator the same
// calls tell it which memory the kernel may touch.
class Launch {
 public:
  Launch(const char* op, const Tensor& on)
#ifndef WARPFORM_SIMT
      : on_cuda_(on.is_cuda()),
        on_cpu_(on.is_cpu()),
        planned_(current_plan() != nullptr),
        device_(on.get_device_index()) {
    if (!on_cuda_ || planned_) return;
    guard_.emplace(device_);
    if (aoti_torch_get_current_cuda_stream == nullptr) {
      throw std::runtime_error(std::string(op) +
                               ": this torch has no CUDA stream function, although the tensor is on " +
                               "a GPU; install a CUDA build of torch");
    }
    torch_check(aoti_torch_get_current_cuda_stream(device_, &stream_), op);
  }
#else
  {
    (void)on;
    simt::begin_launches(op);
  }
  ~Launch() { simt::end_launches(); }
#endif
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  // True if what runs is for a CPU: a kernel of csrc/cpu or a reference. False in the emulator.
  bool on_cpu() const {
#ifdef WARPFORM_SIMT
    return false;
#else
    return on_cpu_;
#endif
  }

  // Why no kernel may run, whatever the arguments, or null, for an op that has CPU kernels too.
  const char* unusable_anywhere() const {
    if constexpr (kHasCpuKernels) {
      if (on_cpu()) return cpu_kernels_unusable();
    }
    return unusable();
  }

  // The same for an op that has CUDA kernels alone. One of the two is the first question of every op.
  const char* unusable() const {
#ifdef WARPFORM_SIMT
    return kernels_unusable(-1);
#else
    if (!kHasKernels) return on_cuda_ ? kNoKernels : kOnCpu;
    if (planned_) return nullptr;
    return on_cuda_ ? kernels_unusable(device_) : kOnCpu;
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

  // Runs the kernel kCuda on a GPU and kCpu, a member of cpu::Kernels, on a CPU.
  template <auto kCuda, auto kCpu, class Params>
  void run(const Params& params) const {
    if constexpr (kHasCpuKernels) {
      if (on_cpu()) {
        (cpu::kernels()->*kCpu)(params, torch_host());
        return;
      }
    }
    if constexpr (kHasKernels) kCuda(params, stream());
  }
  // Runs a CPU kernel whose parameters are its own; on_cpu() has to be true.
  template <auto kCpu, class Params>
  void run_on_cpu(const Params& params) const {
    if constexpr (kHasCpuKernels) (cpu::kernels()->*kCpu)(params, torch_host());
  }
  // What the CUDA kernels say about a problem; on a CPU 0, false or null: CPU kernels need no workspace.
  template <auto kAsk, class... Arguments>
  auto ask(const Arguments&... arguments) const {
    if constexpr (kHasKernels) {
      if (!on_cpu()) return kAsk(arguments...);
    }
    return decltype(kAsk(arguments...)){};
  }

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
  bool on_cuda_, on_cpu_, planned_;
  int32_t device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
  void* stream_ = nullptr;
};

}  // namespace warpform
