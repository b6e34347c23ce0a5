// Gradient of the weight of a routed linear layer: dw = the sum over tokens of dense[t] (gates[t, g] routed[t, g])^T.
//
// Tile      128 dimensions of the dense side by two blocks of 64 of the routed side, which may be of two groups; four
//           warps of 64 x 64; 64 tokens at a time, in the plan's order.
// Loads     all threads, 16-byte cp.async of rows that the copies gather, three stages. A CTA first lists the tiles of
//           its range whose union has one of its groups: the others cost nothing. Tokens, masks and gates are asked for
//           4, 3 and 2 steps before they are used: a mask's address follows from its token, a gate's from the mask.
// Gates     multiply the routed operand's fragments on their way from shared memory, beside the products of the
//           fragments before, in float32, rounded once.
// Sums      float32. Ranges of tiles leave partial sums that column_sum.cuh adds in a fixed order: no atomics.
// Bounds    as routed_gemm.cuh, with tokens as depth: 2 tokens O (groups in use) m FLOP; but a CTA of a group that all
//           tokens use goes through all of them, and with few CTAs, as at d = 2048, it decides the time.
// Measured  192 us on an H100 (d = 2048, half in use, 8192 tokens), 179 TFLOP/s of useful work; cuBLAS takes 86 us for
//           the dense gradient. It was 412 us when each step waited for its tokens, their masks and their gates one
//           after the other.
#pragma once

#include "routing/routed_gemm.cuh"

namespace warpform {

struct HiddenWeightGradWork {
  HiddenWeightGradParams p;
  int dense_tiles;       // tiles of 128 dimensions of the dense side, over all parts
  int part_tiles;        // tiles of one part
  int pairs;             // pairs of blocks of the routed side
  Divisor group_blocks;  // blocks of one group
  int blocks;            // blocks of all groups
  int range;             // tiles of tokens of one split
};

// Tokens that a stage holds, and the gates of both halves; then the list of tiles.
struct GradStage {
  static constexpr int kTokens = HiddenTileShape::kDepth;
  static constexpr int kGateBytes = 2 * kTokens * 4;
  static constexpr int kTokenBytes = kTokens * 8;  // the token, and which halves it uses
  static constexpr int kGatePlaces = HiddenTileShape::kStages + 1;

