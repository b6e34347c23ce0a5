// A direct call of bias_gelu without a launch takes the host of an H200 3.3 to 4.0 us, of which the body with its checks
// and its allocation takes 1.3; torch.empty takes 2.4 to 4.0 there, and a launch adds 4.7. The rest is reading arguments,
// asking torch whether something needs its dispatcher, and making Python's tensors, so all of it keeps to CPython's own
// calls instead of pybind11's conversions.
#include "direct.h"

#include <pybind11/stl.h>
#include <structmember.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "dlpack.h"
#include "schema.h"

namespace warpform::python {
namespace {

constexpr int kMostArguments = 24;
constexpr int kMostResults = 8;
constexpr int kMostIntegers = 8;

Torch torch;
const dlpack::Exchange* exchange = nullptr;
bool open = true;
PyObject* requires_grad_name = nullptr;
PyObject* is_neg_name = nullptr;

// An op's call. It lives as long as the process, as the op does, and takes no part in garbage collection.
struct DirectOp {
  PyObject_HEAD vectorcallfunc vectorcall;
  const api::Table* table;
  const api::Op* op;
  std::vector<Parameter>* parameters;
  int positional;
  PyObject* fallback;
  PyObject* recorded;
};

// A call's arguments as the table takes them.
struct Arguments {
  api::Value values[kMostArguments];
  api::TensorView tensors[kMostArguments];
  int64_t integers[kMostArguments][kMostIntegers];
  int tensor_count = 0;
};

bool is_tensor(PyObject* object) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.tensor_type || type == torch.parameter_type;
}

// The truth of what a function of torch returns. An error counts as true, which sends the call to the dispatcher.
bool asks_yes(PyObject* function) {
  PyObject* answer = PyObject_CallNoArgs(function);
  if (answer == nullptr) {
    PyErr_Clear();
    return true;
  }
  const int truth = answer == Py_False || answer == Py_None ? 0 : PyObject_IsTrue(answer);
  if (truth < 0) PyErr_Clear();
  const bool yes = truth != 0;
  Py_DECREF(answer);
  return yes;
}

// True unless a module's variable is the object that it is while nothing needs the dispatcher.
bool is_raised(PyObject* flag) {
  PyObject* value = PyDict_GetItemWithError(PyTuple_GET_ITEM(flag, 0), PyTuple_GET_ITEM(flag, 1));
  if (value == nullptr) PyErr_Clear();
  return value != PyTuple_GET_ITEM(flag, 2);
}

bool attribute_is_true(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) {
    PyErr_Clear();
    return true;
  }
  const bool yes = value == Py_True;
  Py_DECREF(value);
  return yes;
}

// ---- arguments ----

// True for a tensor on a kind of device that has kernels.
bool takes(const api::Table& table, const api::TensorView& t) {
  return t.device_type >= 0 && t.device_type < 32 && (table.device_types >> t.device_type & 1) != 0;
}

// True for a tensor that is negated where it is read, such as the imaginary part of a conjugate: its memory holds other
// numbers, and DLPack does not say so.
bool is_negated(PyObject* object) {
  PyObject* answer = PyObject_CallMethodNoArgs(object, is_neg_name);
  if (answer == nullptr) PyErr_Clear();
  const bool no = answer == Py_False;
  Py_XDECREF(answer);
  return !no;
}

bool read_tensor(PyObject* object, Arguments& arguments, api::Value& value) {
  dlpack::Tensor t;
  if (exchange->tensor_from_py_object_no_sync(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  constexpr uint8_t kFloat = 2, kBfloat16 = 4, kComplex = 5;
  // Complex numbers may be conjugated where they are read.
  if (t.dtype.lanes != 1 || t.dtype.code == kComplex) return false;
  if ((t.dtype.code == kFloat || t.dtype.code == kBfloat16) && is_negated(object)) return false;
  // Torch's tensors of zeros without memory look like any other.
  if (t.data == nullptr && std::all_of(t.shape, t.shape + t.ndim, [](int64_t size) { return size != 0; })) return false;
  api::TensorView& view = arguments.tensors[arguments.tensor_count++];
  view = {.data = static_cast<char*>(t.data) + t.byte_offset,
          .sizes = t.shape,
          .strides = t.strides,
          .dims = t.ndim,
          .dtype_code = t.dtype.code,
          .dtype_bits = t.dtype.bits,
          .device_type = t.device.type,
          .device_index = t.device.id};
  value.kind = api::Value::kTensor;
  value.tensor = &view;
  return true;
}

bool read_integer(PyObject* object, int64_t& out) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

bool read_integers(PyObject* object, int64_t (&out)[kMostIntegers], api::Value& value) {
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
  if (count > kMostIntegers) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!read_integer(PySequence_Fast_GET_ITEM(object, i), out[i])) return false;
  }
  value.kind = api::Value::kInts;
  value.count = static_cast<int32_t>(count);
  value.integers = out;
  return true;
}

