// Monarch Mixer's gated MLP in one pass (Fu et al., arXiv 2310.12109, section 4.1): z = x times the block-diagonal
// w_up, out = (gelu(z[:, :f]) * z[:, f:]) times the block-diagonal w_down + bias, f = blocks * inner.
//
// An output block o takes columns [o inner, (o + 1) inner) of the gated product, and these come from 2 blocks of x
// alone: w_up's rows go by halves of a block, inner each, and halves o and blocks + o belong to blocks o / 2 and
// (blocks + o) / 2. So a CTA has one output block, and the wide activations never leave the chip.
//
// Tile      128 rows (tokens) and up to 256 columns in and out of a block, or 64 and up to 512; eight warps. Both
//           blocks of x stay in shared memory, the output in registers, while the CTA walks over `inner`, 64 columns at
//           a time: two products up, the gate in registers, rounded to T in shared memory, one product down.
// Loads     All threads copy with 16-byte cp.async; weights in two stages of 32 KB: 128 deep of both halves, or 256
//           rows down.
// Bounds    6 blocks in inner FLOP a row (out as wide as in), so FLOP: floor at d = 768, 4 blocks, f = 3072, 7.2 ns a
//           row at mma.sync's 490 TFLOP/s on an H200. All weights come from L2 once for the tile's rows: 28 KB a row.
// Measured  H100 80GB HBM3, bfloat16, 16384 rows, d = 768, 4 blocks, f = 3072: 266 us, 218 TFLOP/s, 28 % of the floor.
#pragma once

#include "common/gelu.cuh"
#include "device/block_tile.cuh"
#include "monarch/launch.h"

namespace warpform {

template <int kM_, int kMaxWidth_, int kWarpsM_>
struct GluTile {
  static constexpr int kM = kM_;
  static constexpr int kMaxWidth = kMaxWidth_;  // columns of a block, in and out
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = 8 / kWarpsM_;
  static constexpr int kThreads = 256;
  static constexpr int kInner = 64;                     // columns of the gated product at a time
  static constexpr int kDepth = 256;                    // of a step up
  static constexpr int kDown = 256;                     // rows of w_down in a step down
  static constexpr int kParts = kMaxWidth / kDown;      // steps down
  static constexpr int kPanels = kDown / kWarpsN / 32;  // of 32 columns, dealt out to the warps by turns
  using Tile = SharedTile<64>;

  static constexpr int kStages = 2;
  static constexpr int kStageBytes = Tile::bytes(kDown);
  static_assert(kStageBytes == kDepth / 64 * Tile::bytes(kInner), "a step up is as large");
  static constexpr int bytes(int in) {
    return kStages * kStageBytes + Tile::bytes(kM) * (1 + 2 * ceil_div(in, Tile::kCols));
  }
};

// Tiles of rows by output block.
struct GluWork {
  GluParams p;
  Divisor blocks;
};

inline GluWork glu_work(const GluParams& p) {
  GluWork work{.p = p, .blocks = {}};
  work.blocks.set(p.blocks);
  return work;
}

// CTAs of a launch with the tile G.
template <class G>
int64_t glu_ctas(const GluParams& p) {
  return ceil_div(p.rows, int64_t{G::kM}) * p.blocks;
}

// Shared by forward and gradient: where a CTA is, its tiles in shared memory, and how weights come to them. For each
// 64 columns of `inner` there are steps of the first half of w_up, of the second, and of w_down.
template <class T, class G>
struct GluCta {
  using Tile = typename G::Tile;

  const GluParams& p;
  int block;
  int64_t first_row;
  int rows;
  int steps_half, steps_up, steps;  // of a half, of both, of all

  __device__ __forceinline__ explicit GluCta(const GluWork& work) : p(work.p) {
    const int cta = static_cast<int>(blockIdx.x), row_tile = work.blocks.quotient(cta);
    block = cta - row_tile * p.blocks;
    first_row = static_cast<int64_t>(row_tile) * G::kM;
    rows = static_cast<int>(min(p.rows - first_row, static_cast<int64_t>(G::kM)));
    steps_half = ceil_div(p.in, G::kDepth), steps_up = 2 * steps_half;
    steps = steps_up + ceil_div(p.out, G::kDown);
  }

