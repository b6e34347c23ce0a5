// The routed layers (routed_gemm.cuh) on wgmma: the same products, to the letter, for widths from 64 on.
//
// Tile      128 tokens in the plan's order by 256 or 128 outputs, 64 deep (warpgroup_gemm.cuh). A CTA takes every n-th
//           tile of columns of one tile of tokens, so that it reads tokens, their groups and gates once.
// Loads     Rows of x by 16-byte cp.async of all threads of the producer, 8 a step, zeros where the token does not use the
//           group; the weight by boxes of a tensor map, in whose dimensions every group and every part ends: what a box
//           reaches past its depth arrives as zeros. Rows take 170 instructions a step; the weight by copies, too, would be
//           16 more a thread, some 500 of a scheduler's 1,024 issue slots in all.
// Gather    Gates are in shared memory, over a power of two of each token. Consumers load the left operand by ldmatrix,
//           multiply in float32, round once, and give it to wgmma in registers: 165 to 180 instructions a warp and step
//           instead of 68, 360 issue slots of a scheduler for both consumers, of 1,024 or, of the narrow tile, 640. Shared
//           memory gives the same bytes as without gates: a warpgroup's rows are read once a step, by ldmatrix or by
//           wgmma. Three products of 16 are under way while the operand of the fourth is made.
// Scatter   Columns go by blocks of 64 of one group, those of groups that the tile of tokens lacks first: their tiles are
//           stored as zeros while the first stages are on their way, and at most one tile has blocks of both kinds. Where
//           parts of the depth are for some groups only (out_mask) a tile has blocks of one group: all of them see the
//           same parts, and a part that a group does not see meets none of its outputs, NaN or not.
// Stores    From registers, 16 bytes a lane, each output once, while the producer loads for the next tile.
// Bounds    2 tokens O (groups in use) m FLOP. d = 2048, half in use, 8192 tokens: 34 GFLOP, 40 with the unions of tiles:
//           50 us at wgmma's 800 TFLOP/s, 67 at the 600 that warpgroup_gemm.cuh leaves hope for; 0.08 GB, 17 us at an
//           H200's 4.8 TB/s. Before the first product of a CTA three reads of memory follow one another, some 2 us.
// Measured  not yet on a GPU.
#pragma once

#include "device/warpgroup_gemm.cuh"
#include "routing/routed_gemm.cuh"

namespace warpform {

// Shared memory of a CTA's tokens, behind the stages: the token of each row of the tile; of gather the rows that use each
// group, of scatter in the same place each row's groups; and, if there are gates, [groups][rows] of them, for gather over a
// power of two of each row, which follows them. A gate is 0 if the token does not use the group.
struct TileRows {
  static constexpr int kGroupsAt = kHiddenTile * 4, kGatesAt = kGroupsAt + kMaxGroups * (kHiddenTile / 8);
  static_assert(kMaxGroups * (kHiddenTile / 8) == kHiddenTile * 8 && kHiddenTile == kWarpgroupSize);

  uint32_t base;

  __host__ __device__ static constexpr int bytes(int gate_groups) {
    return kGatesAt + kHiddenTile * (4 * gate_groups + (gate_groups > 0 ? 4 : 0));
  }
  __device__ __forceinline__ int token(int row) const { return load_shared<int>(base + row * 4); }
  __device__ __forceinline__ uint64_t mask(int row) const { return load_shared<uint64_t>(base + kGroupsAt + row * 8); }
  // Bit r % 32 of word r / 32: whether row r uses the group.
  __device__ __forceinline__ Vec<uint32_t, 4> rows_that_use(int group) const {
    return load_shared<Vec<uint32_t, 4>>(base + kGroupsAt + group * 16);
  }
  __device__ __forceinline__ uint32_t gate_at(int group, int row) const {
    return base + kGatesAt + (group * kHiddenTile + row) * 4;
  }
  __device__ __forceinline__ float gate(int group, int row) const { return load_shared<float>(gate_at(group, row)); }
  __device__ __forceinline__ float unit(const Routes& r, int row) const {
    return load_shared<float>(gate_at(r.num_groups, row));
  }