  static __device__ __forceinline__ SharedTile<128> dense(int stage) {
    return {shared_base() + stage * HiddenTileShape::kStageBytes};
  }
  static __device__ __forceinline__ SharedTile<64> routed(int stage, int half) {
    return {dense(stage).base + SharedTile<128>::bytes(kTokens) + half * SharedTile<64>::bytes(kTokens)};
  }
  // One place more than stages: those of the step after the last one loaded are kept while the first is worked on.
  static __device__ __forceinline__ uint32_t gate(int step, int half, int row) {
    return shared_base() + HiddenTileShape::kBytes + step % kGatePlaces * kGateBytes + (half * kTokens + row) * 4;
  }
  // The tokens of the step that is loaded and those of the step after it take two places in turn.
  static __device__ __forceinline__ uint32_t token(int step, int row) {
    return shared_base() + HiddenTileShape::kBytes + kGatePlaces * kGateBytes + step % 2 * kTokenBytes + row * 8;
  }
  static __device__ __forceinline__ uint32_t list() { return token(0, 0) + 2 * kTokenBytes; }
  __host__ __device__ static constexpr int bytes(int range) {
    return HiddenTileShape::kBytes + kGatePlaces * kGateBytes + 2 * kTokenBytes + 4 * (range + 1);
  }
};

template <class T>
__global__ void __launch_bounds__(HiddenTileShape::kThreads, HiddenTileShape::kCtas) hidden_weight_grad(
    const __grid_constant__ HiddenWeightGradWork work) {
  using Shape = HiddenTileShape;
  constexpr int kM = Shape::kWarpM / 16, kN = Shape::kWarpN / 8;
  constexpr int kTokens = GradStage::kTokens, kSteps = kHiddenTile / kTokens;  // of a tile
  const HiddenWeightGradParams& p = work.p;
  const Routes& r = p.routes;
  const int thread = static_cast<int>(threadIdx.x);

  // CTAs of one range are neighbours: its rows stay in L2. Within it those of one pair: the pairs of groups that all
  // tokens use, mostly the first, have more to do than others and go to different SMs that way.
  int cta = static_cast<int>(blockIdx.x);
  const int dense_tile = cta % work.dense_tiles;
  cta /= work.dense_tiles;
  const int pair = cta % work.pairs;
  cta /= work.pairs;
  const int cls = cta % r.num_classes, split = cta / r.num_classes;
  const int part = dense_tile / work.part_tiles;
  const int first_in_part = (dense_tile - part * work.part_tiles) * Shape::kM;
  const int rows = min(r.dense_width - first_in_part, Shape::kM);
  const int64_t first_dense = int64_t{part} * r.dense_width + first_in_part;

  struct Half {
    int group, first, cols;
    bool active;
  };
  const auto half_of = [&](int block) {
    const int group = work.group_blocks.quotient(block);
    const int first = (block - group * work.group_blocks.divisor) * kHiddenBlock;
    const int cols = block < work.blocks ? min(r.width - first, kHiddenBlock) : 0;
    bool active = cols > 0;
    if (active && r.out_mask != nullptr) {
      active = static_cast<uint64_t>(load_global(r.out_mask + part)) >> group & 1;
    }
    return Half{group, first, cols, active};
  };
  const Half halves[2] = {half_of(2 * pair), half_of(2 * pair + 1)};
  const auto half_at = [&](int half) {  // an array that is indexed at run time would go to the stack
    Half mine = halves[0];
    if (half != 0) mine = halves[1];
    return mine;
  };
  const auto halves_of = [&](uint64_t mask) {
    return (halves[0].active ? mask >> halves[0].group & 1 : 0) | (halves[1].active ? mask >> halves[1].group & 1 : 0)
                                                                      << 1;
  };

  // The tiles to go through, in order: one warp lists them, 32 at a time.
  const int first_tile = split * work.range, last_tile = min(first_tile + work.range, r.tiles);
  const uint32_t list = GradStage::list();
  if (warp_id() == 0) {
    int count = 0;
    for (int i = first_tile; i < last_tile; i += kWarpSize) {
      const int tile = i + lane_id();
      bool takes = tile < last_tile;
      takes = takes && halves_of(groups_at(r, tile)) != 0 && class_at(r, tile) == cls;
      const uint32_t those = ballot(takes);
      if (takes) store_shared(list + 4 * (1 + count + popcount(those & ((1u << lane_id()) - 1))), tile);
      count += popcount(those);
    }
    if (lane_id() == 0) store_shared(list, count);
  }
  block_sync();
  const int steps = load_shared<int>(list) * kSteps;

  // A token of a step, the halves that it uses, and its gates. The addresses of the halves and of the gates follow from
  // the token. Threads 0 to 63 load one of the three a step, and use it in a later step, when it has arrived.
  struct Fetched {
    int token, uses;
    float gates[2];
  };
  const bool fetches = thread < kTokens;
  const auto ask_token = [&](int step) {
    if (!fetches || step >= steps) return -1;
    const int tile = load_shared<int>(list + 4 * (1 + step / kSteps));
    return load_global(r.perm + int64_t{tile} * kHiddenTile + step % kSteps * kTokens + thread);
  };
  const auto bounded = [&](int token) { return token < r.tokens ? token : -1; };
  const auto ask_mask = [&](int token) {
    return token < 0 ? 0 : static_cast<uint64_t>(load_global(r.group_mask + token));
  };
  const auto ask_gates = [&](int token, uint64_t mask) {
    Fetched f{token, static_cast<int>(halves_of(mask)), {0.f, 0.f}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (f.uses >> half & 1 && p.gates != nullptr) {
        f.gates[half] = load_global(p.gates + int64_t{token} * r.num_groups + halves[half].group);
      }
    }
    return f;
  };
  const auto keep = [&](int step, const Fetched& f) {
    if (!fetches) return;
    store_shared(GradStage::token(step, thread), Vec<int, 2>{{f.token, f.uses}});
#pragma unroll
    for (int half = 0; half < 2; ++half) store_shared(GradStage::gate(step, half, thread), f.gates[half]);
  };
  const int token0 = bounded(ask_token(0)), token1 = bounded(ask_token(1));
  int masked = bounded(ask_token(2));  // the token whose mask has been asked for
  int asked = ask_token(3);            // the token that has been asked for
  const uint64_t mask0 = ask_mask(token0), mask1 = ask_mask(token1);
  uint64_t mask = ask_mask(masked);
  keep(0, ask_gates(token0, mask0));
  Fetched next = ask_gates(token1, mask1);
  block_sync();

  const auto load = [&](int step, int stage) {
    if (step > 0 && step < Shape::kStages - 1) block_sync();  // the first loads follow each other with none between
    // 16 chunks of a row of `dense`, 8 of each half: a thread has the same column and the same rows of both.
    constexpr int kRowStep = Shape::kThreads / 16, kTurns = kTokens / kRowStep;
    const int c = thread % 16, half = c / 8;
    const Half mine = half_at(half);
    const int dense_left = rows - c * kChunk, left = mine.cols - c % 8 * kChunk;
    const T* dense = static_cast<const T*>(p.dense) + first_dense + c * kChunk;
    const T* routed = static_cast<const T*>(p.routed) + int64_t{mine.group} * r.width + mine.first + c % 8 * kChunk;
    Vec<int, 2> tokens[kTurns];  // before the first copy: behind it each would wait for shared memory
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      tokens[i] = load_shared<Vec<int, 2>>(GradStage::token(step, i * kRowStep + thread / 16));
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = i * kRowStep + thread / 16;
      const bool any = tokens[i][1] != 0 && dense_left > 0;
      const bool uses = (tokens[i][1] >> half & 1) && left > 0;
      cp_async_16(GradStage::dense(stage).chunk(row, c), dense + tokens[i][0] * p.dense_stride, any);
      cp_async_16(GradStage::routed(stage, half).chunk(row, c % 8), routed + tokens[i][0] * p.routed_stride, uses);
    }
    keep(step + 1, next);
    next = ask_gates(masked, mask);
    masked = bounded(asked);
    mask = ask_mask(masked);
    asked = ask_token(step + 4);
  };
  const int warp_row = Shape::warp_row(), half = Shape::warp_col() / kHiddenBlock;
  float acc[kM][kN][4] = {};
  int now = 0;
  pipeline<Shape::kStages>(steps, load, [&](int stage) {
    const uint32_t lane_a = opaque(lane_offset_quarters<128>()), lane_b = opaque(lane_offset_halves<64>());
    const int t = opaque_lane() % 4;
    const auto multiply = [&]<bool kGates>() {
#pragma unroll 2
      for (int k = 0; k < kTokens; k += 16) {
        uint32_t a[kM][4], b[2][4];
        float gates[4];  // of tokens 2t, 2t + 1, and 8 further
        if constexpr (kGates) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            gates[i] = load_shared<float>(GradStage::gate(now, half, k + i / 2 * 8 + 2 * t + i % 2));
          }
        }
        const auto right = [&](int n, uint32_t (&to)[4]) {
          load_b(to, GradStage::routed(stage, half), lane_b, k, 8 * n);
          if constexpr (kGates) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const auto two = unpack2<T>(to[i]);
              to[i] = pack2<T>(two[0] * gates[i % 2 * 2], two[1] * gates[i % 2 * 2 + 1]);
            }
          }
        };
#pragma unroll
        for (int m = 0; m < kM; ++m) load_a_transposed(a[m], GradStage::dense(stage), lane_a, k, warp_row + 16 * m);
        right(0, b[0]);
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
          const int place = n / 2 % 2;
          if (n + 2 < kN) right(n + 2, b[1 - place]);  // beside the products of this
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            mma_m16n8k16<T>(acc[m][n], a[m], b[place][0], b[place][1]);
            mma_m16n8k16<T>(acc[m][n + 1], a[m], b[place][2], b[place][3]);
          }
        }
      }
    };
    if (p.gates != nullptr) {
      multiply.template operator()<true>();
    } else {
      multiply.template operator()<false>();
    }
    ++now;
  });

  const Half mine = half_at(half);
  const int64_t num_routed = int64_t{r.num_groups} * r.width, num_dense = int64_t{r.num_out} * r.dense_width;
  const int64_t first_routed = int64_t{mine.group} * r.width + mine.first;
  float* dw = p.splits == 1 ? p.dw : p.partials + int64_t{split} * r.num_classes * num_routed * num_dense;
  dw += cls * num_routed * num_dense;
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = warp_row + 16 * m + 8 * e + g;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int col = 8 * n + 2 * t;
        if (row >= rows || col >= mine.cols) continue;
        const float x = acc[m][n][2 * e], y = acc[m][n][2 * e + 1];
        if (p.routed_out) {
          float* to = dw + (first_routed + col) * num_dense + first_dense + row;
          store_global(to, x);
          store_global(to + num_dense, y);
        } else {
          float* to = dw + (first_dense + row) * num_routed + first_routed + col;
          store_global(reinterpret_cast<Vec<float, 2>*>(to), Vec<float, 2>{{x, y}});
        }
      }
    }
  }
}

}  // namespace warpform
