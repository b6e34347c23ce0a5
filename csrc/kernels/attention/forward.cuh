// Forward of softmax attention over packed sequences: out = softmax(scores) V and the log-sum-exp of every row, by the
// online softmax of FlashAttention-2 (Dao, arXiv 2307.08691) on mma.sync.
//
// Tile      block_m queries of one sequence and head against block_n keys at a time (tiles.cuh). A CTA finds its tile
//           by a search (sequences.cuh). In causal attention the later tiles of a sequence, which are longer, come
//           first.
// Loads     All threads copy with 16-byte cp.async and fill zeros past the sequence and past head_dim. Q is loaded
//           once. K and V have one buffer each: V arrives while S = Q K^T runs, the next K while softmax and P V run.
// Registers A warp has 16 or 32 query rows: S, O, row maximum and sum. P goes from S's registers into the next product.
// Bounds    FLOP: 4 head_dim a visible pair, against the tensor cores' mma.sync rate. At head_dim 64 exp2 (16 a clock
//           and SM) takes as much time. Bytes: Q and O once, K and V once per query block, mostly from L2. Many
//           sequences of 16 to 64 tokens are bound by those bytes, 4 tokens x heads x head_dim x 2.
// Mode      A launch computes the whole attention (full_attention.cuh) or one step of it (step.cuh).
// Measured  H100 80GB HBM3, bfloat16. Batch 1 of 16384 tokens, 16 heads of 128: 6032 us, 365 TFLOP/s, 46 % of the
//           floor. Batch 8 of 2048 tokens, 32 heads of 64: 934 us, 294 TFLOP/s, 37 %. 16 sequences of up to 1007
//           tokens, 10064 in all, 12 heads of 64: 106 us, 202 TFLOP/s, 26 %.
#pragma once

#include "attention/full_attention.cuh"
#include "attention/tiles.cuh"
#include "device/softmax.cuh"

namespace warpform {

template <class T, int kHeadDim, bool kSmall, class ScoreMod, class Mode>
__global__ void __launch_bounds__(32 * forward_tile(kHeadDim, kSmall).warps) varlen_attention_forward(
    const __grid_constant__ typename Mode::ForwardParams params) {
  constexpr ForwardTile kTile = forward_tile(kHeadDim, kSmall);
  constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kThreads = 32 * kTile.warps;
  constexpr int kM = kBlockM / (16 * kTile.warps), kN = kBlockN / 8, kO = kHeadDim / 8;
  const AttentionProblem& p = params.problem;

  const SequenceTile tile = find_tile<kBlockM>(Mode::queries(p), static_cast<int>(blockIdx.x));
  const int tiles = ceil_div(tile.length, kBlockM);
  if (tile.index >= tiles) return;
  const int head = static_cast<int>(blockIdx.y);
  const int block_row = (p.window_right >= 0 ? tiles - 1 - tile.index : tile.index) * kBlockM;
  const int block_rows = min(kBlockM, tile.length - block_row);
  const int first_row = tile.begin + block_row;  // in the packed tensors
  if (tile.sequence < 0 || tile.sequence == p.batch) {
    Mode::template store_fully_masked_rows<kThreads, T>(params, head, first_row, block_rows);
    return;
  }

  const auto keys = Mode::keys(p);
  const int k_begin = keys.begin(tile.sequence), k_end = keys.begin(tile.sequence + 1);
  const auto pair = Mode::pair(params, tile.length, max(k_end - k_begin, 0));
  const int live_rows = min(block_rows, pair.q_limit - block_row);
  // First and last row see the lowest and the highest key of the block.
  const Range range_first = visible_keys(pair, block_row);
  const Range range_last = visible_keys(pair, block_row + block_rows - 1);
  const int n_first = range_first.first / kBlockN, n_last = ceil_div(range_last.last, kBlockN);
  if (live_rows <= 0 || n_first >= n_last) {
    Mode::template store_fully_masked_rows<kThreads, T>(params, head, first_row, block_rows);
    return;
  }

  using Tile = SharedTile<tile_cols(kHeadDim)>;
  const Tile tile_q{shared_base()};
  const Tile tile_k{tile_q.base + Tile::bytes(kBlockM)};
  const Tile tile_v{tile_k.base + Tile::bytes(kBlockN)};
  const int head_kv = head / (p.heads_q / p.heads_kv);
  const T* q = static_cast<const T*>(p.q.data) + first_row * p.q.row_stride + head * p.q.head_stride +
               Mode::template batch_offset<Operand::kQ>(params, first_row);
  const auto copy_keys = [&](Tile to, const HeadsView& from, int64_t batch_offset, int n) {
    const int64_t row = static_cast<int64_t>(k_begin) + n * kBlockN;
    const T* data =
        static_cast<const T*>(from.data) + row * from.row_stride + head_kv * from.head_stride + batch_offset;
    copy_tile_async<kBlockN, kHeadDim, kThreads>(to, data, from.row_stride, pair.k_limit - n * kBlockN, p.head_dim);
    cp_async_commit();
  };

  copy_tile_async<kBlockM, kHeadDim, kThreads>(tile_q, q, p.q.row_stride, live_rows, p.head_dim);
  const auto copy_k = [&](int n) {
    copy_keys(tile_k, p.k, Mode::template batch_offset<Operand::kK>(params, k_begin), n);
  };
  copy_k(n_last - 1);

  const uint32_t score_tables = tile_v.base + Tile::bytes(kBlockN);
  ScoreMod::template prepare<kThreads>(p, score_tables);
  const ScoreMod score(p, pair, tile.sequence, head, tile.begin, score_tables);
  const int warp_row = warp_id() * 16 * kM;
  const bool warp_has_rows = warp_row < live_rows;
  const int g = lane_id() / 4, t = lane_id() % 4;
  float o[kM][kO][4] = {};
  float row_max[kM][2], row_sum[kM][2] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m) row_max[m][0] = row_max[m][1] = negative_infinity();

