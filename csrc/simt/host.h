// Calls of the torch bindings to the emulator (the bindings are compiled a second time for it, with WARPFORM_SIMT).
#pragma once

#include <cstddef>

namespace warpform::simt {

// Between these two, launches run in the emulator and may touch only what register_memory named. Nothing else is
// reachable.
void begin_launches(const char* op);
void end_launches() noexcept;
void register_memory(const void* p, size_t bytes, bool writable);

}  // namespace warpform::simt