  struct Step {
    int inner, step;
    __device__ __forceinline__ void advance(int steps) {
      if (++step == steps) step = 0, inner += G::kInner;
    }
  };

  static __device__ __forceinline__ Tile tile_up(int stage, int panel) {  // 64 columns of depth
    return Tile{shared_base() + stage * G::kStageBytes + panel * Tile::bytes(G::kInner)};
  }
  static __device__ __forceinline__ Tile tile_down(int stage) { return Tile{shared_base() + stage * G::kStageBytes}; }
  // The n-th tile of rows behind the stages, 64 columns each.
  static __device__ __forceinline__ Tile tile_rows(int n) {
    return Tile{shared_base() + G::kStages * G::kStageBytes + n * Tile::bytes(G::kM)};
  }

  // The CTA's rows of a matrix, `cols` columns where `from` points, to tiles of rows.
  __device__ __forceinline__ void load_rows(int first_tile, const T* from, int64_t stride, int cols) const {
    for (int col = 0; col < cols; col += Tile::kCols) {
      copy_tile_async<G::kM, Tile::kCols, G::kThreads>(tile_rows(first_tile + col / Tile::kCols), from + col, stride,
                                                       rows, cols - col);
    }
  }
  // The two blocks of x, from that tile on.
  __device__ __forceinline__ void load_x(int first_tile) const {
    for (int half = 0; half < 2; ++half) {
      const T* x = static_cast<const T*>(p.x) + first_row * p.x_stride + int64_t{(block + half * p.blocks) / 2} * p.in;
      load_rows(first_tile + half * ceil_div(p.in, Tile::kCols), x, p.x_stride, p.in);
    }
  }

  __device__ __forceinline__ void load_weights(Step at, int stage) const {
    const int inner_left = p.inner - at.inner;
    if (at.step < steps_up) {
      const int half = at.step >= steps_half, depth = (at.step - half * steps_half) * G::kDepth;
      const T* w =
          static_cast<const T*>(p.w_up) + (int64_t{block + half * p.blocks} * p.inner + at.inner) * p.in + depth;
#pragma unroll
      for (int panel = 0; panel < G::kDepth / Tile::kCols; ++panel) {
        const int left = p.in - depth - panel * Tile::kCols;
        if (left <= 0) break;
        copy_tile_async<G::kInner, Tile::kCols, G::kThreads>(tile_up(stage, panel), w + panel * Tile::kCols, p.in,
                                                             inner_left, left);
      }
    } else {
      const int row = (at.step - steps_up) * G::kDown;
      copy_tile_async<G::kDown, Tile::kCols, G::kThreads>(
          tile_down(stage), static_cast<const T*>(p.w_down) + (int64_t{block} * p.out + row) * p.inner + at.inner,
          p.inner, p.out - row, inner_left);
    }
  }

