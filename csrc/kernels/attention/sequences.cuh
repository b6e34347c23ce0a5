// Finds the sequence and the tile of a CTA by its number, in a search over cumulative tile counts. These follow from
// cu_seqlens and are never materialised: sequence b begins at slot cu_seqlens[b] / kBlock + b + 1. That leaves every
// sequence at least ceil(length / kBlock) slots and at most one more, so a launch of slots(total, batch) CTAs has tiles
// only for tokens that exist, and less than two empty slots a sequence. It needs no second kernel, no workspace, and
// nothing that the host reads back.
//
// The rows that belong to no sequence (past cu_seqlens[batch], or before cu_seqlens[0]) are found as sequences `batch`
// and -1, so that their results are written too.
#pragma once

#include "device/memory.cuh"
#include "device/ptx.cuh"

namespace warpform {

template <int kBlock>
__host__ __device__ constexpr int slots(int total, int batch) {
  return total / kBlock + batch + 2;
}

// Offset b in [-1, batch + 1], kept inside [0, total] whatever the tensor holds; -1 begins at 0, batch + 1 at total.
__device__ __forceinline__ int sequence_begin(const int32_t* cu_seqlens, int batch, int total, int b) {
  if (b < 0) return 0;
  if (b > batch) return total;
  const int begin = load_global(cu_seqlens + b);
  return begin < 0 ? 0 : begin > total ? total : begin;
}

// Sequences laid end to end, anywhere.
struct PackedSequences {
  const int32_t* cu_seqlens;
  int batch;
  int total;
  __device__ __forceinline__ int begin(int b) const { return sequence_begin(cu_seqlens, batch, total, b); }
};

// The same, or without cu_seqlens sequences that all have `length` rows.
struct Sequences {
  const int32_t* cu_seqlens;
  int batch;
  int total;
  int length;
  __device__ __forceinline__ int begin(int b) const {
    if (cu_seqlens != nullptr) return sequence_begin(cu_seqlens, batch, total, b);
    return min(max(b, 0), batch) * length;
  }
};

struct SequenceTile {
  int sequence;  // -1 or batch: rows of no sequence
  int begin;     // first row of the sequence
  int length;    // rows of the sequence
  int index;  // the tile's number in the sequence; the slot is empty where index * kBlock >= length, unless length is 0
};

// All lanes of a warp call it together: 32 offsets are looked at in one step.
template <int kBlock, class AnySequences>
__device__ __forceinline__ SequenceTile find_tile(const AnySequences& sequences, int slot) {
  int low = -1, high = sequences.batch + 1;  // the sequence is in [low, high)
  while (high - low > 1) {
    const int step = ceil_div(high - low, kWarpSize);
    const int probe = low + (lane_id() + 1) * step;
    const bool starts_before = probe < high && sequences.begin(probe) / kBlock + probe + 1 <= slot;
    low += popcount(ballot(starts_before)) * step;
    high = high < low + step ? high : low + step;
  }
  const int begin = sequences.begin(low);
  const int length = sequences.begin(low + 1) - begin;
  const int first_slot = low < 0 ? 0 : begin / kBlock + low + 1;
  return {low, begin, length > 0 ? length : 0, slot - first_slot};
}

}  // namespace warpform
