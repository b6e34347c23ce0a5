#include "schema.h"

#include <stdexcept>

namespace warpform::python {
namespace {

[[noreturn]] void unknown(std::string_view what) {
  throw std::runtime_error("warpform._C: no schema of an op has this: " + std::string(what));
}

std::string_view trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(' ');
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(' ') - begin + 1);
}

Kind kind_of(std::string_view type) {
  if (type == "Tensor") return Kind::kTensor;
  if (type == "SymInt") return Kind::kInt;
  if (type == "float") return Kind::kFloat;
  if (type == "bool") return Kind::kBool;
  if (type == "str") return Kind::kText;
  if (type == "SymInt[]") return Kind::kInts;
  unknown(type);
}

void read_default(Parameter& parameter, std::string_view text) {
  parameter.has_default = true;
  if (text == "None") return;
  switch (parameter.kind) {
    case Kind::kInt:
      parameter.value.kind = api::Value::kInt;
      parameter.value.integer = std::stoll(std::string(text));
      return;
    case Kind::kFloat:
      parameter.value.kind = api::Value::kFloat;
      parameter.value.number = std::stod(std::string(text));
      return;
    case Kind::kBool:
      parameter.value.kind = api::Value::kBool;
      parameter.value.integer = text == "True";
      return;
    case Kind::kText:
      parameter.text = text.substr(1, text.size() - 2);  // without the quotes
      return;
    default: unknown(text);
  }
}

Parameter read_parameter(std::string_view text, bool keyword_only) {
  const size_t space = text.find(' ');
  if (space == std::string_view::npos) unknown(text);
  std::string_view type = text.substr(0, space);
  Parameter parameter{};
  parameter.optional = type.ends_with('?');
  if (parameter.optional) type.remove_suffix(1);
  parameter.kind = kind_of(type);
  parameter.keyword_only = keyword_only;
  std::string_view rest = text.substr(space + 1);
  const size_t equals = rest.find('=');
  parameter.name = rest.substr(0, equals);
  if (equals != std::string_view::npos) read_default(parameter, rest.substr(equals + 1));
  parameter.interned = PyUnicode_InternFromString(parameter.name.c_str());
  if (parameter.interned == nullptr) throw py::error_already_set();
  return parameter;
}

}  // namespace

std::vector<Parameter> parse_schema(std::string_view arguments) {
  std::vector<Parameter> parameters;
  bool keyword_only = false;
  while (!arguments.empty()) {
    const size_t comma = arguments.find(',');
    const std::string_view text = trimmed(arguments.substr(0, comma));
    if (text == "*") {
      keyword_only = true;
    } else {
      parameters.push_back(read_parameter(text, keyword_only));
    }
    arguments = comma == std::string_view::npos ? std::string_view{} : arguments.substr(comma + 1);
  }
  for (Parameter& parameter : parameters) {
    if (parameter.kind == Kind::kText && parameter.has_default) {
      parameter.value.kind = api::Value::kText;
      parameter.value.text = parameter.text.c_str();  // the vector moves no more
    }
  }
  return parameters;
}

}  // namespace warpform::python
