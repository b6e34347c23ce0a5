// The arguments of an op, as its schema declares them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "torch/api.h"

namespace warpform::python {

namespace py = pybind11;

enum class Kind { kTensor, kInt, kFloat, kBool, kText, kInts };

struct Parameter {
  Kind kind;
  bool optional;  // None is a value
  bool keyword_only;
  bool has_default;
  api::Value value;  // the default
  std::string name;
  std::string text;    // a default that is text
  PyObject* interned;  // the name, kept for the life of the process
};

// Reads "Tensor q, float? scale=None, *, bool causal=False". Throws std::runtime_error where it meets what no op has.
std::vector<Parameter> parse_schema(std::string_view arguments);

}  // namespace warpform::python
