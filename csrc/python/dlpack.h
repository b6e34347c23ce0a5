// The part of DLPack's stable C interface that this module uses: how it reads a tensor of torch without torch's headers.
// Layouts as DLPack 1.x defines them (dmlc/dlpack, dlpack.h).
#pragma once

#include <cstdint>

namespace warpform::dlpack {

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

// What a framework's tensor class has in its attribute __dlpack_c_exchange_api__, a capsule of the name kCapsule. The
// functions that are not called here have no type.
struct Exchange {
  static constexpr const char* kCapsule = "dlpack_exchange_api";
  static constexpr uint32_t kMajor = 1;

  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Fills `out` with what stays valid while the object lives, waits for nothing, returns 0 or sets a Python error.
  int (*tensor_from_py_object_no_sync)(void* object, Tensor* out);
  void* current_work_stream;
};

}  // namespace warpform::dlpack
