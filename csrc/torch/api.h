// What libwarpform.so offers to code that is not torch: one C symbol, which returns a table of the ops and of facts about
// them. warpform._C (csrc/python) takes that table. It needs no header of torch or of CUDA, and the layout of what it
// finds here changes with kVersion only.
#pragma once

#include <cstdint>

namespace warpform::api {

inline constexpr int32_t kVersion = 3;

// A tensor that its caller keeps alive during a call. dtype and device are those of DLPack; kMeta is a tensor without
// data, for plans.
struct TensorView {
  static constexpr int32_t kCpu = 1, kCuda = 2, kMeta = -1;

  void* data;
  const int64_t* sizes;
  const int64_t* strides;  // in elements
  int32_t dims;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  int32_t device_type;
  int32_t device_index;
};

// One argument.
struct Value {
  enum Kind : int32_t { kNone, kTensor, kInt, kFloat, kBool, kText, kInts };

  Kind kind = kNone;
  int32_t count = 0;  // of integers
  union {
    const TensorView* tensor;
    int64_t integer;  // a bool too
    double number;
    const char* text;
    const int64_t* integers;
  };
};

enum Status : int32_t {
  kDone,
  kNoKernel,  // the PyTorch reference has to run; message() says why
  kTypeError,
  kValueError,
  kRuntimeError,
};

struct Op {
  const char* name;
  const char* arguments;  // as torch writes a schema: "Tensor q, float? scale=None"
  int32_t results;
  // Checks the arguments, allocates the results and launches. `results` receives that many handles of torch tensors,
  // which the caller owns.
  Status (*call)(const Value* arguments, void** results);
};

// The machine that a plan is made for.
struct Machine {
  int32_t sm_count;
  int32_t shared_memory_limit;  // bytes that a block may ask for
  int32_t capability;           // compute capability, 10 * major + minor
};

// Devices that a question may be about, beside the number of a GPU.
inline constexpr int32_t kAnyGpu = -1, kCpuDevice = -2;

struct Table {
  int32_t version;
  uint32_t device_types;  // of the tensors that its kernels take: bit kCpu, bit kCuda
  int32_t op_count;
  const Op* ops;
  // Frees a handle that a call returned.
  void (*free_result)(void* handle);
  // The text that belongs to the last status of this thread that was not kDone.
  const char* (*message)();
  // As the ops _build_info and _kernel_table return them: JSON.
  const char* (*build_info)();
  const char* (*kernel_table)();
  // As kernel_table, of the kernels for the CPU of this process: none where it has no instruction set with kernels.
  const char* (*cpu_kernel_table)();
  // Why no kernel serves a call of these sizes, or null. device: of a GPU; kAnyGpu: CUDA kernels in general; kCpuDevice.
  const char* (*supported)(const char* op, const char* dtype, int32_t device, int32_t count, const char* const* names,
                           const int64_t* sizes);
  // Between the two, calls in this thread launch nothing and keep what they would launch; the second returns it as JSON.
  // Both are null in the emulator's library, which has no plans.
  void (*begin_plan)(const Machine* machine);
  const char* (*end_plan)();
};

}  // namespace warpform::api

extern "C" const warpform::api::Table* warpform_api_v3();