  // By the first warpgroup, a thread a row: its token, and in the returned mask the groups of it.
  __device__ __forceinline__ uint64_t load_token(const Routes& r, int tile) const {
    const int row = static_cast<int>(threadIdx.x);
    const int token = token_at(r, int64_t{tile} * kHiddenTile + row);
    store_shared(base + row * 4, token);
    return token < 0 ? 0 : static_cast<uint64_t>(load_global(r.group_mask + token));
  }
  __device__ __forceinline__ void store_mask(uint64_t mask) const {
    store_shared(base + kGroupsAt + static_cast<int>(threadIdx.x) * 8, mask);
  }
  __device__ __forceinline__ void store_uses(const Routes& r, uint64_t mask) const {
    for (int g = 0; g < r.num_groups; ++g) {
      const uint32_t rows = ballot(mask >> g & 1);
      if (lane_id() == 0) store_shared(base + kGroupsAt + g * 16 + warp_id() * 4, rows);
    }
  }
  // By two other warpgroups, two neighbours a row, each with every second gate of it and several at once.
  template <bool kOverPower>
  __device__ __forceinline__ void load_gates(const Routes& r, const float* gates, int tile) const {
    constexpr int kAtOnce = 8;
    const int row = (static_cast<int>(threadIdx.x) - kWarpgroupSize) / 2, half = static_cast<int>(threadIdx.x) % 2;
    const int token = token_at(r, int64_t{tile} * kHiddenTile + row);
    const uint64_t mask = token < 0 ? 0 : static_cast<uint64_t>(load_global(r.group_mask + token));
    gates += int64_t{token} * r.num_groups;
    float largest = 0.f;
    for (int first = half; first < r.num_groups; first += 2 * kAtOnce) {
      float some[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int g = first + 2 * i;
        some[i] = token >= 0 && g < r.num_groups ? load_global(gates + g) : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int g = first + 2 * i;
        if (g >= r.num_groups) break;
        if (!(mask >> g & 1)) some[i] = 0.f;  // it may be NaN
        largest = fmaxf(largest, fabsf(some[i]));
        store_shared(gate_at(g, row), some[i]);
      }
    }
    if constexpr (!kOverPower) return;
    const PowerOfTwo power = power_above(fmaxf(largest, shuffle_xor(largest, 1)));
    if (half == 0) store_shared(gate_at(r.num_groups, row), power.value);
    for (int g = half; g < r.num_groups; g += 2) store_shared(gate_at(g, row), gate(g, row) * power.inverse);
  }
};

template <class Params>
struct RoutedHopperWork {
  // (depth in a group or part, group or part, output of any class), boxes of 64 x 1 x box_outputs; or, of a weight whose
  // outputs are contiguous, (output, depth, group or part of any class), boxes of 64 x 64 x 1
  TensorMap w;
  Params p;
  int class_step;  // along the dimension that has the classes
  Divisor shares;  // CTAs of a tile of tokens
  int columns;     // tiles of columns
  Divisor inner;   // of gather: tiles of columns of a part; of scatter: blocks of a group
};

// What all threads of a CTA know of it.
struct RoutedCta {
  int tile, first;  // of tokens; and the first of its tiles of columns
  int class_at;     // of the tensor map
  uint64_t groups;  // the tile's union

  template <class Params>
  __device__ __forceinline__ explicit RoutedCta(const RoutedHopperWork<Params>& work) {
    const int block = static_cast<int>(blockIdx.x);
    tile = work.shares.quotient(block);
    first = block - tile * work.shares.divisor;
  }
  __device__ __forceinline__ bool has_tokens(const Routes& r) const {
    return token_at(r, int64_t{tile} * kHiddenTile) >= 0;
  }
  template <class Params>
  __device__ __forceinline__ int count(const RoutedHopperWork<Params>& work) const {
    return work.shares.quotient(work.columns - first + work.shares.divisor - 1);
  }
};

// The rows of x that a thread of the producer copies.
struct CopiedTokens {
  static constexpr int kTurns = kHiddenTile / kCopiedRows;
  int token[kTurns];

  __device__ __forceinline__ void load(TileRows rows) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) token[turn] = rows.token(copied_row(turn));
  }
};

// ---- gather ----

template <class Tile>
struct GatherItems {
  static constexpr bool kMayBeEmpty = true;
  struct Item {
    uint64_t groups;
    int part, first;  // of the tile's columns in the part
    int steps;
  };

  const RoutedHopperWork<HiddenGatherParams>& work;
  const RoutedCta& cta;

