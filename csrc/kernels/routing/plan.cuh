// The routing plan: tokens sorted by class and group mask, and of each tile of them the union of masks.
//
// A stable radix sort, eight bits a pass, from the lowest bits of the mask to the class. A pass is two kernels: count
// leaves how often each digit occurs in each block's tokens; place sums the counts of the blocks before its own (a
// thread a digit, from L2), ranks its tokens within the block by ballots, and writes them where they go. Then one block
// a tile takes the union, and one block in all decides whether the unions leave anything to gain. A few tokens (256)
// are ranked against each other by one block instead, in one launch. Every element of the outputs is written once,
// holes aside. Bytes: 8 a token and pass for masks, 8 for the order: at the sizes that occur the number of launches
// bounds it, 6 for 16 groups, 1 for few tokens.
// Measured  H100 80GB HBM3, 8192 tokens: 27 us.
#pragma once

#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "routing/group_mask.cuh"
#include "routing/launch.h"

namespace warpform {

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / kWarpSize;
constexpr int kDigits = 256;
constexpr int kDigitBits = 8;
constexpr int kSortBlocks = 128;     // at most: every block reads the counts of all
constexpr int kFewPlanTokens = 256;  // one block, a thread a token
// More than 17 of 20 (tile, group) pairs in use: sorting gains nothing, and every tile uses every group.
constexpr int kDenseNumerator = 17, kDenseDenominator = 20;

struct SortPass {
  RoutingPlanParams p;
  const int32_t* in;    // the order so far, or null: as they come
  int32_t* out;         // the order after this pass; null after the last
  int32_t* counts;      // [blocks, kDigits]
  int32_t* class_ends;  // [num_classes]: tiles up to the end of each class; written by the last pass
  int shift;            // of the digit in the mask
  int items;            // tokens of a block, a multiple of kSortThreads
  int blocks;
  bool by_class;
  bool last;
};

__device__ __forceinline__ int class_of(const RoutingPlanParams& p, int token) {
  if (p.token_class == nullptr) return 0;
  const int64_t c = load_global(p.token_class + token);
  return static_cast<int>(c < 0 ? 0 : c >= p.num_classes ? p.num_classes - 1 : c);
}

__device__ __forceinline__ uint64_t groups_of(const RoutingPlanParams& p, int token) {
  const auto mask = static_cast<uint64_t>(load_global(p.group_mask + token));
  return p.num_groups == 64 ? mask : mask & ((uint64_t{1} << p.num_groups) - 1);
}

__device__ __forceinline__ int digit_of(const SortPass& s, int token) {
  if (s.by_class) return class_of(s.p, token);
  return static_cast<int>(groups_of(s.p, token) >> s.shift) & (kDigits - 1);
}

// Lanes with the same digit, this one included; none where this lane has no token.
__device__ __forceinline__ uint32_t same_digit(int digit, bool has_token) {
  uint32_t lanes = ballot(has_token);
#pragma unroll
  for (int bit = 0; bit < kDigitBits; ++bit) {
    const bool set = digit >> bit & 1;
    const uint32_t those = ballot(set);
    lanes &= set ? those : ~those;
  }
  return has_token ? lanes : 0;
}

// The tokens of a warp, 32 at a time, in order: visit(token or -1, digit, lanes with the same digit).
template <class Visit>
__device__ __forceinline__ void for_tokens_of_warp(const SortPass& s, Visit&& visit) {
  const int share = s.items / kSortWarps;
  const int first = static_cast<int>(blockIdx.x) * s.items + warp_id() * share;
  for (int i = 0; i < share; i += kWarpSize) {
    const int at = first + i + lane_id();
    const bool inside = at < s.p.tokens;
    const int token = !inside ? -1 : s.in == nullptr ? at : load_global(s.in + at);
    const int digit = inside ? digit_of(s, token) : 0;
    visit(token, digit, same_digit(digit, inside));
  }
}

__device__ __forceinline__ bool is_first_lane(uint32_t lanes) { return (lanes & ((1u << lane_id()) - 1)) == 0; }

// Adds to a warp's counters in shared memory, [kSortWarps][kDigits], and returns the previous counts.
__device__ __forceinline__ int count_digit(uint32_t counters, int digit, uint32_t lanes) {
  const uint32_t at = counters + (warp_id() * kDigits + digit) * 4;
  int before = 0;
  if (lanes != 0) before = load_shared<int>(at);
  warp_sync();
  if (lanes != 0 && is_first_lane(lanes)) store_shared(at, before + popcount(lanes));
  warp_sync();
  return before;
}

__device__ __forceinline__ void clear_counters(uint32_t counters) {
  for (int i = static_cast<int>(threadIdx.x); i < kSortWarps * kDigits; i += kSortThreads) {
    store_shared(counters + i * 4, 0);
  }
  block_sync();
}

constexpr int kSortSharedBytes = kSortWarps * kDigits * 4 + 2 * kDigits * 4 + 2 * kSortWarps * 4;

static __global__ void __launch_bounds__(kSortThreads) count_digits(const __grid_constant__ SortPass s) {
  const int thread = static_cast<int>(threadIdx.x);
  if (s.in == nullptr) {
    // The first pass: what no token will fill.
    for (int64_t i = int64_t{blockIdx.x} * kSortThreads + thread; i < int64_t{s.p.tiles} * s.p.tile;
         i += int64_t{s.blocks} * kSortThreads) {
      store_global(s.p.perm + i, -1);
    }
  }
  clear_counters(shared_base());
  for_tokens_of_warp(s, [&](int, int digit, uint32_t lanes) { count_digit(shared_base(), digit, lanes); });
  block_sync();
  int count = 0;
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) count += load_shared<int>(shared_base() + (w * kDigits + thread) * 4);
  store_global(s.counts + int64_t{blockIdx.x} * kDigits + thread, count);
}

