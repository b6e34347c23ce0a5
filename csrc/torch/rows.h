// Checks that the bindings of the row-wise and elementwise ops share: activations seen as rows, and their parameters.
#pragma once

#include "launch.h"

namespace warpform {

// The activations of an op: [..., cols], seen as [rows, cols].
struct Rows {
  int64_t rows;
  int64_t cols;
};

// A tensor without dimensions is one row of one element.
inline Rows rows_of(const Tensor& t) {
  const int64_t cols = t.dim() == 0 ? 1 : t.size(-1);
  return {cols == 0 ? 0 : t.numel() / cols, cols};
}

inline void check_like(const char* op, const char* name, const Tensor& t, const char* as_name, const Tensor& as) {
  check(t.scalar_type() == as.scalar_type() && same_sizes(t, as), op, ": ", name, " must be ", Got{as}, " as ", as_name,
        " is, got ", Got{t});
  check_same_device(op, name, t, as_name, as);
}

// A parameter with one element for each column of `x`, in its dtype or in float32.
inline void check_parameter(const char* op, const char* name, const Tensor& t, int64_t cols, const char* x_name,
                            const Tensor& x) {
  check(t.dim() == 1 && t.size(0) == cols, op, ": ", name, " must be of shape [", cols, "], got ", Got{t});
  check_type(t.scalar_type() == x.scalar_type() || t.scalar_type() == ScalarType::Float, op, ": ", name, " must be ",
             dtype_name(x.scalar_type()), " as ", x_name, " is, or float32, got ", Got{t});
  check_same_device(op, name, t, x_name, x);
}

// A statistic with one element for each normalised row (or sample) of `x`: float32, or float64 where x is.
inline void check_statistics(const char* op, const char* name, const Tensor& t, int64_t rows, const char* x_name,
                             const Tensor& x) {
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == rows, op, ": ", name, " must be ", dtype_name(dtype),
        " of shape [", rows, "], got ", Got{t});
  check_same_device(op, name, t, x_name, x);
}

inline void check_gelu_form(const char* op, const std::string& approximate) {
  check(approximate == "none" || approximate == "tanh", op, ": approximate must be \"none\" or \"tanh\", got '",
        approximate, "'");
}

inline void check_eps(const char* op, double eps) {
  check_finite(op, "eps", eps);
  check(eps >= 0, op, ": eps must not be negative, got ", Number{eps});
}

}  // namespace warpform
