// The threads and the memory that CPU kernels ask of the process that they run in. csrc/torch/cpu.cpp gives them torch's threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace warpform::cpu {

struct Host {
  // The threads that `run` uses at most.
  int64_t (*threads)();
  // Calls body on parts of [0, n) that together are all of it, in threads, and returns when all have returned.
  void (*run)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);
  // Memory of the calling thread, aligned to 64 bytes; throws std::bad_alloc. The same thread gives it back.
  void* (*take)(size_t bytes);
  void (*give)(void* memory);
};

}  // namespace warpform::cpu
