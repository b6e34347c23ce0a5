// warpform._C: what libwarpform.so can do, in Python's types, and direct calls of its ops (direct.h).
//
// It needs no header of torch and links no torch: it takes the table of api.h from the library that registered the ops.
// There is one for each CPython, and it may be absent: then the ops are called through torch, and are slower to call.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <string_view>
#include <vector>

#include "direct.h"
#include "torch/api.h"

// The build defines it; the default serves a compile by hand.
#if __has_include("sources_hash.h")
#include "sources_hash.h"
#else
#define WARPFORM_SOURCES ""
#endif

namespace warpform::python {
namespace {

constexpr std::string_view kSources = WARPFORM_SOURCES;

py::object from_json(const char* text) { return py::module_::import("json").attr("loads")(text); }

// "float16" of torch.float16, or of the text itself.
std::string dtype_name(const py::object& dtype) {
  std::string name = py::str(dtype);
  constexpr std::string_view kPrefix = "torch.";
  return name.starts_with(kPrefix) ? name.substr(kPrefix.size()) : name;
}

class Library {
 public:
  explicit Library(const std::string& path) {
    // The library is in the process already where it registered the ops; otherwise this loads it.
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw py::import_error("warpform._C: " + std::string(dlerror()));
    const auto api = reinterpret_cast<const api::Table* (*)()>(dlsym(handle, "warpform_api_v3"));
    if (api == nullptr) {
      throw py::import_error("warpform._C: " + path + " has no warpform_api_v3: it is an older build");
    }
    table_ = api();
    if (table_->version != api::kVersion) {
      throw py::import_error("warpform._C: " + path + " has version " + std::to_string(table_->version) +
                             " of the table, and this module takes " + std::to_string(api::kVersion));
    }
    // One build makes both. A module of an earlier build, or of another Python's, may know another layout.
    const std::string sources = py::str(build_info()["sources"]);
    if (kSources != "" && sources != kSources) {
      throw py::import_error("warpform._C: " + path + " was built from other sources than this module; build both");
    }
  }

  py::object build_info() const { return from_json(table_->build_info()); }
  py::object kernel_table(const std::string& device) const {
    if (device != "cuda" && device != "cpu") {
      throw py::value_error("kernel_table: device must be cuda or cpu, got " + device);
    }
    return from_json(device == "cpu" ? table_->cpu_kernel_table() : table_->kernel_table());
  }

  std::vector<std::string> ops() const {
    std::vector<std::string> names;
    for (int32_t i = 0; i < table_->op_count; ++i) names.emplace_back(table_->ops[i].name);
    return names;
  }

  py::object direct(const std::string& op, py::object fallback, py::object recorded) const {
    return make_direct(table_, find(op), std::move(fallback), std::move(recorded));
  }

  py::object supported(const std::string& op, const py::object& dtype, const py::object& device,
                       const py::kwargs& sizes) const {
    find(op);
    std::vector<std::string> names;
    std::vector<int64_t> values;
    for (const auto& [name, value] : sizes) {
      names.push_back(name.cast<std::string>());
      values.push_back(value.cast<int64_t>());
    }
    std::vector<const char*> texts;
    for (const std::string& name : names) texts.push_back(name.c_str());
    const std::string name = dtype.is_none() ? "" : dtype_name(dtype);
    int32_t index = warpform::api::kAnyGpu;
    const std::string place = py::str(device);
    if (place == "cpu") {
      index = warpform::api::kCpuDevice;
    } else if (!place.starts_with("cuda")) {
      throw py::value_error("supported: device must be cuda, cuda:N or cpu, got " + place);
    }
    if (const size_t colon = place.find(':'); colon != std::string::npos) index = std::stoi(place.substr(colon + 1));
    const char* reason = table_->supported(op.c_str(), name.empty() ? nullptr : name.c_str(), index,
                                           static_cast<int32_t>(values.size()), texts.data(), values.data());
    return reason == nullptr ? py::object(py::none()) : py::str(reason);
  }

