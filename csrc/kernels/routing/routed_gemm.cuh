// Linear layers that read (gather) or write (scatter) the groups of hidden dimensions that a token uses, and no others
// (MoHD, arXiv 2412.05644).
//
// Tile      128 tokens in the plan's order by 128 outputs, four warps of 64 x 64, 64 deep.
// Loads     all threads, 16-byte cp.async, three stages. Rows of x are gathered by the copies themselves: no permuted
//           copy of x is made. What a token does not use arrives as zeros without being read, so that NaN there goes
//           nowhere, and a tile of unlike tokens is exact. A thread reads its tokens and their uses before it copies.
// Gather    the loop over depth walks the groups of the tile's union; gates multiply the left operand's fragments on
//           their way from shared memory, one step of 16 ahead of the products, in float32, rounded once. A token's
//           gates are taken over a power of two: no product passes 16 bits.
// Scatter   a warp's 64 outputs belong to one group (a narrower group leaves some unused); where the tile's union lacks
//           it, zeros are written. Gates, before rounding, bias and dots with another tensor are in the epilogue.
// Stores    from registers, 16 bytes a lane, rows where they belong: each output is written once, no atomics.
// Bounds    2 tokens O (groups in use) m FLOP at block_gemm.cuh's 403 TFLOP/s on an H100. d = 2048, half in use, 8192
//           tokens: 34 GFLOP, 40 with the unions of tiles, 0.1 ms, against 0.08 GB, 0.03 ms. The plan is 27 us more.
// Measured  on an H100 with that plan: gather 187 us, 184 TFLOP/s of useful work, with all groups in use 286 us; scatter
//           194 us, with all groups in use 252 us; the products alone 158 and 161 us. cuBLAS multiplies the whole
//           dense matrix in 91 us, so on this GPU half of the groups do not pay yet. Before tokens were read ahead of
//           the copies and gates ahead of the products it was 206 us for either.
#pragma once

#include "device/block_tile.cuh"
#include "device/reduce.cuh"
#include "routing/gates.cuh"
#include "routing/group_mask.cuh"
#include "routing/launch.h"

namespace warpform {

using HiddenTileShape = LargeTile;
static_assert(HiddenTileShape::kM == kHiddenTile && HiddenTileShape::kWarpN == kHiddenBlock);

// A plan comes from memory: what it says is bounded, so that a wrong one can give wrong results and nothing else.
__device__ __forceinline__ int token_at(const Routes& r, int64_t place) {
  const int token = load_global(r.perm + place);
  return token < r.tokens ? token : -1;
}
__device__ __forceinline__ int class_at(const Routes& r, int tile) {
  return min(max(load_global(r.tile_class + tile), 0), r.num_classes - 1);
}
__device__ __forceinline__ uint64_t groups_at(const Routes& r, int tile) {
  const auto groups = static_cast<uint64_t>(load_global(r.tile_mask + tile));
  return r.num_groups == 64 ? groups : groups & ((uint64_t{1} << r.num_groups) - 1);
}

// Shared memory of a CTA's tokens, beside the stages: the mask of each token, its number, the rows that use each group,
// and, if there are gates, [groups][tokens] of them over a power of two of each token, which follows them. A gate is 0
// if the token does not use the group.
struct TileTokens {
  static constexpr int kTurns = kHiddenTile / (HiddenTileShape::kThreads / 8);  // rows that a thread copies
  static constexpr int kRowStep = kHiddenTile / kTurns;                         // from one of them to the next
  static constexpr int kUsesAt = kHiddenTile * 12, kGatesAt = kUsesAt + kMaxGroups * (kHiddenTile / 8);
  static_assert(HiddenTileShape::kThreads == kHiddenTile, "a thread a token");

  uint32_t base;

