// Global memory: what the bindings registered and nothing else may be touched.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt/report.h"

namespace warpform::simt {

enum class Access : uint8_t { kRead, kWrite, kAtomic };

struct Extent {
  uintptr_t begin;
  uintptr_t end;
  bool writable;
};

// The extent that the last access hit: nearly always the next one's.
extern Extent last_extent;
void check_global_slow(uintptr_t p, size_t bytes, size_t alignment, Access access, const Where& where);

// Fails unless [p, p + bytes) lies in one extent that allows the access, p being a multiple of alignment.
inline void check_global(const void* pointer, size_t bytes, size_t alignment, Access access, const Where& where) {
  const uintptr_t p = reinterpret_cast<uintptr_t>(pointer);
  const bool inside = p >= last_extent.begin && p + bytes <= last_extent.end;
  if (__builtin_expect(inside && p % alignment == 0 && (last_extent.writable || access == Access::kRead), true)) return;
  check_global_slow(p, bytes, alignment, access, where);
}

void clear_extents();
void add_extent(const void* p, size_t bytes, bool writable);
// Sorts what was added and joins what overlaps; before a launch.
void settle_extents();

}  // namespace warpform::simt
