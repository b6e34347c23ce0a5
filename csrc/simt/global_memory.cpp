#include "simt/global_memory.h"

#include <algorithm>
#include <vector>

namespace warpform::simt {

Extent last_extent{0, 0, false};

namespace {

std::vector<Extent> extents;  // sorted and apart, once settled

// Says where p lies relative to the nearest extent.
std::string place_of(uintptr_t p) {
  if (extents.empty()) return "nothing is registered";
  const Extent* nearest = &extents[0];
  uintptr_t best = UINTPTR_MAX;
  for (const Extent& e : extents) {
    const uintptr_t distance = p < e.begin ? e.begin - p : p >= e.end ? p - e.end + 1 : 0;
    if (distance < best) {
      best = distance;
      nearest = &e;
    }
  }
  const std::string size = "of " + std::to_string(nearest->end - nearest->begin) + " bytes";
  if (p < nearest->begin) return std::to_string(nearest->begin - p) + " bytes before the nearest tensor, " + size;
  if (p >= nearest->end) return std::to_string(p - nearest->end) + " bytes past the end of the nearest tensor, " + size;
  return "byte " + std::to_string(p - nearest->begin) + " of a tensor " + size;
}

}  // namespace

void check_global_slow(uintptr_t p, size_t bytes, size_t alignment, Access access, const Where& where) {
  const char* verb = access == Access::kRead ? "load of " : access == Access::kWrite ? "store of " : "atomic on ";
  const std::string what = std::string("global ") + verb + std::to_string(bytes) + " bytes";
  if (p % alignment != 0) fail("misaligned " + what + " (" + place_of(p) + ")", where);
  const auto after = std::upper_bound(extents.begin(), extents.end(), p,
                                      [](uintptr_t address, const Extent& e) { return address < e.begin; });
  if (after == extents.begin() || p + bytes > (after - 1)->end || p >= (after - 1)->end) {
    fail("out-of-bounds " + what + " (" + place_of(p) + ")", where);
  }
  const Extent& hit = *(after - 1);
  if (access != Access::kRead && !hit.writable) fail(what + " in a read-only tensor (" + place_of(p) + ")", where);
  last_extent = hit;
}

void clear_extents() {
  extents.clear();
  last_extent = {0, 0, false};
}

void add_extent(const void* p, size_t bytes, bool writable) {
  if (bytes == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  extents.push_back({begin, begin + bytes, writable});
}

void settle_extents() {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  std::vector<Extent> joined;
  for (const Extent& e : extents) {
    // Tensors that only touch stay apart: no single access may span two of them.
    if (!joined.empty() && e.begin < joined.back().end) {
      joined.back().end = std::max(joined.back().end, e.end);
      joined.back().writable = joined.back().writable || e.writable;
    } else {
      joined.push_back(e);
    }
  }
  extents.swap(joined);
  last_extent = {0, 0, false};
}

}  // namespace warpform::simt