  __host__ __device__ static constexpr int bytes(int gate_groups) {
    return kGatesAt + kHiddenTile * (4 * gate_groups + (gate_groups > 0 ? 4 : 0));
  }
  // Rows that one thread copies are neighbours.
  __device__ __forceinline__ uint32_t token_address(int row) const {
    return base + kHiddenTile * 8 + (row % kRowStep * kTurns + row / kRowStep) * 4;
  }
  __device__ __forceinline__ uint32_t gates() const { return base + kGatesAt; }
  __device__ __forceinline__ int token(int row) const { return load_shared<int>(token_address(row)); }
  __device__ __forceinline__ uint64_t mask(int row) const { return load_shared<uint64_t>(base + row * 8); }
  // Bit r % 32 of word r / 32: whether row r uses the group.
  __device__ __forceinline__ Vec<uint32_t, 4> rows_that_use(int group) const {
    return load_shared<Vec<uint32_t, 4>>(base + kUsesAt + group * 16);
  }
  __device__ __forceinline__ float gate(int group, int row) const {
    return load_shared<float>(gates() + (group * kHiddenTile + row) * 4);
  }

  __device__ __forceinline__ uint32_t unit(const Routes& p, int row) const {
    return gates() + (p.num_groups * kHiddenTile + row) * 4;
  }

  // Each thread loads one token. There is no barrier inside.
  __device__ __forceinline__ void load(const Routes& p, int tile) const {
    const int row = static_cast<int>(threadIdx.x);
    const int token = token_at(p, int64_t{tile} * kHiddenTile + row);
    const uint64_t mask = token < 0 ? 0 : static_cast<uint64_t>(load_global(p.group_mask + token));
    store_shared(token_address(row), token);
    store_shared(base + row * 8, mask);
  }
  // Sets the rows that use each group. After load().
  __device__ __forceinline__ void load_uses(const Routes& p) const {
    const uint64_t mask = this->mask(static_cast<int>(threadIdx.x));
    for (int g = 0; g < p.num_groups; ++g) {
      const uint32_t rows = ballot(mask >> g & 1);
      if (lane_id() == 0) store_shared(base + kUsesAt + g * 16 + warp_id() * 4, rows);
    }
  }
  // Loads the gates, several at once, because each waits for memory. After load().
  __device__ __forceinline__ void load_gates(const Routes& p, const float* from) const {
    constexpr int kAtOnce = 8;
    const int row = static_cast<int>(threadIdx.x);
    const uint64_t mask = this->mask(row);
    from += int64_t{token(row)} * p.num_groups;
    float largest = 0.f;
    for (int first = 0; first < p.num_groups; first += kAtOnce) {
      float some[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int g = first + i;
        some[i] = g < p.num_groups && (mask >> g & 1) ? load_global(from + g) : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        largest = fmaxf(largest, fabsf(some[i]));
        if (first + i < p.num_groups) store_shared(gates() + ((first + i) * kHiddenTile + row) * 4, some[i]);
      }
    }
    const PowerOfTwo power = power_above(largest);
    store_shared(unit(p, row), power.value);
    for (int g = 0; g < p.num_groups; ++g) {
      const uint32_t at = gates() + (g * kHiddenTile + row) * 4;
      store_shared(at, load_shared<float>(at) * power.inverse);
    }
  }
};

// Copies the rows of 64 columns of x, as far as cols reach, to the tile: that of the token in row r where bit r of
// `uses` is set, zeros elsewhere. What a thread needs of its tokens is read before the first copy: behind a copy it
// would wait for shared memory at each.
template <class T>
__device__ __forceinline__ void copy_tokens_async(SharedTile<64> tile, const T* x, int64_t stride, int cols,
                                                  TileTokens tokens, Vec<uint32_t, 4> uses) {
  constexpr int kTurns = TileTokens::kTurns, kStep = TileTokens::kRowStep;
  const int c = static_cast<int>(threadIdx.x) % 8, first = static_cast<int>(threadIdx.x) / 8;
  int token[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; i += 4) {
    const auto four = load_shared<Vec<int, 4>>(tokens.token_address(first) + i * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) token[i + j] = four[j];
  }
  const bool in_row = c * kChunk < cols;
  const T* from = x + c * kChunk;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int row = i * kStep + first;
    const bool valid = in_row && token[i] >= 0 && (uses[i * kStep / 32] >> (i * kStep % 32) >> first & 1);
    cp_async_16(tile.chunk(row, c), from + token[i] * stride, valid);
  }
}

