// Asynchronous copies: they are done when their thread waits for them and not before. Until then their destination
// counts as never written, so a kernel that reads too early is caught whatever the order of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "simt/report.h"

namespace warpform::simt {

// The copies of one thread that are in flight.
struct Copies {
  struct Copy {
    const void* from;  // null: zeros
    uint32_t to;
    uint32_t group;
    Where where;
  };
  std::vector<Copy> pending;  // oldest first
  uint32_t group = 0;         // the group that the next copy joins

  void clear() {
    pending.clear();
    group = 0;
  }
};

void begin_copy(uint32_t to, const void* from, bool valid, const Where& where);
void commit_copies();
void wait_for_copies(int groups_left, const Where& where);

}  // namespace warpform::simt