  __device__ __forceinline__ int count() const { return cta.count(work); }
  __device__ __forceinline__ Item at(int i) const {
    const Routes& r = work.p.routes;
    const int column = cta.first + i * work.shares.divisor;
    Item item;
    item.part = work.inner.quotient(column);
    item.first = (column - item.part * work.inner.divisor) * Tile::kN;
    item.groups = cta.groups;
    if (r.out_mask != nullptr) item.groups &= static_cast<uint64_t>(load_global(r.out_mask + item.part));
    item.steps = popcount(item.groups) * ceil_div(r.width, Tile::kDepth);
    return item;
  }
};

template <class T, class Tile>
struct GatherLoad {
  static constexpr int kBoxBytes = Tile::B::kBytes;
  static constexpr bool kCopies = true;
  using Item = typename GatherItems<Tile>::Item;

  const RoutedHopperWork<HiddenGatherParams>& work;
  const RoutedCta& cta;
  TileRows rows;
  CopiedTokens mine{};
  GroupSteps at{0};

  __device__ __forceinline__ void begin(const Item& item) {
    mine.load(rows);
    at = GroupSteps(item.groups);
  }
  __device__ __forceinline__ void boxes(const Item& item, int /*step*/, typename Tile::A /*a*/, typename Tile::B b,
                                        uint32_t barrier) const {
    const int output = item.part * work.p.routes.dense_width + item.first;
    if constexpr (Tile::kMajorB == Major::kDepth) {
      load_panels(b, work.w, barrier, at.depth, at.group, cta.class_at + output);
    } else {
      load_panels(b, work.w, barrier, output, at.depth, cta.class_at + at.group);
    }
  }
  __device__ __forceinline__ void copies(const Item& /*item*/, int /*step*/, typename Tile::A a,
                                         typename Tile::B /*b*/) {
    const Routes& r = work.p.routes;
    const auto uses = rows.rows_that_use(at.group);
    int used[CopiedTokens::kTurns];
#pragma unroll
    for (int turn = 0; turn < CopiedTokens::kTurns; ++turn) {
      const int first = turn * kCopiedRows;
      const bool uses_it = uses[first / 32] >> (first % 32) >> copied_row(0) & 1;
      used[turn] = uses_it ? mine.token[turn] : -1;
    }
    const T* x = static_cast<const T*>(work.p.x) + (int64_t{at.group} * r.width + at.depth);
    copy_rows_async(a.panel(0), x, work.p.x_stride, r.width - at.depth, used);
    at.advance(r.width);
  }
};

// The left operand times the gates of its rows.
template <class T, class Tile>
struct GatedLeft {
  static constexpr bool kInRegisters = true;
  using Item = typename GatherItems<Tile>::Item;

  const Routes& routes;
  TileRows rows;
  GroupSteps at{0};
  float gates[2] = {};  // of this lane's rows

  __device__ __forceinline__ void begin(const Item& item) { at = GroupSteps(item.groups); }
  __device__ __forceinline__ void begin_step(int row) {
    const int g = lane_id() / 4;
    gates[0] = rows.gate(at.group, row + g), gates[1] = rows.gate(at.group, row + g + 8);
    at.advance(routes.width);
  }
  __device__ __forceinline__ void fragment(typename Tile::A from, int row, int k, uint32_t (&a)[4]) const {
    load_a(a, from.panel(0), lane_offset_halves<kPanel>(), row, k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto pair = unpack2<T>(a[i]);
      a[i] = pack2<T>(pair[0] * gates[i % 2], pair[1] * gates[i % 2]);
    }
  }
};

template <class T, class Tile, bool kGated>
struct GatherStore {
  using Item = typename GatherItems<Tile>::Item;

  const HiddenGatherParams& p;
  int cls;
  TileRows rows;

  __device__ __forceinline__ void operator()(const Item& item, float (&acc)[1][Tile::kN / 8][4], int first_row) const {
    const Routes& r = p.routes;
    if (kGated) {
      scale_rows(acc, [&](int row) { return rows.unit(r, first_row + row); });
    }
    const int cols = min(r.dense_width - item.first, Tile::kN);
    const int64_t first_col = int64_t{item.part} * r.dense_width + item.first;
    if (p.bias != nullptr) {
      add_bias(acc, static_cast<const T*>(p.bias) + cls * p.bias_stride + first_col, cols);
    }
    const int64_t out_stride = int64_t{r.num_out} * r.dense_width;
    T* out = static_cast<T*>(p.out) + first_col;
    for_each_vector<T>(acc, [&](int row, int col, const uint32_t (&v)[4]) {
      const int token = rows.token(first_row + row);
      if (token >= 0 && col < cols) {
        store_global(reinterpret_cast<Vec<uint32_t, 4>*>(out + token * out_stride + col),
                     Vec<uint32_t, 4>{{v[0], v[1], v[2], v[3]}});
      }
    });
  }
};