// 64 outputs and 64 inputs of a weight to a tile [outputs][inputs], or, where its outputs are contiguous, [inputs]
// [outputs]. `outputs` and `inputs` are what is left of them; past those come zeros.
template <int kThreads, bool kTransposed, class T>
__device__ __forceinline__ void copy_weight_async(SharedTile<64> tile, const T* w, int64_t stride, int outputs,
                                                  int inputs) {
  copy_tile_async<64, 64, kThreads>(tile, w, stride, kTransposed ? inputs : outputs, kTransposed ? outputs : inputs);
}

template <class T>
__device__ __forceinline__ const T* weight_at(const RoutedWeight& w, int cls, int64_t output, int64_t input) {
  const T* data = static_cast<const T*>(w.data) + cls * w.class_stride;
  return data + (w.transposed ? input * w.stride + output : output * w.stride + input);
}

// The groups of a set, one after the other, 64 dimensions of each at a time.
struct GroupSteps {
  uint64_t left;  // this group and those to come
  int group, depth;

  __device__ __forceinline__ explicit GroupSteps(uint64_t groups) : left(groups), group(lowest_bit(groups)), depth(0) {}
  __device__ __forceinline__ void advance(int width) {
    depth += kHiddenBlock;
    if (depth < width) return;
    depth = 0, left &= left - 1, group = lowest_bit(left);
  }
};

// One step of a warp: acc[64 x 64] += A B^T, 64 deep, B as copy_weight_async left it. left(m, step, a) gives A's
// fragments. Those of the next 16 columns are asked for between the products of these, so that what `left` does to them
// runs beside the tensor cores.
template <class T, bool kTransposed, int kM, int kN, class Left>
__device__ __forceinline__ void multiply_step(float (&acc)[kM][kN][4], Left&& left, SharedTile<64> b) {
  static_assert(kN == 2 * kM, "one fragment of A for each two of B");
  constexpr int kSteps = kHiddenBlock / 16;
  const uint32_t lane = opaque(kTransposed ? lane_offset_halves<64>() : lane_offset_quarters<64>());
  uint32_t fa[2][kM][4];
#pragma unroll
  for (int m = 0; m < kM; ++m) left(m, 0, fa[0][m]);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int pair = 0; pair < kM; ++pair) {
      uint32_t fb[4];
      if constexpr (kTransposed) {
        load_b(fb, b, lane, 16 * step, 16 * pair);
      } else {
        load_b_transposed(fb, b, lane, 16 * pair, 16 * step);
      }
      if (step + 1 < kSteps) left(pair, step + 1, fa[(step + 1) % 2][pair]);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(acc[m][2 * pair], fa[step % 2][m], fb[0], fb[1]);
        mma_m16n8k16<T>(acc[m][2 * pair + 1], fa[step % 2][m], fb[2], fb[3]);
      }
    }
  }
}

// acc *= of(row) of a warp's rows.
template <int kM, int kN, class Of>
__device__ __forceinline__ void scale_rows(float (&acc)[kM][kN][4], Of&& of) {
  const int g = opaque_lane() / 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = of(16 * m + 8 * half + g);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        acc[m][n][2 * half] *= factor;
        acc[m][n][2 * half + 1] *= factor;
      }
    }
  }
}

// Shared memory: in each stage the rows of x, and the weight in two halves, one for each of two columns of warps.
struct HiddenStage {
  using Tile = SharedTile<64>;
  static __device__ __forceinline__ Tile x(int stage) { return {shared_base() + stage * HiddenTileShape::kStageBytes}; }
  static __device__ __forceinline__ Tile w(int stage, int half) {
    return {x(stage).base + Tile::bytes(HiddenTileShape::kM) + half * Tile::bytes(kHiddenBlock)};
  }
  static __device__ __forceinline__ TileTokens tokens() { return {shared_base() + HiddenTileShape::kBytes}; }
};

struct HiddenGatherWork {
  HiddenGatherParams p;
  Divisor columns;   // column tiles of a tile of tokens; they are neighbours, so that its rows stay in L2
  int part_columns;  // column tiles of a part
};

