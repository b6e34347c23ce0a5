// Checks of arguments, the only ones: both ways into an op, through torch's dispatcher and from warpform._C, lead to
// them. Every message reads "op: argument must be ..., got ...", and carries no source path.
#pragma once

#include <charconv>
#include <cmath>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace warpform {

// An argument of a wrong type or dtype: TypeError in Python.
struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
// An argument of a wrong shape, device, layout or value: ValueError in Python.
struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

namespace detail {
template <class Error, class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void raise(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}
}  // namespace detail

// Throws ValueError with the parts joined, if !ok.
template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    detail::raise<ValueError>(parts...);
}
// Throws TypeError with the parts joined, if !ok.
template <class... Parts>
inline void check_type(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    detail::raise<TypeError>(parts...);
}

// Streams as Python prints a float: "0.5", "-1.0", "inf".
struct Number {
  double value;
  friend std::ostream& operator<<(std::ostream& os, const Number& n) {
    char text[40];
    const auto end = std::to_chars(text, text + sizeof text, n.value).ptr;
    os.write(text, end - text);
    const bool whole = std::isfinite(n.value) && n.value == std::floor(n.value) && std::abs(n.value) < 1e16;
    return whole ? os << ".0" : os;
  }
};

// Streams as "[2, 3]".
struct Shape {
  const Tensor& t;
  friend std::ostream& operator<<(std::ostream& os, const Shape& s) {
    os << "[";
    for (int64_t i = 0; i < s.t.dim(); ++i) os << (i ? ", " : "") << s.t.size(i);
    return os << "]";
  }
};

// Streams as "[2, 3]".
struct Numbers {
  std::span<const int64_t> values;
  friend std::ostream& operator<<(std::ostream& os, const Numbers& n) {
    os << "[";
    for (size_t i = 0; i < n.values.size(); ++i) os << (i ? ", " : "") << n.values[i];
    return os << "]";
  }
};

// Streams as "cuda:0".
struct Place {
  const Tensor& t;
  friend std::ostream& operator<<(std::ostream& os, const Place& p) {
    if (p.t.is_cpu()) return os << "cpu";
    if (p.t.device_type() == aoti_torch_device_type_meta()) return os << "meta";
    if (!p.t.is_cuda()) return os << "another device";
    return os << "cuda:" << p.t.get_device_index();
  }
};

inline bool is_float(ScalarType t) {
  return t == ScalarType::Half || t == ScalarType::BFloat16 || t == ScalarType::Float || t == ScalarType::Double;
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  check_type(is_float(t.scalar_type()), op, ": ", name, " must be float16, bfloat16, float32 or float64, got ", Got{t});
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* as_name,
                              const Tensor& as) {
  check(t.on_device_of(as), op, ": ", name, " must be on ", Place{as}, " as ", as_name, " is, got ", Place{t});
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  check(t.is_contiguous(), op, ": ", name, " must be contiguous, got ", Got{t},
        " with other strides; call .contiguous()");
}

inline void check_finite(const char* op, const char* name, double value) {
  check(std::isfinite(value), op, ": ", name, " must be finite, got ", Number{value});
}

inline void check_dtype_of(const char* op, const char* name, const Tensor& t, const char* as_name, const Tensor& as) {
  check_type(t.scalar_type() == as.scalar_type(), op, ": ", name, " must be ", dtype_name(as.scalar_type()), " as ",
             as_name, " is, got ", Got{t});
}

}  // namespace warpform
