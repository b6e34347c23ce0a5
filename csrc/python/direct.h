// Direct calls of ops: Python's arguments to the table of libwarpform.so without torch's dispatcher, where nothing needs
// it, and otherwise to a Python function that goes through it.
#pragma once

#include <pybind11/pybind11.h>

#include "torch/api.h"

namespace warpform::python {

namespace py = pybind11;

// What direct calls need of torch. Functions of torch are called without arguments.
struct Torch {
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  PyObject* grad_enabled = nullptr;       // whether gradients are recorded
  PyObject* from_handle = nullptr;        // makes a tensor of the capsule of a handle
  bool frees_handle = false;              // whether that frees the handle
  PyObject* autograd_excluded = nullptr;  // whether the thread is below autograd
  PyObject* busy = nullptr;               // a tuple of functions; each says whether something needs the dispatcher
  PyObject* flags = nullptr;              // a tuple of (a module's dict, a name, the value while nothing does)
};

// Takes torch's functions, once, before any direct call. Throws where torch's tensors have no DLPack exchange functions
// of a version that is known.
void use_torch(py::object tensor_type, py::object parameter_type, py::object grad_enabled, py::object from_handle,
               bool frees_handle, py::object autograd_excluded, py::tuple busy, py::tuple flags);

// False: every call goes to its fallback.
void set_open(bool open);

// A callable of an op's arguments. `fallback` is called with the same arguments where the direct way is not open, and
// `recorded` where only gradients are wanted; None: `fallback` then too.
py::object make_direct(const api::Table* table, const api::Op* op, py::object fallback, py::object recorded);

// Calls an op under a plan, with tensors of the shapes and dtypes of the arguments and without data.
api::Status call_for_plan(const api::Table* table, const api::Op* op, const py::args& args, const py::kwargs& kwargs);

// Throws the Python exception of a status that is one.
void throw_status(const api::Table* table, api::Status status);

}  // namespace warpform::python