// The sum over the threads with smaller numbers. `totals`: kSortWarps ints that nothing else uses.
__device__ __forceinline__ int exclusive_scan(int value, uint32_t totals) {
  int sum = value;
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const int below = shuffle_up(sum, delta);
    if (lane_id() >= delta) sum += below;
  }
  if (lane_id() == kWarpSize - 1) store_shared(totals + warp_id() * 4, sum);
  block_sync();
  int before = 0;
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) before += w < warp_id() ? load_shared<int>(totals + w * 4) : 0;
  return before + sum - value;
}

static __global__ void __launch_bounds__(kSortThreads) place_tokens(const __grid_constant__ SortPass s) {
  static_assert(kSortThreads == kDigits, "a thread a digit");
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const uint32_t counters = shared_base();
  const uint32_t bases = counters + kSortWarps * kDigits * 4;  // of each digit: the rank of this block's first token
  const uint32_t shifts = bases + kDigits * 4;                 // of each class: places before it that tiles leave empty
  const uint32_t totals = shifts + kDigits * 4;
  clear_counters(counters);

  int before = 0, count = 0;
  for (int b = 0; b < s.blocks; ++b) {
    const int n = load_global(s.counts + int64_t{b} * kDigits + thread);
    before += b < block ? n : 0;
    count += n;
  }
  const int start = exclusive_scan(count, totals);
  store_shared(bases + thread * 4, start + before);
  if (s.by_class) {
    const int tiles = ceil_div(count, s.p.tile);
    const int first_tile = exclusive_scan(tiles, totals + kSortWarps * 4);
    store_shared(shifts + thread * 4, first_tile * s.p.tile - start);
    if (block == 0 && thread < s.p.num_classes) store_global(s.class_ends + thread, first_tile + tiles);
  }
  // Counts, for each digit, the tokens of the warps with smaller numbers.
  for_tokens_of_warp(s, [&](int, int digit, uint32_t lanes) { count_digit(counters, digit, lanes); });
  block_sync();
  int sum = load_shared<int>(bases + thread * 4);
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) {
    const uint32_t at = counters + (w * kDigits + thread) * 4;
    const int n = load_shared<int>(at);
    store_shared(at, sum);
    sum += n;
  }
  block_sync();
  for_tokens_of_warp(s, [&](int token, int digit, uint32_t lanes) {
    int rank = count_digit(counters, digit, lanes);
    if (token < 0) return;
    rank += popcount(lanes & ((1u << lane_id()) - 1));
    if (!s.last) return store_global(s.out + rank, token);
    if (s.by_class) rank += load_shared<int>(shifts + digit * 4);
    store_global(s.p.perm + rank, token);
    store_global(s.p.inverse + token, rank);
  });
}