  // acc += the rows' tiles from first_tile on, by the step's half of w_up; the warp's rows and columns.
  template <int kM, int kN>
  __device__ __forceinline__ void multiply_up(float (&acc)[kM][kN][4], int step, int stage, int first_tile,
                                              int warp_row, int warp_col) const {
    const int half = step >= steps_half, panels = ceil_div(p.in, Tile::kCols);
    const int first_panel = (step - half * steps_half) * (G::kDepth / Tile::kCols);
#pragma unroll
    for (int i = 0; i < G::kDepth / Tile::kCols; ++i) {
      if (first_panel + i >= panels) break;
      mma_abt<T, Tile::kCols>(acc, tile_rows(first_tile + half * panels + first_panel + i), warp_row, tile_up(stage, i),
                              warp_col, Tile::kCols);
    }
  }
};

template <class T, class G>
__global__ void __launch_bounds__(G::kThreads, 1) glu_forward(const __grid_constant__ GluWork work) {
  constexpr int kM = G::kM / G::kWarpsM / 16, kUp = G::kInner / G::kWarpsN / 8;
  const GluParams& p = work.p;
  const GluCta<T, G> cta(work);
  const auto gated = cta.tile_rows(0);
  cta.load_x(1);

  const int warp_row = warp_id() / G::kWarpsN * (kM * 16), warp_n = warp_id() % G::kWarpsN;
  float out[G::kParts][G::kPanels][kM][4][4] = {};
  float up[kM][kUp][4] = {};
  uint32_t gelu[kM][kUp][2] = {};
  typename GluCta<T, G>::Step now{0, 0}, ahead{0, 0};
  const auto load = [&](int /*step*/, int stage) {
    cta.load_weights(ahead, stage);
    ahead.advance(cta.steps);
  };
  pipeline<G::kStages>(ceil_div(p.inner, G::kInner) * cta.steps, load, [&](int stage) {
    if (now.step < cta.steps_up) {
      cta.multiply_up(up, now.step, stage, 1, warp_row, warp_n * kUp * 8);
      if (now.step == cta.steps_half - 1) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kUp; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              gelu[m][n][r] = pack2<T>(ErfGelu::value(up[m][n][2 * r]), ErfGelu::value(up[m][n][2 * r + 1]));
              up[m][n][2 * r] = up[m][n][2 * r + 1] = 0.f;
            }
          }
        }
      } else if (now.step == cta.steps_up - 1) {
        const int lane = opaque_lane(), row = warp_row + lane / 4, col = warp_n * kUp * 8 + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kUp; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const Vec<float, 2> gate = unpack2<T>(gelu[m][n][r]);
              store_shared(gated.pair(row + 16 * m + 8 * r, col + 8 * n),
                           pack2<T>(gate[0] * up[m][n][2 * r], gate[1] * up[m][n][2 * r + 1]));
              up[m][n][2 * r] = up[m][n][2 * r + 1] = 0.f;
            }
          }
        }
      }
    } else {
      const uint32_t lane_a = opaque(lane_offset_halves<64>()), lane_b = opaque(lane_offset_quarters<64>());
      // Parts by name: the accumulators of one chosen at run time would lie in local memory.
      const auto down = [&]<int kPart>() {
#pragma unroll
        for (int k = 0; k < G::kInner; k += 16) {
          uint32_t a[kM][4];
#pragma unroll
          for (int m = 0; m < kM; ++m) load_a(a[m], gated, lane_a, warp_row + 16 * m, k);
#pragma unroll
          for (int panel = 0; panel < G::kPanels; ++panel) {
            const int col = (panel * G::kWarpsN + warp_n) * 32;
            if (kPart * G::kDown + col >= p.out) break;
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
              uint32_t b[4];
              load_b_transposed(b, cta.tile_down(stage), lane_b, col + 8 * n, k);
#pragma unroll
              for (int m = 0; m < kM; ++m) {
                mma_m16n8k16<T>(out[kPart][panel][m][n], a[m], b[0], b[1]);
                mma_m16n8k16<T>(out[kPart][panel][m][n + 1], a[m], b[2], b[3]);
              }
            }
          }
        }
      };
      if (now.step == cta.steps_up) {
        down.template operator()<0>();
      } else if constexpr (G::kParts > 1) {
        down.template operator()<1>();
      }
    }
    now.advance(cta.steps);
  });

  const int64_t stride = int64_t{p.blocks} * p.out;
#pragma unroll
  for (int part = 0; part < G::kParts; ++part) {
#pragma unroll
    for (int panel = 0; panel < G::kPanels; ++panel) {
      const int col = part * G::kDown + (panel * G::kWarpsN + warp_n) * 32;
      if (col >= p.out) continue;
      const int64_t at = int64_t{cta.block} * p.out + col;
      if (p.bias != nullptr) add_bias(out[part][panel], static_cast<const T*>(p.bias) + at, p.out - col);
      write_accumulators<T>(out[part][panel], static_cast<T*>(p.y) + (cta.first_row + warp_row) * stride + at, stride,
                            cta.rows - warp_row, p.out - col);
    }
  }
}

}  // namespace warpform