bool read_text(PyObject* object, api::Value& value) {
  Py_ssize_t size = 0;
  value.text = PyUnicode_AsUTF8AndSize(object, &size);
  if (value.text == nullptr) PyErr_Clear();
  return value.text != nullptr && std::strlen(value.text) == static_cast<size_t>(size);
}

// False for what torch has to look at: other types, subclasses, and what is wrong.
bool read(PyObject* object, const Parameter& parameter, int index, Arguments& arguments) {
  api::Value& value = arguments.values[index];
  if (object == Py_None) {
    value.kind = api::Value::kNone;
    return parameter.optional;
  }
  switch (parameter.kind) {
    case Kind::kTensor: return is_tensor(object) && read_tensor(object, arguments, value);
    case Kind::kInt: value.kind = api::Value::kInt; return read_integer(object, value.integer);
    case Kind::kFloat:
      value.kind = api::Value::kFloat;
      if (PyFloat_CheckExact(object)) {
        value.number = PyFloat_AS_DOUBLE(object);
        return true;
      }
      if (!PyLong_CheckExact(object)) return false;
      value.number = PyLong_AsDouble(object);
      if (value.number == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
      }
      return true;
    case Kind::kBool:
      value.kind = api::Value::kBool;
      value.integer = object == Py_True;
      return object == Py_True || object == Py_False;
    case Kind::kText: value.kind = api::Value::kText; return PyUnicode_CheckExact(object) && read_text(object, value);
    case Kind::kInts: return read_integers(object, arguments.integers[index], value);
  }
  return false;
}

// Puts each argument at its parameter; null where it has to come from a default. False where torch would complain.
bool place(const DirectOp& self, PyObject* const* args, Py_ssize_t given, PyObject* names, PyObject** placed) {
  const std::vector<Parameter>& parameters = *self.parameters;
  if (given > self.positional) return false;
  for (Py_ssize_t i = 0; i < given; ++i) placed[i] = args[i];
  const Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GET_ITEM(names, i);
    size_t at = static_cast<size_t>(given);
    while (at < parameters.size() && parameters[at].interned != name) ++at;
    if (at == parameters.size()) {  // a name that is not interned, or unknown, or given twice
      for (at = static_cast<size_t>(given); at < parameters.size(); ++at) {
        if (PyUnicode_Compare(parameters[at].interned, name) == 0) break;
      }
    }
    if (at == parameters.size() || placed[at] != nullptr) return false;
    placed[at] = args[given + i];
  }
  return true;
}

bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

// Where a call goes.
enum class Way { kKernels, kAutograd, kTorch };

// Through torch if a mode, a transform, autocast, a profiler or a tracer would see the call, or a setting of warpform
// makes the long way log or validate. Otherwise to the kernels, recorded for a backward where gradients are wanted.
Way way_of(PyObject* const* placed, const std::vector<Parameter>& parameters) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.flags); ++i) {
    if (is_raised(PyTuple_GET_ITEM(torch.flags, i))) return Way::kTorch;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.busy); ++i) {
    if (asks_yes(PyTuple_GET_ITEM(torch.busy, i))) return Way::kTorch;
  }
  if (is_set("WARPFORM_LOG") || is_set("WARPFORM_VALIDATE")) return Way::kTorch;
  if (asks_yes(torch.grad_enabled)) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (parameters[i].kind == Kind::kTensor && placed[i] != nullptr && placed[i] != Py_None &&
          attribute_is_true(placed[i], requires_grad_name)) {
        // In the implementation of another op torch has left autograd behind, and records nothing.
        return asks_yes(torch.autograd_excluded) ? Way::kTorch : Way::kAutograd;
      }
    }
  }
  return Way::kKernels;
}

// ---- results ----

PyObject* tensor_of(const api::Table& table, void* handle) {
  PyObject* capsule = PyCapsule_New(handle, nullptr, nullptr);
  PyObject* tensor = capsule == nullptr ? nullptr : PyObject_CallOneArg(torch.from_handle, capsule);
  Py_XDECREF(capsule);
  if (tensor == nullptr || !torch.frees_handle) table.free_result(handle);
  return tensor;
}

PyObject* results_of(const api::Table& table, void** handles, int count) {
  if (count == 1) return tensor_of(table, handles[0]);
  PyObject* tuple = PyTuple_New(count);
  for (int i = 0; i < count; ++i) {
    PyObject* tensor = tuple == nullptr ? nullptr : tensor_of(table, handles[i]);
    if (tensor == nullptr) {
      if (tuple == nullptr) table.free_result(handles[i]);
      while (++i < count) table.free_result(handles[i]);
      Py_XDECREF(tuple);
      return nullptr;
    }
    PyTuple_SET_ITEM(tuple, i, tensor);
  }
  return tuple;
}

