// Dispatch of the attention kernels of compute capability 9.0: head dimension and element type to the file that has
// their kernels.
#include "attention/hopper/launch.h"

#include "attention/hopper/tiles.cuh"
#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {

bool launch_varlen_attention_hopper(const AttentionForwardParams& params, void* stream) {
  const AttentionProblem& p = params.problem;
  // Up to 64 queries half of a tile or more would be empty; and with fewer tiles than half of the SMs, tiles of 64
  // queries on mma.sync, which are twice as many, take no longer. The rule is by counts; it is not measured.
  if (p.max_seqlen_q <= 64 || 2 * forward_hopper_tiles(p, HopperTile128::kBlockM) < sm_count()) return false;
  return dispatch_half(p.dtype, [&]<class T>() {
    switch (p.head_dim) {
      case 64: return launch_forward_hopper<64, T>(params, stream);
      case 128: return launch_forward_hopper<128, T>(params, stream);
      default: return false;
    }
  });
}

}  // namespace warpform
