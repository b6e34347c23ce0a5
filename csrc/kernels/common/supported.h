// The configurations that kernels exist for. Every family has a constexpr table of them in its launch.h. The op
// _kernel_table() lists the rows of all tables, and the bindings ask the same limits why a call has no kernel.
#pragma once

#include <cstdint>

namespace warpform {

// True if two texts are equal. <string_view> would cost every file of kernels half a second.
constexpr bool same_text(const char* a, const char* b) {
  while (*a != 0 && *a == *b) ++a, ++b;
  return *a == *b;
}

// The dtypes of a tensor that an op has kernels for.
struct SupportedDTypes {
  const char* names[5] = {};        // torch's names, in front of nulls
  const char* otherwise = nullptr;  // why a tensor of another dtype has no kernel

  // Null if there are kernels for the dtype of this name, else why there are none.
  constexpr const char* why_not(const char* name) const {
    for (const char* supported : names) {
      if (supported != nullptr && same_text(name, supported)) return nullptr;
    }
    return otherwise;
  }
};

inline constexpr SupportedDTypes kHalfTypes{{"float16", "bfloat16"}, "the kernels take float16 and bfloat16"};
inline constexpr SupportedDTypes kFloatTypes{{"float32", "float16", "bfloat16"}, "float64"};

// Bounds on a size of a problem.
struct SizeLimit {
  const char* name = nullptr;  // in the table of kernels
  int64_t multiple_of = 1;
  int64_t min = 0;
  int64_t max = INT64_MAX;
  const char* otherwise = nullptr;  // why another size has no kernel
  bool as_number = false;           // the table of kernels gives max by itself

  constexpr bool allows(int64_t size) const { return size % multiple_of == 0 && min <= size && size <= max; }
  // Null if there are kernels for the size, else why there are none.
  constexpr const char* why_not(int64_t size) const { return allows(size) ? nullptr : otherwise; }
};

// A string argument and the values of it that kernels take.
struct SupportedOption {
  const char* name = nullptr;
  const char* values[3] = {};
};

inline constexpr SupportedOption kGeluForms{"approximate", {"none", "tanh"}};

// An op with kernels: a row of the table of kernels for each of its dtypes, or one row if it names none.
struct SupportedConfig {
  const char* op;
  SupportedDTypes dtypes = {};
  SizeLimit limits[2] = {};
  bool float_parameters = false;  // parameters are of the activations' dtype or float32
  SupportedOption option = {};
};

}  // namespace warpform