PyObject* exception_of(api::Status status) {
  switch (status) {
    case api::kTypeError: return PyExc_TypeError;
    case api::kValueError: return PyExc_ValueError;
    default: return PyExc_RuntimeError;
  }
}

// ---- the call ----

PyObject* call(PyObject* object, PyObject* const* args, size_t flags, PyObject* names) {
  auto& self = *reinterpret_cast<DirectOp*>(object);
  const std::vector<Parameter>& parameters = *self.parameters;
  const auto fall_back = [&] { return PyObject_Vectorcall(self.fallback, args, flags, names); };

  PyObject* placed[kMostArguments] = {};
  if (!open || !place(self, args, PyVectorcall_NARGS(flags), names, placed)) return fall_back();
  Arguments arguments;
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (placed[i] == nullptr) {
      if (!parameters[i].has_default) return fall_back();
      arguments.values[i] = parameters[i].value;
    } else if (!read(placed[i], parameters[i], static_cast<int>(i), arguments)) {
      return fall_back();
    }
    // The first tensor says at once whether there is anything to do here.
    if (i == 0 && arguments.tensor_count == 1 && !takes(*self.table, arguments.tensors[0])) {
      return fall_back();
    }
  }
  switch (way_of(placed, parameters)) {
    case Way::kTorch: return fall_back();
    case Way::kAutograd: return PyObject_Vectorcall(self.recorded, args, flags, names);
    case Way::kKernels: break;
  }

  void* handles[kMostResults];
  api::Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = self.op->call(arguments.values, handles);
  Py_END_ALLOW_THREADS;
  if (status == api::kDone) return results_of(*self.table, handles, self.op->results);
  if (status == api::kNoKernel) return fall_back();
  PyErr_SetString(exception_of(status), self.table->message());
  return nullptr;
}

void deallocate(PyObject* object) {
  auto* self = reinterpret_cast<DirectOp*>(object);
  PyTypeObject* type = Py_TYPE(object);
  delete self->parameters;
  Py_XDECREF(self->fallback);
  Py_XDECREF(self->recorded);
  PyObject_Free(object);
  Py_DECREF(type);
}

PyObject* describe(PyObject* object) {
  return PyUnicode_FromFormat("<direct call of warpform.%s>", reinterpret_cast<DirectOp*>(object)->op->name);
}

PyTypeObject* direct_type() {
  static PyTypeObject* type = [] {
    static PyMemberDef members[] = {
        {"__vectorcalloffset__", T_PYSSIZET, offsetof(DirectOp, vectorcall), READONLY, nullptr}, {}};
    static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                                  {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
                                  {Py_tp_repr, reinterpret_cast<void*>(describe)},
                                  {Py_tp_members, members},
                                  {0, nullptr}};
    static PyType_Spec spec = {"warpform._C.DirectOp", sizeof(DirectOp), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                               slots};
    auto* made = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    if (made == nullptr) throw py::error_already_set();
    return made;
  }();
  return type;
}

// ---- plans ----

// DLPack's code and bits of a dtype of torch.
std::pair<uint8_t, uint8_t> dtype_of(const std::string& name) {
  static const std::pair<const char*, std::pair<uint8_t, uint8_t>> kCodes[] = {
      {"torch.float16", {2, 16}},   {"torch.bfloat16", {4, 16}},  {"torch.float32", {2, 32}},
      {"torch.float64", {2, 64}},   {"torch.int32", {0, 32}},     {"torch.int64", {0, 64}},
      {"torch.int16", {0, 16}},     {"torch.int8", {0, 8}},       {"torch.uint8", {1, 8}},
      {"torch.uint16", {1, 16}},    {"torch.uint32", {1, 32}},    {"torch.uint64", {1, 64}},
      {"torch.complex32", {5, 32}}, {"torch.complex64", {5, 64}}, {"torch.complex128", {5, 128}},
      {"torch.bool", {6, 8}}};
  for (const auto& [known, code] : kCodes) {
    if (name == known) return code;
  }
  throw py::type_error("launch_plan: a tensor of dtype " + name + " has no plan");
}

struct PlannedTensor {
  std::vector<int64_t> sizes, strides;
};

}  // namespace