constexpr int kUnionThreads = 128;

struct TileUnions {
  RoutingPlanParams p;
  const int32_t* class_ends;
};

// The low and the high half of a mask, combined over a warp.
__device__ __forceinline__ uint64_t warp_or(uint64_t v) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) v |= shuffle_xor(v, offset);
  return v;
}

// One block computes the mask of one tile. A tile without tokens has mask 0.
static __global__ void __launch_bounds__(kUnionThreads) tile_unions(const __grid_constant__ TileUnions u) {
  const RoutingPlanParams& p = u.p;
  const int tile = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  uint64_t mask = 0;
  for (int i = thread; i < p.tile; i += kUnionThreads) {
    const int token = load_global(p.perm + int64_t{tile} * p.tile + i);
    if (token >= 0) mask |= groups_of(p, token);
  }
  mask = warp_or(mask);
  if (lane_id() == 0) store_shared(shared_base() + warp_id() * 8, mask);
  block_sync();
  if (thread != 0) return;
#pragma unroll
  for (int w = 1; w < kUnionThreads / kWarpSize; ++w) mask |= load_shared<uint64_t>(shared_base() + w * 8);
  store_global(p.tile_mask + tile, static_cast<int64_t>(mask));
  int c = 0;
  if (p.token_class != nullptr) {
    while (c < p.num_classes && load_global(u.class_ends + c) <= tile) ++c;
  }
  store_global(p.tile_class + tile, c < p.num_classes ? c : 0);
}

// One block decides: if the unions together use too much, tiles with tokens use all groups.
static __global__ void __launch_bounds__(kSortThreads) decide_dense(const __grid_constant__ RoutingPlanParams p) {
  const auto used = [&](int tile) { return load_global(p.perm + int64_t{tile} * p.tile) >= 0; };
  int64_t pairs = 0, tiles = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.tiles; i += kSortThreads) {
    pairs += popcount(static_cast<uint64_t>(load_global(p.tile_mask + i)));
    tiles += used(i);
  }
  pairs = block_reduce<kSortThreads>(pairs, Sum{}, shared_base());
  tiles = block_reduce<kSortThreads>(tiles, Sum{}, shared_base() + kSortWarps * 8);
  if (kDenseDenominator * pairs <= kDenseNumerator * tiles * p.num_groups) return;
  const uint64_t all = p.num_groups == 64 ? ~uint64_t{0} : (uint64_t{1} << p.num_groups) - 1;
  for (int i = static_cast<int>(threadIdx.x); i < p.tiles; i += kSortThreads) {
    if (used(i)) store_global(p.tile_mask + i, static_cast<int64_t>(all));
  }
}

// All of it for up to kFewPlanTokens tokens, by one block: a token's rank is the number of those before it. Shared
// memory: mask and class of each token, tokens of each class, tiles before each class.
constexpr int kFewPlanBytes = kFewPlanTokens * 12 + 2 * kDigits * 4 + 2 * kSortWarps * 8;

