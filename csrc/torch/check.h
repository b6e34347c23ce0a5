// Errors of the ops. Every message reads "op: argument must be ..., got ...", and carries no source path.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace warpform {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error (RuntimeError in Python) with the parts joined, if !ok. The text is only built then.
template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (__builtin_expect(ok, true)) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Checks the return code of a call into torch and keeps torch's own words. The stable headers of torch 2.10 have no
// such macro, and the function that has the text came later, hence weak. Without it torch prints the text.
inline void torch_check(int32_t code, const char* op) {
  if (__builtin_expect(code == 0, true)) return;
  const char* what =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  throw std::runtime_error(std::string(op) + ": " + (what ? what : "a call into torch failed; stderr says why"));
}

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

inline bool is_float(ScalarType t) {
  return t == ScalarType::Half || t == ScalarType::BFloat16 || t == ScalarType::Float || t == ScalarType::Double;
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& as) {
  check(t.is_cuda() == as.is_cuda() && t.get_device_index() == as.get_device_index(), op, ": ", name,
        " must be on the device of the first argument");
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  check(t.is_contiguous(), op, ": ", name, " must be contiguous, got ", Got{t},
        " with other strides; call .contiguous()");
}

}  // namespace warpform