template <class T, bool kTransposed>
__global__ void __launch_bounds__(HiddenTileShape::kThreads, HiddenTileShape::kCtas) hidden_gather(
    const __grid_constant__ HiddenGatherWork work) {
  using Shape = HiddenTileShape;
  using Stage = HiddenStage;
  constexpr int kM = Shape::kWarpM / 16, kN = Shape::kWarpN / 8;
  const HiddenGatherParams& p = work.p;
  const Routes& r = p.routes;
  const int block = static_cast<int>(blockIdx.x), tile = work.columns.quotient(block);
  const int column = block - tile * work.columns.divisor;
  const int part = column / work.part_columns;
  const int first_in_part = (column - part * work.part_columns) * Shape::kN;
  const int cols = min(r.dense_width - first_in_part, Shape::kN);
  const int64_t first_col = int64_t{part} * r.dense_width + first_in_part;
  if (token_at(r, int64_t{tile} * kHiddenTile) < 0) return;  // no tokens

  const TileTokens tokens = Stage::tokens();
  tokens.load(r, tile);
  tokens.load_uses(r);
  uint64_t groups = groups_at(r, tile);
  if (r.out_mask != nullptr) groups &= static_cast<uint64_t>(load_global(r.out_mask + part));
  const int cls = class_at(r, tile);
  block_sync();

  const int steps = popcount(groups) * ceil_div(r.width, kHiddenBlock);
  GroupSteps now(groups), ahead(groups);
  const auto load = [&](int step, int stage) {
    const int64_t at = int64_t{ahead.group} * r.width + ahead.depth;
    copy_tokens_async(Stage::x(stage), static_cast<const T*>(p.x) + at, p.x_stride, r.width - ahead.depth, tokens,
                      tokens.rows_that_use(ahead.group));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = half * kHiddenBlock;
      copy_weight_async<Shape::kThreads, kTransposed>(Stage::w(stage, half),
                                                      weight_at<T>(p.w, cls, first_col + first, at), p.w.stride,
                                                      cols - first, r.width - ahead.depth);
    }
    ahead.advance(r.width);
    if (step == 0 && p.gates != nullptr) tokens.load_gates(r, p.gates);  // while the first copies are under way
  };
  const int warp_row = Shape::warp_row(), warp_col = Shape::warp_col();
  float acc[kM][kN][4] = {};
  pipeline<Shape::kStages>(steps, load, [&](int stage) {
    const uint32_t lane = opaque(lane_offset_halves<64>());
    const auto plain = [&](int m, int k, uint32_t (&a)[4]) {
      load_a(a, Stage::x(stage), lane, warp_row + 16 * m, 16 * k);
    };
    if (p.gates == nullptr) {
      multiply_step<T, kTransposed>(acc, plain, Stage::w(stage, warp_col / kHiddenBlock));
    } else {
      const int g = opaque_lane() / 4;
      float gates[kM][2];  // of this lane's rows
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) gates[m][i] = tokens.gate(now.group, warp_row + 16 * m + 8 * i + g);
      }
      multiply_step<T, kTransposed>(
          acc,
          [&](int m, int k, uint32_t (&a)[4]) {
            plain(m, k, a);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const auto pair = unpack2<T>(a[i]);
              a[i] = pack2<T>(pair[0] * gates[m][i % 2], pair[1] * gates[m][i % 2]);
            }
          },
          Stage::w(stage, warp_col / kHiddenBlock));
    }
    now.advance(r.width);
  });

  if (p.gates != nullptr && steps > 0) {
    scale_rows(acc, [&](int row) { return load_shared<float>(tokens.unit(r, warp_row + row)); });
  }
  const int cols_left = cols - warp_col;
  if (p.bias != nullptr) {
    add_bias(acc, static_cast<const T*>(p.bias) + cls * p.bias_stride + first_col + warp_col, cols_left);
  }
  const int64_t out_stride = int64_t{r.num_out} * r.dense_width;
  T* out = static_cast<T*>(p.out) + first_col + warp_col;
  for_each_vector<T>(acc, [&](int row, int col, const uint32_t (&v)[4]) {
    const int token = tokens.token(warp_row + row);
    if (token >= 0 && col < cols_left) {
      store_global(reinterpret_cast<Vec<uint32_t, 4>*>(out + token * out_stride + col),
                   Vec<uint32_t, 4>{{v[0], v[1], v[2], v[3]}});
    }
  });
}