static __global__ void __launch_bounds__(kSortThreads) plan_few_tokens(const __grid_constant__ RoutingPlanParams p) {
  static_assert(kFewPlanTokens == kSortThreads && kSortThreads == kDigits, "a thread a token, and a class");
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t masks = shared_base(), classes = masks + kFewPlanTokens * 8;
  const uint32_t ends = classes + kFewPlanTokens * 4, totals = ends + 2 * kDigits * 4;
  for (int64_t i = thread; i < int64_t{p.tiles} * p.tile; i += kSortThreads) store_global(p.perm + i, -1);
  const bool has_token = thread < p.tokens;
  const uint64_t mask = has_token ? groups_of(p, thread) : 0;
  const int mine = has_token ? class_of(p, thread) : 0;
  if (has_token) {
    store_shared(masks + thread * 8, mask);
    store_shared(classes + thread * 4, mine);
  }
  block_sync();
  int rank = 0, count = 0;  // of this token in its class; of tokens in class `thread`
  for (int i = 0; i < p.tokens; ++i) {
    const int theirs = load_shared<int>(classes + i * 4);
    const auto other = load_shared<uint64_t>(masks + i * 8);
    rank += theirs == mine && (other < mask || (other == mask && i < thread));
    count += theirs == thread;
  }
  const int tiles = ceil_div(count, p.tile);
  const int first_tile = exclusive_scan(tiles, totals);
  store_shared(ends + thread * 4, first_tile);
  store_shared(ends + (kDigits + thread) * 4, first_tile + tiles);
  block_sync();  // and the -1 are written
  if (has_token) {
    const int place = load_shared<int>(ends + mine * 4) * p.tile + rank;
    store_global(p.perm + place, thread);
    store_global(p.inverse + thread, place);
  }
  // Few tokens are few tiles, and a class for each token at most: a thread takes the union of one after the other.
  block_sync();
  int64_t pairs = 0, used = 0;
  for (int tile = thread; tile < p.tiles; tile += kSortThreads) {
    uint64_t all = 0;
    int c = 0;
    while (c < p.num_classes && load_shared<int>(ends + (kDigits + c) * 4) <= tile) ++c;
    int tokens = 0;
    for (int i = 0; i < p.tile && c < p.num_classes; ++i) {
      const int token = load_global(p.perm + int64_t{tile} * p.tile + i);
      if (token < 0) break;
      all |= load_shared<uint64_t>(masks + token * 8);
      ++tokens;
    }
    pairs += popcount(all);
    used += tokens > 0;
    store_global(p.tile_mask + tile, static_cast<int64_t>(all));
    store_global(p.tile_class + tile, c < p.num_classes ? c : 0);
  }
  pairs = block_reduce<kSortThreads>(pairs, Sum{}, totals);
  block_sync();
  used = block_reduce<kSortThreads>(used, Sum{}, totals + kSortWarps * 8);
  if (kDenseDenominator * pairs <= kDenseNumerator * used * p.num_groups) return;
  const uint64_t all = p.num_groups == 64 ? ~uint64_t{0} : (uint64_t{1} << p.num_groups) - 1;
  for (int tile = thread; tile < p.tiles; tile += kSortThreads) {
    if (load_global(p.perm + int64_t{tile} * p.tile) >= 0) {
      store_global(p.tile_mask + tile, static_cast<int64_t>(all));
    }
  }
}

// The groups that idx [tokens, choices] names and the shared ones, a thread a token.
static __global__ void __launch_bounds__(kSortThreads) routing_mask(const __grid_constant__ RoutingMaskParams p) {
  const int64_t token = int64_t{blockIdx.x} * kSortThreads + threadIdx.x;
  if (token >= p.tokens) return;
  uint64_t mask = p.num_shared == 64 ? ~uint64_t{0} : (uint64_t{1} << p.num_shared) - 1;
  for (int i = 0; i < p.choices; ++i) {
    const int64_t at = token * p.choices + i;
    const int64_t g = p.wide ? load_global(static_cast<const int64_t*>(p.idx) + at)
                             : int64_t{load_global(static_cast<const int32_t*>(p.idx) + at)};
    if (g >= 0 && g < p.num_groups) mask |= uint64_t{1} << g;
  }
  store_global(p.group_mask + token, static_cast<int64_t>(mask));
}

}  // namespace warpform
