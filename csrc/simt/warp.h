// Collectives of a warp without tensor cores: shuffles and votes.
#pragma once

#include <cstdint>

#include "simt/scheduler.h"

namespace warpform::simt {

// Gives the value of lane `source`.
inline uint64_t exchange(Meeting meeting, uint64_t value, int source, const Where& where) {
  Warp& warp = this_warp();
  const int parity = warp.parity;
  warp.values[parity][this_lane()] = value;
  if (meet(meeting, where)) end_meeting(warp);
  return warp.values[parity][source];
}

inline uint32_t vote(bool predicate, const Where& where) {
  Warp& warp = this_warp();
  const int parity = warp.parity;
  if (warp.arrived == 0) warp.votes[parity] = 0;
  warp.votes[parity] |= static_cast<uint32_t>(predicate) << this_lane();
  if (meet(Meeting::kBallot, where)) end_meeting(warp);
  return warp.votes[parity];
}

}  // namespace warpform::simt