// 64 outputs of one group.
struct GroupBlock {
  int group, first, cols;  // in the group; no columns past the last group
  bool active;             // the tile's union has the group
};

// Stores the accumulators of a warp, of the tile's rows from first_row on, of a block that has columns: with bias, as they
// are where ungated output is asked for, as dots with another tensor, and by the gates gate_of(row). Zeros where a token
// does not use the group. rows.token(row) and rows.mask(row) are those of a row of the tile.
template <class T, int kM, class Rows, class GateOf>
__device__ __forceinline__ void store_scattered(float (&acc)[kM][kHiddenBlock / 8][4], const HiddenScatterParams& p,
                                                const GroupBlock& block, int cls, const Rows& rows, int first_row,
                                                GateOf&& gate_of) {
  const Routes& r = p.routes;
  const int64_t first_col = int64_t{block.group} * r.width + block.first;
  if (p.bias != nullptr && block.active) {
    add_bias(acc, static_cast<const T*>(p.bias) + cls * p.bias_stride + first_col, block.cols);
  }
  const int64_t out_stride = int64_t{r.num_groups} * r.width;
  T* out = static_cast<T*>(p.out) + first_col;
  T* ungated = static_cast<T*>(p.ungated) + first_col;
  const T* dot_with = static_cast<const T*>(p.dot_with) + first_col;
  float* dots = p.dots;
  if (dots != nullptr && r.width > kHiddenBlock) {
    dots = p.dot_partials + int64_t{block.first / kHiddenBlock} * r.tokens * r.num_groups;
  }
  const auto used_at = [&](int row) { return static_cast<bool>(rows.mask(first_row + row) >> block.group & 1); };
  if (p.dot_with != nullptr || p.ungated != nullptr) {
    float dot = 0.f;
    for_each_vector<T>(acc, [&](int row, int col, const uint32_t (&v)[4]) {
      const int token = rows.token(first_row + row);
      if (token >= 0 && col < block.cols) {
        Vec<uint32_t, 4> z{{}};
        if (used_at(row)) {
          z = {{v[0], v[1], v[2], v[3]}};
          if (p.dot_with != nullptr) {
            const auto factor = load_global(reinterpret_cast<const Vec<T, 8>*>(dot_with + token * p.dot_stride + col));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const auto pair = unpack2<T>(v[i]);
              dot += pair[0] * to_float(factor[2 * i]) + pair[1] * to_float(factor[2 * i + 1]);
            }
          }
        }
        if (p.ungated != nullptr) {
          store_global(reinterpret_cast<Vec<uint32_t, 4>*>(ungated + token * out_stride + col), z);
        }
      }
      if (p.dot_with != nullptr &&
          col / 32 == kHiddenBlock / 32 - 1) {  // the last of the row's columns that this lane has
        const float sum = warp_reduce<4>(dot, Sum{});
        if (token >= 0 && lane_id() % 4 == 0) store_global(dots + int64_t{token} * r.num_groups + block.group, sum);
        dot = 0.f;
      }
    });
  }
  if (p.gates != nullptr) {
    scale_rows(acc, [&](int row) { return gate_of(first_row + row); });
  }
  for_each_vector<T>(acc, [&](int row, int col, const uint32_t (&v)[4]) {
    const int token = rows.token(first_row + row);
    if (token < 0 || col >= block.cols) return;
    Vec<uint32_t, 4> y{{}};
    if (used_at(row)) y = {{v[0], v[1], v[2], v[3]}};
    store_global(reinterpret_cast<Vec<uint32_t, 4>*>(out + token * out_stride + col), y);
  });
}

struct HiddenScatterWork {
  HiddenScatterParams p;
  Divisor columns;       // pairs of blocks of a tile of tokens
  Divisor group_blocks;  // blocks of 64 outputs of a group
  int blocks;            // of all groups
};

// Those of a warp, and of one half of the right operand.
__device__ __forceinline__ GroupBlock group_block(const HiddenScatterWork& work, int index, uint64_t groups) {
  GroupBlock block;
  block.group = work.group_blocks.quotient(index);
  block.first = (index - block.group * work.group_blocks.divisor) * kHiddenBlock;
  block.cols = index < work.blocks ? min(work.p.routes.width - block.first, kHiddenBlock) : 0;
  block.active = block.cols > 0 && (groups >> block.group & 1);
  return block;
}

