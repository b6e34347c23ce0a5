// _simt: control of the emulator, for tests. It is never in a wheel.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <string>

#include "simt/control.h"

namespace py = pybind11;
using warpform::simt::Control;

namespace {

const Control* control = nullptr;

const Control& emulator() {
  if (control == nullptr) throw std::runtime_error("_simt: load comes first");
  return *control;
}

void check(const char* problem) {
  if (problem != nullptr) throw py::value_error("_simt: " + std::string(problem));
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.doc() = "Control of the emulator of warpform's kernels.";
  m.def(
      "load",
      [](const std::string& path) {
        void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr) throw py::import_error("_simt: " + std::string(dlerror()));
        const auto get = reinterpret_cast<const Control* (*)()>(dlsym(handle, "warpform_simt_control_v1"));
        if (get == nullptr) throw py::import_error("_simt: " + path + " is not the emulator, or an older build");
        control = get();
      },
      py::arg("path"), "Takes the emulator's library, libwarpform_simt.so.");
  m.def(
      "configure",
      [](int64_t seed, int64_t sm_count, int64_t shared_memory_limit) {
        check(emulator().configure(seed, sm_count, shared_memory_limit));
      },
      py::arg("seed"), py::arg("sm_count") = 4, py::arg("shared_memory_limit") = 227 * 1024,
      "Sets the order of threads and blocks that the next launches see (0: the plain one), the number of "
      "multiprocessors that a kernel finds, and the bytes of shared memory that a block may have. Forgets launches.");
  m.def(
      "claim",
      [](int64_t driver, int64_t capability, const std::string& code, bool tensor_maps) {
        check(emulator().claim(driver, capability, code.c_str(), tensor_maps));
      },
      py::arg("driver") = 13000, py::arg("capability") = 90, py::arg("code") = "found", py::arg("tensor_maps") = true,
      "The machine's facts until the next configure: versions of CUDA as 13000, a compute capability as 90, and "
      "whether there is code for it: found, none, unreadable or unknown; tensor_maps: whether the driver describes "
      "tensors for TMA.");
  m.def(
      "launches", [] { return py::module_::import("json").attr("loads")(emulator().launches()); },
      "The launches since the last configure: a list of dicts with op, kernel, grid, threads and shared_bytes.");
}
