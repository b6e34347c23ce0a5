#include "simt/copies.h"

#include "simt/global_memory.h"
#include "simt/scheduler.h"
#include "simt/shared_memory.h"

namespace warpform::simt {

void begin_copy(uint32_t to, const void* from, bool valid, const Where& where) {
  if (valid) check_global(from, 16, 16, Access::kRead, where);
  begin_shared_copy(to, where);
  Copies& copies = block.fibre[this_thread()].copies;
  copies.pending.push_back({valid ? from : nullptr, to, copies.group, where});
}

void commit_copies() { ++block.fibre[this_thread()].copies.group; }

void wait_for_copies(int groups_left, const Where& where) {
  (void)where;
  Copies& copies = block.fibre[this_thread()].copies;
  size_t done = 0;
  while (done < copies.pending.size() &&
         copies.pending[done].group + static_cast<uint32_t>(groups_left) < copies.group) {
    const Copies::Copy& copy = copies.pending[done++];
    end_shared_copy(copy.to, copy.from, copy.where);
  }
  if (done == copies.pending.size()) {
    copies.pending.clear();
  } else {
    copies.pending.erase(copies.pending.begin(), copies.pending.begin() + static_cast<std::ptrdiff_t>(done));
  }
}

}  // namespace warpform::simt