template <class T, bool kTransposed>
__global__ void __launch_bounds__(HiddenTileShape::kThreads, HiddenTileShape::kCtas) hidden_scatter(
    const __grid_constant__ HiddenScatterWork work) {
  using Shape = HiddenTileShape;
  using Stage = HiddenStage;
  constexpr int kM = Shape::kWarpM / 16, kN = Shape::kWarpN / 8;
  const HiddenScatterParams& p = work.p;
  const Routes& r = p.routes;
  const int cta = static_cast<int>(blockIdx.x), tile = work.columns.quotient(cta);
  const int first_block = 2 * (cta - tile * work.columns.divisor);
  if (token_at(r, int64_t{tile} * kHiddenTile) < 0) return;  // no tokens

  const TileTokens tokens = Stage::tokens();
  tokens.load(r, tile);
  const uint64_t groups = groups_at(r, tile);
  const int cls = class_at(r, tile);
  const GroupBlock halves[2] = {group_block(work, first_block, groups), group_block(work, first_block + 1, groups)};
  block_sync();

  // The parts of the depth that either half sees.
  const auto sees = [&](int part, const GroupBlock& half) {
    if (!half.active) return false;
    return r.out_mask == nullptr ||
           static_cast<bool>(static_cast<uint64_t>(load_global(r.out_mask + part)) >> half.group & 1);
  };
  struct Step {
    int part, depth;
  };
  const auto settle = [&](Step& step) {
    while (step.part < r.num_out && !sees(step.part, halves[0]) && !sees(step.part, halves[1])) ++step.part;
  };
  const auto advance = [&](Step& step) {
    step.depth += kHiddenBlock;
    if (step.depth < r.dense_width) return;
    step.depth = 0, ++step.part;
    settle(step);
  };
  int parts = 0;
  for (int part = 0; part < r.num_out; ++part) parts += sees(part, halves[0]) || sees(part, halves[1]);
  const int steps = parts * ceil_div(r.dense_width, kHiddenBlock);
  Step now{0, 0}, ahead{0, 0};
  settle(now);
  settle(ahead);

  const auto load = [&](int /*step*/, int stage) {
    const int64_t at = int64_t{ahead.part} * r.dense_width + ahead.depth;
    copy_tokens_async(Stage::x(stage), static_cast<const T*>(p.x) + at, p.x_stride, r.dense_width - ahead.depth, tokens,
                      Vec<uint32_t, 4>{{~0u, ~0u, ~0u, ~0u}});
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const GroupBlock& b = halves[half];
      if (!sees(ahead.part, b)) continue;
      copy_weight_async<Shape::kThreads, kTransposed>(Stage::w(stage, half),
                                                      weight_at<T>(p.w, cls, int64_t{b.group} * r.width + b.first, at),
                                                      p.w.stride, b.cols, r.dense_width - ahead.depth);
    }
    advance(ahead);
  };
  const int warp_row = Shape::warp_row(), warp_col = Shape::warp_col();
  GroupBlock mine = halves[0];  // an array that is indexed at run time would go to the stack
  if (warp_col != 0) mine = halves[1];
  float acc[kM][kN][4] = {};
  pipeline<Shape::kStages>(steps, load, [&](int stage) {
    if (sees(now.part, mine)) {
      const uint32_t lane = opaque(lane_offset_halves<64>());
      multiply_step<T, kTransposed>(
          acc, [&](int m, int k, uint32_t (&a)[4]) { load_a(a, Stage::x(stage), lane, warp_row + 16 * m, 16 * k); },
          Stage::w(stage, warp_col / kHiddenBlock));
    }
    advance(now);
  });
  if (mine.cols <= 0) return;
  store_scattered<T>(acc, p, mine, cls, tokens, warp_row, [&](int row) {
    const int token = tokens.token(row);
    const float* gate = p.gates + int64_t{token} * r.num_groups + mine.group;
    return token >= 0 && (tokens.mask(row) >> mine.group & 1) ? load_global(gate) : 1.f;
  });
}

}  // namespace warpform
