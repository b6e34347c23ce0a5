// Checks that the bindings of the row-wise and elementwise ops share: activations seen as rows, and their parameters.
#pragma once

#include "launch.h"

namespace warpform {

// The activations of an op: [..., cols], seen as [rows, cols].
struct Rows {
  int64_t rows;
  int64_t cols;
};

inline Rows rows_of(const char* op, const char* name, const Tensor& t) {
  check(t.dim() >= 1 && is_float(t.scalar_type()), op, ": ", name,
        " must be a floating-point tensor of shape [..., hidden], got ", Got{t});
  const int64_t cols = t.size(t.dim() - 1);
  return {cols == 0 ? 0 : t.numel() / cols, cols};
}

inline void check_like(const char* op, const char* name, const Tensor& t, const char* as_name, const Tensor& as) {
  check(t.scalar_type() == as.scalar_type() && sizes_of(t) == sizes_of(as), op, ": ", name, " must be ", Got{as},
        " as ", as_name, " is, got ", Got{t});
  check_same_device(op, name, t, as);
}

inline void check_parameter(const char* op, const char* name, const Tensor& t, int64_t cols, const Tensor& x) {
  const ScalarType dtype = t.scalar_type();
  check(t.dim() == 1 && t.size(0) == cols && (dtype == x.scalar_type() || dtype == ScalarType::Float), op, ": ", name,
        " must be ", x.scalar_type() == ScalarType::Float ? "" : dtype_name(x.scalar_type()),
        x.scalar_type() == ScalarType::Float ? "" : " or ", "float32 of shape [", cols, "], got ", Got{t});
  check_same_device(op, name, t, x);
}

}  // namespace warpform
