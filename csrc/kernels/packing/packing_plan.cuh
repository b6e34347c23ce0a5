// packing_plan: where the tokens of a [batch, seqlen] mask go when padding is dropped.
//
// Tile      Three kernels. count_rows: a warp (short rows) or a block (long rows) reads a row of the mask and counts
//           its tokens. scan_lengths: one block turns the counts into offsets, 1024 rows at a time. rank_rows: the same
//           warp or block reads its row again (from L2), finds each token's rank by ballots, and writes the rank, the
//           token's index and its position; further blocks fill what lies past the last token. Every output element is
//           written exactly once.
// Loads     16 bytes a lane.
// Bounds    The mask once or twice, 4 bytes a rank, 16 a token. At the sizes that occur (some thousand tokens) the
//           three launches bound it, not the bytes; one very long row is bound by its single block, 1024 tokens a step.
// Measured  H100 80GB HBM3, mask of 16 x 1024: 104 us a call.
#pragma once

#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "packing/launch.h"

namespace warpform {

constexpr int kPlanThreads = 256;
constexpr int kPlanWarps = kPlanThreads / kWarpSize;
constexpr int kScanThreads = 1024;
// Tokens of a thread in one step of rank_rows, and loads in flight.
constexpr int kRankItems = 4;

// Nonzero elements of kBytes bytes in a 16-byte vector.
template <int kBytes>
__device__ __forceinline__ int count_nonzero(const uint4& v) {
  if constexpr (kBytes == 8) {
    return ((v.x | v.y) != 0) + ((v.z | v.w) != 0);
  } else if constexpr (kBytes == 4) {
    return (v.x != 0) + (v.y != 0) + (v.z != 0) + (v.w != 0);
  } else {
    // The top bit of each byte: set in it already, or carried into it from any other bit.
    const auto top = [](uint32_t x) { return (((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) & 0x80808080u; };
    return popcount(top(v.x)) + popcount(top(v.y)) + popcount(top(v.z)) + popcount(top(v.w));
  }
}

template <int kBytes>
__device__ __forceinline__ bool is_token(const char* row, int64_t s) {
  if constexpr (kBytes == 8) {
    return load_global(reinterpret_cast<const int64_t*>(row) + s) != 0;
  } else if constexpr (kBytes == 4) {
    return load_global(reinterpret_cast<const int32_t*>(row) + s) != 0;
  } else {
    return load_global(reinterpret_cast<const uint8_t*>(row) + s) != 0;
  }
}

template <int kBytes>
__device__ __forceinline__ const char* mask_row(const PackingPlanParams& p, int64_t b) {
  return static_cast<const char*>(p.mask) + b * p.mask_stride * kBytes;
}

// A row belongs to kRowWarps warps of a block: its first row, and the thread's number among those of its row.
template <int kRowWarps>
__device__ __forceinline__ int64_t row_of_thread() {
  return int64_t{blockIdx.x} * (kPlanWarps / kRowWarps) + warp_id() / kRowWarps;
}
template <int kRowWarps>
__device__ __forceinline__ int thread_in_row() {
  return static_cast<int>(threadIdx.x) % (kRowWarps * kWarpSize);
}

// Writes the unclamped count of row b into lengths[b]. Shared memory: kPlanWarps ints when kRowWarps > 1.
template <int kBytes, int kRowWarps>
__global__ void __launch_bounds__(kPlanThreads) count_rows(const __grid_constant__ PackingPlanParams p) {
  static_assert(kRowWarps == 1 || kRowWarps == kPlanWarps, "a row belongs to a warp or to the block");
  constexpr int kRowThreads = kRowWarps * kWarpSize;
  constexpr int kPerVector = 16 / kBytes;
  const int64_t b = row_of_thread<kRowWarps>();
  if (b >= p.batch) return;
  const char* row = mask_row<kBytes>(p, b);
  const int t = thread_in_row<kRowWarps>();
  // Elements before the first multiple of 16 bytes, vectors from there, the rest.
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16) / kBytes;
  const int64_t before = misaligned == 0 ? 0 : kPerVector - misaligned;
  const int64_t head = before < p.seqlen ? before : p.seqlen;
  const int64_t vectors = (p.seqlen - head) / kPerVector;
  const uint4* body = reinterpret_cast<const uint4*>(row + head * kBytes);
  int count = 0;
#pragma unroll 4
  for (int64_t i = t; i < vectors; i += kRowThreads) count += count_nonzero<kBytes>(load_global(body + i));
  if (t < head) count += is_token<kBytes>(row, t);
  const int64_t tail = head + vectors * kPerVector + t;
  if (t < kPerVector && tail < p.seqlen) count += is_token<kBytes>(row, tail);
  if constexpr (kRowWarps == 1) {
    count = warp_reduce(count, Sum{});
  } else {
    count = block_reduce<kPlanThreads>(count, Sum{}, shared_base());
  }
  if (t == 0) store_global(p.lengths + b, count);
}

// The sum over lanes 0 to this one.
template <class T>
__device__ __forceinline__ T warp_inclusive_scan(T v) {
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const T below = shuffle_up(v, delta);
    if (lane_id() >= delta) v += below;
  }
  return v;
}

// One block: lengths -> cu_seqlens, lengths clamped to the capacity, and the summary from before clamping. Shared
// memory: 2 x 32 values of 8 bytes.
inline constexpr int kScanSharedBytes = 2 * (kScanThreads / kWarpSize) * 8;
__global__ void __launch_bounds__(kScanThreads) scan_lengths(const __grid_constant__ PackingPlanParams p) {
  constexpr int kWarps = kScanThreads / kWarpSize;
  static_assert(kWarps == kWarpSize, "one warp scans the warps' totals");
  const auto clamp = [&](int64_t n) { return n < p.capacity ? n : p.capacity; };
  int64_t total = 0;
  int longest = 0;
  int buffer = 0;
  for (int64_t first = 0; first < p.batch; first += kScanThreads) {
    const int64_t b = first + threadIdx.x;
    const int length = b < p.batch ? load_global(p.lengths + b) : 0;
    longest = longest > length ? longest : length;
    int64_t end = warp_inclusive_scan<int64_t>(length);
    // Two buffers take turns, so that one barrier a step is enough: a thread that writes one again has passed the
    // barrier that follows its last reading.
    const uint32_t totals = shared_base() + static_cast<uint32_t>(buffer * kWarps * 8);
    buffer ^= 1;
    if (lane_id() == kWarpSize - 1) store_shared<int64_t>(totals + warp_id() * 8, end);
    block_sync();
    const int64_t warp_end = warp_inclusive_scan(load_shared<int64_t>(totals + lane_id() * 8));
    const int64_t before = shuffle(warp_end, warp_id() == 0 ? 0 : warp_id() - 1);
    if (warp_id() > 0) end += before;
    end += total;
    total += shuffle(warp_end, kWarpSize - 1);
    if (b < p.batch) {
      store_global(p.cu_seqlens + b + 1, static_cast<int32_t>(clamp(end)));
      store_global(p.lengths + b, static_cast<int32_t>(clamp(end) - clamp(end - length)));
    }
  }
  block_sync();
  longest = block_reduce<kScanThreads>(longest, Max{}, shared_base());
  if (threadIdx.x == 0) {
    store_global(p.cu_seqlens, int32_t{0});
    store_global(p.summary, total);
    store_global(p.summary + 1, int64_t{longest});
  }
}

// Blocks 0 to row_blocks - 1 rank rows, those after them fill indices and position_ids past the last token. Shared
// memory: 2 x kPlanWarps ints when kRowWarps > 1.
struct RankRows {
  PackingPlanParams p;
  int64_t row_blocks;
};
inline constexpr int kPlanSharedBytes = 2 * kPlanWarps * 4;
template <int kBytes, int kRowWarps>
__global__ void __launch_bounds__(kPlanThreads) rank_rows(const __grid_constant__ RankRows g) {
  const PackingPlanParams& p = g.p;
  if (blockIdx.x >= g.row_blocks) {
    const int64_t total = load_global(p.cu_seqlens + p.batch);
    const int64_t step = (gridDim.x - g.row_blocks) * kPlanThreads;
    for (int64_t r = total + (blockIdx.x - g.row_blocks) * kPlanThreads + threadIdx.x; r < p.capacity; r += step) {
      store_global(p.indices + r, int64_t{-1});
      store_global(p.position_ids + r, int64_t{0});
    }
    return;
  }
  const int64_t b = row_of_thread<kRowWarps>();
  if (b >= p.batch) return;
  const char* row = mask_row<kBytes>(p, b);
  // A row that begins past the capacity begins at the clamped offset, which is the capacity: its tokens are dropped
  // too.
  int64_t start = load_global(p.cu_seqlens + b);
  constexpr int kStep = kRowWarps * kWarpSize * kRankItems;
  const int warp_in_row = warp_id() % kRowWarps;
  uint32_t counts = shared_base();
  for (int64_t first = 0; first < p.seqlen; first += kStep) {
    // A warp takes kRankItems x 32 neighbouring tokens.
    const int64_t s0 = first + warp_in_row * (kWarpSize * kRankItems) + lane_id();
    bool token[kRankItems];
#pragma unroll
    for (int i = 0; i < kRankItems; ++i) {
      const int64_t s = s0 + i * kWarpSize;
      token[i] = s < p.seqlen && is_token<kBytes>(row, s);
    }
    int before[kRankItems];  // tokens of this warp and step that come earlier
    int in_warp = 0;
#pragma unroll
    for (int i = 0; i < kRankItems; ++i) {
      const uint32_t tokens = ballot(token[i]);
      before[i] = in_warp + popcount(tokens & ((1u << lane_id()) - 1));
      in_warp += popcount(tokens);
    }
    int64_t base = start;
    if constexpr (kRowWarps == 1) {
      start += in_warp;
    } else {
      if (lane_id() == 0) store_shared<int>(counts + warp_in_row * 4, in_warp);
      block_sync();
#pragma unroll
      for (int w = 0; w < kRowWarps; ++w) {
        const int n = load_shared<int>(counts + w * 4);
        if (w < warp_in_row) base += n;
        start += n;
      }
      // Two buffers take turns, as in scan_lengths.
      counts ^= kPlanWarps * 4;
    }
#pragma unroll
    for (int i = 0; i < kRankItems; ++i) {
      const int64_t s = s0 + i * kWarpSize;
      if (s >= p.seqlen) continue;
      const int64_t rank = base + before[i];
      const bool kept = token[i] && rank < p.capacity;
      store_global(p.ranks + b * p.seqlen + s, kept ? static_cast<int32_t>(rank) : -1);
      if (kept) {
        store_global(p.indices + rank, b * p.seqlen + s);
        store_global(p.position_ids + rank, s);
      }
    }
  }
}

}  // namespace warpform
