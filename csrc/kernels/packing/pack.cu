// Instantiations and launch of gather_rows: vector width x index type.
#include "packing/pack.cuh"

#include <algorithm>
#include <cstdint>

#include "device/launch.cuh"

namespace warpform {
namespace {

constexpr const char* kName = "gather_rows";
constexpr int64_t kMaxGridY = 65535;

template <class V, class Index>
void launch_as(const GatherRowsParams& p, void* stream) {
  GatherRows g{p, p.row_bytes / static_cast<int64_t>(sizeof(V)), 0};
  if (g.vectors > kWarpSize) {
    const int64_t row_blocks = ceil_div(p.out_rows, int64_t{kGatherWarps});
    const int64_t column_blocks = std::min(ceil_div(g.vectors, int64_t{kGatherLoads * kWarpSize}), kMaxGridY);
    launch<gather_long_rows<V, Index>>(kName,
                                       dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(column_blocks)),
                                       kGatherThreads, 0, stream, g);
    return;
  }
  while ((1 << g.log2_row_lanes) < g.vectors) ++g.log2_row_lanes;
  const int64_t rows_a_block = int64_t{kGatherThreads >> g.log2_row_lanes} * kGatherLoads;
  launch<gather_short_rows<V, Index>>(kName, dim3(static_cast<unsigned>(ceil_div(p.out_rows, rows_a_block))),
                                      kGatherThreads, 0, stream, g);
}

template <class V>
void launch_with(const GatherRowsParams& p, void* stream) {
  if (p.index_bytes == 8) {
    launch_as<V, int64_t>(p, stream);
  } else {
    launch_as<V, int32_t>(p, stream);
  }
}

}  // namespace

void launch_gather_rows(const GatherRowsParams& p, void* stream) {
  if (p.out_rows == 0 || p.row_bytes == 0) return;
  // The lowest set bit of all of these is what every row's address is a multiple of.
  const uint64_t together = reinterpret_cast<uintptr_t>(p.in) | reinterpret_cast<uintptr_t>(p.out) |
                            static_cast<uint64_t>(p.row_bytes) | static_cast<uint64_t>(p.in_stride) | 16;
  switch (together & (~together + 1)) {
    case 16: return launch_with<uint4>(p, stream);
    case 8: return launch_with<uint2>(p, stream);
    case 4: return launch_with<uint32_t>(p, stream);
    case 2: return launch_with<uint16_t>(p, stream);
    default: return launch_with<uint8_t>(p, stream);
  }
}

}  // namespace warpform