template <class T, class Tile, bool kGated>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas) hidden_gather_hopper(
    const __grid_constant__ RoutedHopperWork<HiddenGatherParams> work) {
  const HiddenGatherParams& p = work.p;
  const Routes& r = p.routes;
  RoutedCta cta(work);
  if (!cta.has_tokens(r)) return;
  if (threadIdx.x == 0) prefetch_tensor_map(work.w);
  cta.groups = groups_at(r, cta.tile);
  const int cls = class_at(r, cta.tile);
  cta.class_at = cls * work.class_step;
  const TileRows rows{shared_base() + Tile::kBytes};
  if (warpgroup_id() == 0) {
    rows.store_uses(r, rows.load_token(r, cta.tile));
  } else if (kGated) {
    rows.load_gates</*kOverPower=*/true>(r, p.gates, cta.tile);
  }
  const GatherItems<Tile> items{work, cta};
  const GatherLoad<T, Tile> load{work, cta, rows};
  const GatherStore<T, Tile, kGated> store{p, cls, rows};
  if constexpr (kGated) {
    warpgroup_gemm<T, Tile>(items, load, store, GatedLeft<T, Tile>{r, rows});
  } else {
    warpgroup_gemm<T, Tile>(items, load, store);
  }
}

// ---- scatter ----

// The blocks of 64 columns, in the order in which tiles take them: those of groups that the tile of tokens lacks first.
struct BlockOrder {
  const RoutedHopperWork<HiddenScatterParams>& work;
  uint64_t groups;

  __device__ __forceinline__ int idle() const { return work.p.routes.num_groups - popcount(groups); }
  __device__ __forceinline__ GroupBlock at(int index) const {
    const Routes& r = work.p.routes;
    const int place = work.inner.quotient(index), without = idle();
    GroupBlock block;
    block.first = (index - place * work.inner.divisor) * kHiddenBlock;
    block.cols = place < r.num_groups ? min(r.width - block.first, kHiddenBlock) : 0;
    block.active = block.cols > 0 && place >= without;
    block.group = place < without ? nth_bit(~groups, place) : nth_bit(groups, place - without);
    return block;
  }
};

template <class Tile>
struct ScatterItems {
  static constexpr bool kMayBeEmpty = true;
  static constexpr int kBlocks = Tile::kN / kHiddenBlock;
  struct Item {
    int first;  // block
    int group;  // of all blocks, if there are parts that some groups do not see
    int steps;
  };

  const RoutedHopperWork<HiddenScatterParams>& work;
  const RoutedCta& cta;

  __device__ __forceinline__ bool sees(int part, int group) const {
    return static_cast<bool>(static_cast<uint64_t>(load_global(work.p.routes.out_mask + part)) >> group & 1);
  }
  __device__ __forceinline__ int count() const { return cta.count(work); }
  __device__ __forceinline__ Item at(int i) const {
    const Routes& r = work.p.routes;
    const BlockOrder order{work, cta.groups};
    Item item{.first = (cta.first + i * work.shares.divisor) * kBlocks, .group = 0, .steps = 0};
    const int last = min(item.first + kBlocks, r.num_groups * work.inner.divisor) - 1;
    if (work.inner.quotient(last) < order.idle()) return item;
    int parts = r.num_out;
    if (r.out_mask != nullptr) {
      item.group = order.at(item.first).group;
      parts = 0;
      for (int part = 0; part < r.num_out; ++part) parts += sees(part, item.group);
    }
    item.steps = parts * ceil_div(r.dense_width, Tile::kDepth);
    return item;
  }
};

template <class T, class Tile>
struct ScatterLoad {
  static constexpr int kBoxBytes = Tile::B::kBytes;
  static constexpr bool kCopies = true;
  static constexpr int kBlocks = ScatterItems<Tile>::kBlocks;
  using Item = typename ScatterItems<Tile>::Item;

  const ScatterItems<Tile>& items;
  TileRows rows;
  CopiedTokens mine{};
  int output[kBlocks] = {};  // the first of each block
  int part = 0, depth = 0;

