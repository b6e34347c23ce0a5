#include "cpu.h"

#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <new>

#include "launch.h"

namespace warpform {
namespace {

// Blocks of memory that a thread used and keeps. A kernel takes two or three at a time.
class KeptMemory {
 public:
  ~KeptMemory() {
    for (const Block& block : blocks_) std::free(block.data);
  }

  void* take(size_t bytes) {
    if (bytes == 0) bytes = 1;
    // The smallest free block that is large enough; else a free one is replaced.
    Block* found = nullptr;
    for (Block& block : blocks_) {
      if (block.taken || block.bytes < bytes) continue;
      if (found == nullptr || block.bytes < found->bytes) found = &block;
    }
    if (found == nullptr) {
      for (Block& block : blocks_) {
        if (!block.taken && (found == nullptr || block.bytes < found->bytes)) found = &block;
      }
      if (found == nullptr) throw std::bad_alloc();  // more blocks at once than any kernel takes
      std::free(found->data);
      *found = {};
      const size_t size = (bytes + kRound - 1) / kRound * kRound;
      found->data = std::aligned_alloc(64, size);
      if (found->data == nullptr) throw std::bad_alloc();
      ask_for_huge_pages(found->data, size);
      found->bytes = size;
    }
    found->taken = true;
    return found->data;
  }

  void give(void* data) {
    size_t kept = 0;
    for (const Block& block : blocks_) kept += block.taken ? 0 : block.bytes;
    for (Block& block : blocks_) {
      if (!block.taken || block.data != data) continue;
      block.taken = false;
      if (kept + block.bytes > kKept) {
        std::free(block.data);
        block = {};
      }
      return;
    }
  }

 private:
  static constexpr size_t kRound = 64 << 10;
  static constexpr size_t kKept = 64 << 20;  // of all blocks; what is more goes back to the system
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
    bool taken = false;
  };
  Block blocks_[6];
};

thread_local KeptMemory kept_memory;

int64_t threads() {
  uint32_t count = 1;
  torch_check(torch_get_num_threads(&count), "warpform");
  return count;
}

void run(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch_check(torch_parallel_for(0, n, 1, body, context), "warpform");
}

}  // namespace

const cpu::Host& torch_host() {
  static constexpr cpu::Host kHost{.threads = threads,
                                   .run = run,
                                   .take = [](size_t bytes) { return kept_memory.take(bytes); },
                                   .give = [](void* memory) { kept_memory.give(memory); }};
  return kHost;
}

const char* cpu_kernels_unusable() {
  if (reference_requested()) return "WARPFORM_BACKEND=reference";
  return cpu::kernels_missing();
}

}  // namespace warpform
