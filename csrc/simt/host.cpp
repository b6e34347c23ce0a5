#include "simt/host.h"

#include <mutex>

#include "simt/global_memory.h"
#include "simt/scheduler.h"

namespace warpform::simt {
namespace {
// There is one machine; ops called from several threads take turns.
std::recursive_mutex machine;
int depth = 0;
}  // namespace

void begin_launches(const char* op) {
  machine.lock();
  if (depth++ == 0) {
    clear_extents();
    begin_op(op);
  }
}

void end_launches() noexcept {
  if (--depth == 0) clear_extents();
  machine.unlock();
}

void register_memory(const void* p, size_t bytes, bool writable) { add_extent(p, bytes, writable); }

}  // namespace warpform::simt