  __device__ __forceinline__ void begin(const Item& item) {
    mine.load(rows);
    const BlockOrder order{items.work, items.cta.groups};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const GroupBlock block = order.at(item.first + b);
      output[b] = block.cols > 0 ? block.group * items.work.p.routes.width + block.first : 0;
    }
    part = 0, depth = 0;
    if (item.steps > 0) settle(item);
  }
  // To the next part that the item's group sees; there is one where steps are left.
  __device__ __forceinline__ void settle(const Item& item) {
    const Routes& r = items.work.p.routes;
    if (r.out_mask == nullptr) return;
    while (part < r.num_out && !items.sees(part, item.group)) ++part;
  }
  __device__ __forceinline__ void boxes(const Item& /*item*/, int /*step*/, typename Tile::A /*a*/, typename Tile::B b,
                                        uint32_t barrier) const {
    constexpr int kBlockBytes = Tile::B::kBytes / kBlocks;  // 64 rows, or a panel
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const PanelTile<kHiddenBlock, kPanel> block{b.base + i * kBlockBytes};
      const int class_at = items.cta.class_at;
      if constexpr (Tile::kMajorB == Major::kDepth) {
        load_panels(block, items.work.w, barrier, depth, part, class_at + output[i]);
      } else {
        load_panels(block, items.work.w, barrier, output[i], depth, class_at + part);
      }
    }
  }
  __device__ __forceinline__ void copies(const Item& item, int /*step*/, typename Tile::A a, typename Tile::B /*b*/) {
    const HiddenScatterParams& p = items.work.p;
    const T* x = static_cast<const T*>(p.x) + (int64_t{part} * p.routes.dense_width + depth);
    copy_rows_async(a.panel(0), x, p.x_stride, p.routes.dense_width - depth, mine.token);
    depth += Tile::kDepth;
    if (depth < p.routes.dense_width) return;
    depth = 0, ++part;
    settle(item);
  }
};

template <class T, class Tile>
struct ScatterStore {
  static constexpr int kBlocks = ScatterItems<Tile>::kBlocks, kTiles = kHiddenBlock / 8;
  using Item = typename ScatterItems<Tile>::Item;

  const RoutedHopperWork<HiddenScatterParams>& work;
  const RoutedCta& cta;
  int cls;
  TileRows rows;

  // The accumulators move on from block to block, so that there is the code of one: 96 moves a thread of a wide tile's,
  // where four times the code would not stay in the instruction cache.
  __device__ __forceinline__ void operator()(const Item& item, float (&acc)[1][Tile::kN / 8][4], int first_row) const {
    const BlockOrder order{work, cta.groups};
#pragma unroll 1
    for (int b = 0; b < kBlocks; ++b) {
      const GroupBlock block = order.at(item.first + b);
      if (block.cols > 0) {
        float mine[1][kTiles][4];
        for_each_accumulator<1, kTiles>([&](int m, int n, int e) { mine[m][n][e] = acc[m][n][e]; });
        store_scattered<T>(mine, work.p, block, cls, rows, first_row,
                           [&](int row) { return rows.gate(block.group, row); });
      }
      for_each_accumulator<1, kTiles*(kBlocks - 1)>([&](int m, int n, int e) { acc[m][n][e] = acc[m][n + kTiles][e]; });
    }
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas) hidden_scatter_hopper(
    const __grid_constant__ RoutedHopperWork<HiddenScatterParams> work) {
  const Routes& r = work.p.routes;
  RoutedCta cta(work);
  if (!cta.has_tokens(r)) return;
  if (threadIdx.x == 0) prefetch_tensor_map(work.w);
  cta.groups = groups_at(r, cta.tile);
  const int cls = class_at(r, cta.tile);
  cta.class_at = cls * work.class_step;
  const TileRows rows{shared_base() + Tile::kBytes};
  if (warpgroup_id() == 0) {
    rows.store_mask(rows.load_token(r, cta.tile));
  } else if (work.p.gates != nullptr) {
    rows.load_gates</*kOverPower=*/false>(r, work.p.gates, cta.tile);
  }
  const ScatterItems<Tile> items{work, cta};
  warpgroup_gemm<T, Tile>(items, ScatterLoad<T, Tile>{items, rows}, ScatterStore<T, Tile>{work, cta, cls, rows});
}

}  // namespace warpform
