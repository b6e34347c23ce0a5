#include "simt/bulk.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "simt/global_memory.h"
#include "simt/mbarrier.h"
#include "simt/shared_memory.h"
#include "simt/tensor_map.h"

namespace warpform::simt {
namespace {

struct BulkCopy {
  TensorBox tensor;
  int64_t at[3];
  uint32_t to;
  int barrier;
  int bytes;
  int thread;
  Where where;
};
std::vector<BulkCopy> copies;

const TensorBox& tensor_of(const TensorMap& map, const Where& where) {
  const auto& emulated = reinterpret_cast<const EmulatedTensorMap&>(map);
  if (emulated.magic != EmulatedTensorMap::kMagic) fail("a bulk copy reads a description that was not encoded;", where);
  return emulated.tensor;
}

int bytes_of(const TensorBox& t) {
  int bytes = 2;
  for (int i = 0; i < t.rank; ++i) bytes *= t.box[i];
  return bytes;
}

// Reads row (y, z) of the box: what lies outside of the tensor is zeros.
void read_row(const BulkCopy& copy, int y, int z, uint16_t* row) {
  const TensorBox& t = copy.tensor;
  const int64_t at[3] = {copy.at[0], copy.at[1] + y, copy.at[2] + z};
  std::memset(row, 0, static_cast<size_t>(t.box[0]) * 2);
  const auto* from = static_cast<const uint16_t*>(t.data);
  for (int i = 1; i < t.rank; ++i) {
    if (at[i] < 0 || at[i] >= t.sizes[i]) return;
    from += at[i] * t.strides[i - 1];
  }
  const int64_t first = std::max<int64_t>(at[0], 0), end = std::min(at[0] + t.box[0], t.sizes[0]);
  if (first >= end) return;
  const size_t bytes = static_cast<size_t>(end - first) * 2;
  check_global(from + first, bytes, 2, Access::kRead, copy.where);
  std::memcpy(row + (first - at[0]), from + first, bytes);
}

void land(const BulkCopy& copy) {
  const TensorBox& t = copy.tensor;
  const int rows = t.rank > 1 ? t.box[1] : 1, planes = t.rank > 2 ? t.box[2] : 1;
  const Time now = ++block.now;
  alignas(16) uint16_t row[256];
  uint32_t to = copy.to;
  for (int z = 0; z < planes; ++z) {
    for (int y = 0; y < rows; ++y) {
      read_row(copy, y, z, row);
      for (int x = 0; x < t.box[0]; x += 8, to += 16) {
        end_bulk_copy(swizzled(to, t.swizzle), row + x, kFirstMbarrier + copy.barrier, now, copy.where);
      }
    }
  }
  complete_on_mbarrier(copy.barrier, copy.bytes, copy.where);
}

}  // namespace

void clear_copies() { copies.clear(); }

void check_tensor_map(const TensorMap& map, const Where& where) { tensor_of(map, where); }

void begin_bulk_copy(uint32_t to, const TensorMap& map, uint32_t barrier, const int (&at)[3], int rank,
                     const Where& where) {
  const TensorBox& t = tensor_of(map, where);
  if (t.rank != rank) {
    fail("tma_load: " + std::to_string(rank) + " coordinates for a tensor of " + std::to_string(t.rank) + " dimensions",
         where);
  }
  if (to % 128 != 0) {
    fail("tma_load: the destination must be 128-byte aligned, got address " +
             std::to_string(static_cast<int64_t>(to) - kSharedBase),
         where);
  }
  const BulkCopy copy{.tensor = t,
                      .at = {at[0], at[1], at[2]},
                      .to = to,
                      .barrier = mbarrier_of_copy(barrier, where),
                      .bytes = bytes_of(t),
                      .thread = this_thread(),
                      .where = where};
  // The addresses of a box of whole patterns are the same with and without the swizzle, in another order.
  for (uint32_t i = 0; i < static_cast<uint32_t>(copy.bytes); i += 16) {
    begin_bulk_copy_to(swizzled(to + i, t.swizzle), where);
  }
  copies.push_back(copy);
}

void fence_proxy() { block.fibre[this_thread()].proxy_fences.push_back(++block.now); }

bool copies_in_flight() { return !copies.empty(); }

void land_a_copy() {
  const size_t i = draw(static_cast<uint32_t>(copies.size()));
  const BulkCopy copy = copies[i];
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
  // Reports are about the thread that issued it; afterwards the running thread is the one that was.
  const int thread = this_thread();
  speak_for(copy.thread);
  land(copy);
  speak_for(thread);
}

}  // namespace warpform::simt