  for (int n = n_last - 1; n >= n_first; --n) {
    if (warp_has_rows) score.template gather<Side::kQueries>(warp_row, block_row + warp_row, n * kBlockN);
    cp_async_wait<0>();
    block_sync();  // K has landed. All warps are done with the previous V, so its buffer may be refilled.
    copy_keys(tile_v, p.v, Mode::template batch_offset<Operand::kV>(params, k_begin), n);

    float s[kM][kN][4] = {};
    if (warp_has_rows) {
      mma_abt<T, kHeadDim>(s, tile_q, warp_row, tile_k, 0, p.head_dim);
      score.template add<Side::kQueries>(s, warp_row);
      const bool masked = n * kBlockN < range_last.first || (n + 1) * kBlockN > range_first.last;
      const int i0 = block_row + warp_row + g, j0 = n * kBlockN + 2 * t;
      score.with_term(i0, j0, [&](const auto& term) {
        for_each_accumulator<kM, kN>([&](int m, int c, int e) {
          float slope;
          s[m][c][e] = term(s[m][c][e], 16 * m + 8 * (e / 2), 8 * c + e % 2, slope);
        });
      });
      if (masked) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const Range upper = visible_keys(pair, i0 + 16 * m), lower = visible_keys(pair, i0 + 16 * m + 8);
          for_each_accumulator<1, kN>([&](int, int c, int e) {
            const int j = j0 + 8 * c + e % 2;
            const Range& range = e < 2 ? upper : lower;
            if (j < range.first || j >= range.last) s[m][c][e] = negative_infinity();
          });
        }
      }
    }

    cp_async_wait<0>();
    block_sync();  // V has landed. All warps are done with this K, so its buffer may be refilled.
    if (n > n_first) copy_k(n - 1);
    if (warp_has_rows) {
      online_softmax(s, o, row_max, row_sum, score.factor());
      uint32_t probabilities[kM][kN / 2][4];
      pack_accumulators<T>(probabilities, s);
      mma_packed_b<T>(o, probabilities, tile_v, 0, p.head_dim);
    }
  }

  typename Mode::template Epilogue<kM> epilogue(params, head, first_row + warp_row, block_rows - warp_row);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + 16 * m + 8 * r + g;
      finish_row(epilogue, m, r, o[m], row_max[m][r], row_sum[m][r], score.factor(), row < live_rows);
    }
  }
  epilogue.template write<T>(tile_q, warp_row, o);
}

}  // namespace warpform
