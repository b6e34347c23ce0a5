// Forward of window attention: softmax(scale q k^T + bias + mask) v inside the windows of a grid, straight from qkv as
// the projection left it (Swin, Liu et al., arXiv 2103.14030; cosine attention, Swin V2, arXiv 2111.09883).
//
// Tile      64 queries of one window against 64 keys at a time, of one head (two up to 32 columns); a team of four
//           warps a head, 16 rows a warp. CTAs stay with their heads, whose bias they hold, and walk over windows.
// Loads     All threads copy with 16-byte cp.async; windows.cuh gathers the rows of tokens. The next step's copies are
//           in flight while a step is worked on. A step is a block of keys, with the queries where it is their first; a
//           window of up to 64 tokens is one step.
// Softmax   Online over blocks of keys (FlashAttention-2, arXiv 2307.08691); with one block it is the plain softmax.
// Bounds    8 N d bytes and 4 N^2 d FLOP a window of N tokens and head: bytes up to about N = 225, then exp2.
// Measured  H100 80GB HBM3, bfloat16, 3 heads of 32. 128 images of 56 x 56, windows of 7 x 7, shifted: 237 us, 1299
//           GB/s, 43 % of the floor. 64 images of 64 x 64, windows of 16 x 16: 356 us, 72 TFLOP/s, 19 %. 8 videos of 16
//           x 56 x 56, windows of 8 x 7 x 7: 964 us, 63 TFLOP/s, 11 %.
#pragma once

#include "device/softmax.cuh"
#include "window/scores.cuh"

namespace warpform {

// Q, K and V twice, and the rows of three windows: the current one, the one in flight, the one after it.
__host__ __device__ constexpr int window_forward_shared_bytes(const WindowProblem& p, int bucket) {
  return 6 * kBlock * window_cols(bucket) * 2 + WindowShared::bytes(p, window_teams(bucket), 3);
}

// CTAs that an SM holds at once: the registers are for as many.
__host__ __device__ constexpr int window_forward_ctas(int bucket) { return bucket == 64 ? 3 : 2; }

// Grid: CTAs that share the windows' blocks of queries; groups of heads.
template <class T, int kBucket>
__global__ void __launch_bounds__(window_threads(kBucket), window_forward_ctas(kBucket)) window_attention_forward(
    const __grid_constant__ WindowForwardParams params) {
  constexpr int kTeams = window_teams(kBucket), kN = kBlock / 8, kO = kBucket / 8;
  using Tile = SharedTile<window_cols(kBucket)>;
  using Position = WindowTile<kBucket>;
  const WindowProblem& p = params.problem;

  const auto tile = [&](int which, int stage) {  // of q, k or v
    return Tile{shared_base() + (2 * which + stage) * Tile::bytes(kBlock)};
  };
  const WindowShared shared(p, shared_base() + 6 * Tile::bytes(kBlock), kTeams, 3);
  shared.set<kBucket>(p, Position::first_head());
  const WindowScore<kBucket> score(p, shared);

  // An item is a block of queries of a window. Its rows are made two items ahead of its work, its loads begin one step
  // ahead, and each barrier in the loop separates the three.
  const int items = p.windows * p.blocks.divisor, stride = static_cast<int>(gridDim.x);
  const auto set_rows = [&](int slot, int item) {
    if (item >= items) return;
    shared.tokens.set_rows<window_threads(kBucket)>(shared.rows(slot), p, window_at(p, p.blocks.quotient(item)));
  };
  const auto fetch = [&](int slot, int item, int n, int stage_q, int stage) {
    const int index = p.blocks.quotient(item), first_query = (item - index * p.blocks.divisor) * kBlock;
    const int image = window_at(p, index).image;
    const auto copy = [&](Tile to, int which, int first) {
      copy_rows_async<kBucket>(to, qkv_rows<T>(p, which, image, Position::first_head()), shared.rows(slot), first, p);
    };
    if (n == 0) copy(tile(0, stage_q), 0, first_query);
    copy(tile(1, stage), 1, n * kBlock);
    copy(tile(2, stage), 2, n * kBlock);
    cp_async_commit();
  };

  const int first_item = static_cast<int>(blockIdx.x);
  set_rows(0, first_item);
  set_rows(1, first_item + stride);
  block_sync();
  fetch(0, first_item, 0, 0, 0);

  int slot = 0, stage_q = 0, stage = 0;
  for (int item = first_item; item < items; item += stride) {
    const int next_slot = slot == 2 ? 0 : slot + 1;
    const int index = p.blocks.quotient(item), first_query = (item - index * p.blocks.divisor) * kBlock;
    const Window window = window_at(p, index);
    const bool warp_has_rows = Position::head() < p.heads && first_query + Position::row() < p.tokens;
    float o[1][kO][4] = {};
    float row_max[1][2] = {{negative_infinity(), negative_infinity()}}, row_sum[1][2] = {};
    for (int n = 0; n < p.blocks.divisor; ++n) {
      cp_async_wait<0>();
      block_sync();  // this step has landed; all warps are done with the previous one, so its buffers may be refilled
      if (n == 0) set_rows(next_slot == 2 ? 0 : next_slot + 1, item + 2 * stride);
      if (n + 1 < p.blocks.divisor) {
        fetch(slot, item, n + 1, stage_q, 1 - stage);
      } else if (item + stride < items) {
        fetch(next_slot, item + stride, 0, 1 - stage_q, 1 - stage);
      }
      if (score.cosine) {
        set_inverse_norms<kBucket, T>(shared, tile(0, stage_q), tile(1, stage));
        block_sync();
      }
      if (warp_has_rows) {
        float s[1][kN][4] = {};
        mma_abt<T, kBucket>(s, tile(0, stage_q), Position::row(), tile(1, stage), 0, p.head_dim, Position::col());
        score.query_rows(s[0], window, first_query + Position::row(), Position::row(), n * kBlock);
        hide_columns(s[0], n * kBlock, p.tokens);
        online_softmax(s, o, row_max, row_sum, 1.f);
        uint32_t probabilities[1][kN / 2][4];
        pack_accumulators<T>(probabilities, s);
        mma_packed_b<T>(o, probabilities, tile(2, stage), Position::col(), p.head_dim);
      }
      stage = 1 - stage;
    }

    if (warp_has_rows) {
      // O goes through the warp's own rows of Q's tile, so that each lane stores 16 bytes.
      const Tile staging = tile(0, stage_q);
      const int lane = opaque_lane(), g = lane / 4, t = lane % 4;
      float inverse[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = warp_reduce<4>(row_sum[0][r], Sum{});
        inverse[r] = sum == 0.f ? 0.f : reciprocal_approx(sum);  // of a row that sees no key, o is 0
        const int row = first_query + Position::row() + 8 * r + g;
        if (params.lse != nullptr && t == 0 && row < p.tokens) {
          const int64_t at = (static_cast<int64_t>(index) * p.heads + Position::head()) * p.tokens + row;
          store_global(params.lse + at, (row_max[0][r] + log2_approx(sum)) * kLn2);
        }
      }
      warp_sync();
      store_accumulators<T>(staging, Position::row(), Position::col(), o[0], inverse[0], inverse[1], lane);
      warp_sync();
      T* out = static_cast<T*>(params.out) + image_begin(p, window.image) * p.width + Position::head() * p.head_dim;
      write_token_rows<kBucket>(staging, Position::row(), Position::col(), out, p.width, shared.rows(slot),
                                first_query + Position::row(), p.head_dim);
    }
    slot = next_slot;
    stage_q = 1 - stage_q;
  }
}

}  // namespace warpform
