// What the emulator's library offers to its Python module (csrc/python/simt): one C symbol, which returns this table.
#pragma once

#include <cstdint>

namespace warpform::simt {

struct Control {
  // Both return null, or what is wrong.
  const char* (*configure)(int64_t seed, int64_t sm_count, int64_t shared_memory_limit);
  const char* (*claim)(int64_t driver, int64_t capability, const char* code, bool tensor_maps);
  // The launches since the last configure, JSON: [{"op", "kernel", "grid", "threads", "shared_bytes"}].
  const char* (*launches)();
};

}  // namespace warpform::simt

extern "C" const warpform::simt::Control* warpform_simt_control_v1();