void use_torch(py::object tensor_type, py::object parameter_type, py::object grad_enabled, py::object from_handle,
               bool frees_handle, py::object autograd_excluded, py::tuple busy, py::tuple flags) {
  const auto capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* found =
      static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::Exchange::kCapsule));
  if (found == nullptr) throw py::error_already_set();
  while (found != nullptr && found->header.version.major != dlpack::Exchange::kMajor) {
    found = reinterpret_cast<const dlpack::Exchange*>(found->header.previous);
  }
  if (found == nullptr || found->tensor_from_py_object_no_sync == nullptr) {
    throw std::runtime_error("torch's tensors have no DLPack exchange functions of version 1");
  }
  torch = {.tensor_type = tensor_type.release().ptr(),
           .parameter_type = parameter_type.release().ptr(),
           .grad_enabled = grad_enabled.release().ptr(),
           .from_handle = from_handle.release().ptr(),
           .frees_handle = frees_handle,
           .autograd_excluded = autograd_excluded.release().ptr(),
           .busy = busy.release().ptr(),
           .flags = flags.release().ptr()};
  requires_grad_name = PyUnicode_InternFromString("requires_grad");
  is_neg_name = PyUnicode_InternFromString("is_neg");
  exchange = found;
}

void set_open(bool is_open) { open = is_open; }

py::object make_direct(const api::Table* table, const api::Op* op, py::object fallback, py::object recorded) {
  if (exchange == nullptr) throw std::runtime_error("warpform._C: use_torch comes first");
  auto parameters = std::make_unique<std::vector<Parameter>>(parse_schema(op->arguments));
  if (parameters->size() > kMostArguments || op->results > kMostResults) {
    throw std::runtime_error(std::string("warpform._C: too many arguments or results: ") + op->name);
  }
  auto* self = PyObject_New(DirectOp, direct_type());
  if (self == nullptr) throw py::error_already_set();
  self->vectorcall = call;
  self->table = table;
  self->op = op;
  self->positional = 0;
  for (const Parameter& parameter : *parameters) self->positional += !parameter.keyword_only;
  self->parameters = parameters.release();
  self->recorded = (recorded.is_none() ? fallback : recorded).inc_ref().ptr();
  self->fallback = fallback.release().ptr();
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(self));
}

api::Status call_for_plan(const api::Table* table, const api::Op* op, const py::args& args, const py::kwargs& kwargs) {
  const std::vector<Parameter> parameters = parse_schema(op->arguments);
  const auto positional = static_cast<size_t>(
      std::count_if(parameters.begin(), parameters.end(), [](const Parameter& p) { return !p.keyword_only; }));
  if (args.size() > positional) {
    throw py::type_error(std::string("launch_plan: ") + op->name + " takes " + std::to_string(positional) +
                         " positional arguments, got " + std::to_string(args.size()));
  }
  Arguments arguments;
  std::vector<std::unique_ptr<PlannedTensor>> kept;
  size_t used = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& parameter = parameters[i];
    py::object value;
    if (i < args.size() && !parameter.keyword_only) {
      value = args[i];
    } else if (kwargs.contains(parameter.name)) {
      value = kwargs[parameter.name.c_str()];
      ++used;
    } else if (parameter.has_default) {
      arguments.values[i] = parameter.value;
      continue;
    } else {
      throw py::type_error(std::string("launch_plan: ") + op->name + " needs the argument " + parameter.name);
    }
    if (parameter.kind == Kind::kTensor && !value.is_none()) {
      if (!py::hasattr(value, "stride")) {
        throw py::type_error(std::string("launch_plan: ") + parameter.name + " must be a tensor");
      }
      auto tensor = std::make_unique<PlannedTensor>();
      tensor->sizes = value.attr("shape").cast<std::vector<int64_t>>();
      tensor->strides = value.attr("stride")().cast<std::vector<int64_t>>();
      const auto [code, bits] = dtype_of(py::str(value.attr("dtype")));
      api::TensorView& view = arguments.tensors[arguments.tensor_count++];
      view = {.data = nullptr,
              .sizes = tensor->sizes.data(),
              .strides = tensor->strides.data(),
              .dims = static_cast<int32_t>(tensor->sizes.size()),
              .dtype_code = code,
              .dtype_bits = bits,
              .device_type = api::TensorView::kMeta,
              .device_index = 0};
      kept.push_back(std::move(tensor));
      arguments.values[i].kind = api::Value::kTensor;
      arguments.values[i].tensor = &view;
    } else if (!read(value.ptr(), parameter, static_cast<int>(i), arguments)) {
      throw py::type_error(std::string("launch_plan: ") + parameter.name + " has a wrong type");
    }
  }
  if (used != kwargs.size()) {
    throw py::type_error(std::string("launch_plan: ") + op->name + " has no such keyword arguments");
  }
  void* handles[kMostResults] = {};
  const api::Status status = op->call(arguments.values, handles);
  if (status == api::kDone) {
    for (int i = 0; i < op->results; ++i) table->free_result(handles[i]);
  }
  return status;
}

void throw_status(const api::Table* table, api::Status status) {
  if (status == api::kDone) return;
  PyErr_SetString(status == api::kNoKernel ? PyExc_ValueError : exception_of(status), table->message());
  throw py::error_already_set();
}

}  // namespace warpform::python