  py::object launch_plan(const std::string& op, const py::args& args, py::kwargs kwargs) const {
    const auto take = [&](const char* name, int otherwise) {
      return kwargs.contains(name) ? kwargs.attr("pop")(name).cast<int>() : otherwise;
    };
    // An H100's or H200's.
    const api::Machine machine{.sm_count = take("sm_count", 132),
                               .shared_memory_limit = take("shared_memory_limit", 227 * 1024),
                               .capability = take("capability", 90)};
    if (machine.sm_count < 1 || machine.shared_memory_limit < 0 || machine.capability < 0) {
      throw py::value_error(
          "launch_plan: sm_count must be at least 1, shared_memory_limit and capability not negative");
    }
    const api::Op* entry = find(op);
    if (table_->begin_plan == nullptr) throw py::value_error("launch_plan: the emulator's library has no plans");
    api::Status status = api::kDone;
    table_->begin_plan(&machine);
    try {
      status = call_for_plan(table_, entry, args, kwargs);
    } catch (...) {
      table_->end_plan();
      throw;
    }
    const std::string text = table_->end_plan();
    throw_status(table_, status);
    const py::list launches = from_json(text.c_str());
    py::dict plan;
    // The first launch that works on tiles stands for the op, or the first.
    for (const auto& launch : launches) {
      if (!launch["tile"].is_none()) {
        plan = launch.attr("copy")();
        break;
      }
    }
    if (plan.empty() && !launches.empty()) plan = launches[0].attr("copy")();
    plan["launches"] = launches;
    return plan;
  }

 private:
  const api::Op* find(const std::string& name) const {
    for (int32_t i = 0; i < table_->op_count; ++i) {
      if (name == table_->ops[i].name) return &table_->ops[i];
    }
    throw py::value_error("warpform has no op " + name);
  }

  const api::Table* table_;
};

}  // namespace
}  // namespace warpform::python

PYBIND11_MODULE(_C, m) {
  using warpform::python::Library;
  namespace py = pybind11;
  m.doc() = "Facts about warpform's kernels, plans of their launches, and direct calls of the ops.";

  py::class_<Library>(m, "Library", "What a library of warpform offers: the package's own, or the emulator's.")
      .def(py::init<const std::string&>(), py::arg("path"))
      .def("ops", &Library::ops, "The names of the ops.")
      .def("direct", &Library::direct, py::arg("op"), py::arg("fallback"), py::arg("recorded") = py::none(),
           "A call of the op past torch's dispatcher. fallback gets the arguments where the dispatcher is needed, and "
           "recorded where only gradients are wanted; None: fallback then too.")
      .def("build_info", &Library::build_info,
           "The facts of the build, a dict of texts: version, cuda, cuda_runtime, cuda_archs, hopper, torch_headers, "
           "compiler, sources.")
      .def("kernel_table", &Library::kernel_table, py::arg("device") = "cuda",
           "Every configuration that has a kernel: a list of dicts with op, dtype and the bounds of sizes.\n\n"
           "device: \"cuda\", or \"cpu\" for the kernels of this process's CPU. Raises ValueError for another.")
      .def("supported", &Library::supported, py::arg("op"), py::arg("dtype") = py::none(), py::arg("device") = "cuda",
           "Why no kernel serves an op, or None where one does.\n\n"
           "dtype: torch's or its name, None for any. device: \"cuda\" asks about CUDA kernels in general, \"cuda:0\" "
           "about that GPU and its driver too, \"cpu\" about this process's CPU. sizes: by the names of "
           "kernel_table(), such as head_dim=64; other names do "
           "not count. Raises ValueError for an op or a device that warpform does not have.")
      .def(
          "launch_plan", &Library::launch_plan, py::arg("op"),
          "What a call of torch.ops.warpform.OP with these arguments would launch.\n\n"
          "The arguments are the op's; of tensors only shape, strides and dtype are looked at, so they may be on any "
          "device, \"meta\" too. sm_count, shared_memory_limit (bytes a block) and capability (9.0 as 90) describe "
          "the GPU, an H100 by default.\n\n"
          "Returns a dict about the first launch that works on tiles, or the first: kernel, tile (rows, columns, "
          "depth), stages, splits, grid, threads, shared_bytes, blocks_per_sm, registers_counted (whether a GPU said "
          "how many blocks an SM takes; else threads and shared memory bound it), waves; and launches, a list with one "
          "such dict for each. Where nothing is launched it has launches alone. Raises ValueError with the reason "
          "where there is no kernel.");
  m.def("use_torch", &warpform::python::use_torch, py::arg("tensor_type"), py::arg("parameter_type"),
        py::arg("grad_enabled"), py::arg("from_handle"), py::arg("frees_handle"), py::arg("autograd_excluded"),
        py::arg("busy"), py::arg("flags"), "Takes what direct calls need of torch; once, before any.");
  m.def("set_open", &warpform::python::set_open, py::arg("open"), "False: every call goes through torch.");

  // `import warpform._C` imports the package first, which registers the ops.
  const py::module_ package = py::module_::import("warpform._library");
  package.attr("require")();
  const py::object library = py::cast(Library(py::str(package.attr("library_path")())));
  m.attr("library") = library;
  for (const char* name : {"build_info", "kernel_table", "supported", "launch_plan"}) {
    m.attr(name) = library.attr(name);
  }
}
