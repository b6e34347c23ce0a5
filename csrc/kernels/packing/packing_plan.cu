// Instantiations and launch of packing_plan: size of a mask element x rows to a warp or to a block.
#include "packing/packing_plan.cuh"

#include <algorithm>

#include "device/launch.cuh"

namespace warpform {
namespace {

constexpr const char* kName = "packing_plan";
// Rows of more tokens than this are a block's: from here on a warp would need more steps than a block takes to
// synchronise.
constexpr int64_t kWarpRow = 1024;

template <int kBytes, int kRowWarps>
void launch_as(const PackingPlanParams& p, void* stream) {
  const int64_t row_blocks = ceil_div(p.batch, int64_t{kPlanWarps / kRowWarps});
  launch<count_rows<kBytes, kRowWarps>>(kName, dim3(static_cast<unsigned>(row_blocks)), kPlanThreads, kPlanSharedBytes,
                                        stream, p);
  launch<scan_lengths>(kName, dim3(1), kScanThreads, kScanSharedBytes, stream, p);
  const int64_t fill_blocks = std::min(ceil_div(p.capacity, int64_t{4 * kPlanThreads}), int64_t{4} * sm_count());
  launch<rank_rows<kBytes, kRowWarps>>(kName, dim3(static_cast<unsigned>(row_blocks + fill_blocks)), kPlanThreads,
                                       kPlanSharedBytes, stream, RankRows{p, row_blocks});
}

template <int kBytes>
void launch_with(const PackingPlanParams& p, void* stream) {
  if (p.seqlen > kWarpRow) {
    launch_as<kBytes, kPlanWarps>(p, stream);
  } else {
    launch_as<kBytes, 1>(p, stream);
  }
}

}  // namespace

void launch_packing_plan(const PackingPlanParams& p, void* stream) {
  switch (p.mask_bytes) {
    case 8: return launch_with<8>(p, stream);
    case 4: return launch_with<4>(p, stream);
    default: return launch_with<1>(p, stream);
  }
}

}  // namespace warpform
