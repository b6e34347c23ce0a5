// dQ of a block of queries, for deterministic=True: the CTA that owns the queries recomputes the scores against all
//           keys
// that they see and adds in a fixed order, so nothing is summed with atomics. Three products here and four in
// backward_dkdv.cuh instead of its five with DqMode::kAccumulate: 14 FLOP x head_dim a visible pair instead of 10 (18
// and 14 in the bucket of 256).
//
// Tile      64 queries of one sequence and head, 16 a warp, against 64 keys at a time.
// Loads     All threads copy with 16-byte cp.async: Q and dO once; V arrives while S runs, the next K after dS K.
// Products  S = Q K^T, dP = dO V^T, dQ += dS K with dS from registers.
// Measured  not yet.
#pragma once

#include "attention/backward_dkdv.cuh"

namespace warpform {

template <class T, int kHeadDim, class ScoreMod, class Mode>
__global__ void __launch_bounds__(32 * dq_tile().warps) varlen_attention_backward_queries(
    const __grid_constant__ typename Mode::BackwardParams params) {
  constexpr ForwardTile kTile = dq_tile();
  constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kThreads = 32 * kTile.warps;
  constexpr int kN = kBlockN / 8, kOut = kHeadDim / 8;
  static_assert(kBlockM == 16 * kTile.warps, "16 queries a warp");
  const AttentionProblem& p = params.problem;

  const SequenceTile tile = find_tile<kBlockM>(Mode::queries(p), static_cast<int>(blockIdx.x));
  const int tiles = ceil_div(tile.length, kBlockM);
  if (tile.index >= tiles) return;
  const int head = static_cast<int>(blockIdx.y);
  const int block_row = (p.window_right >= 0 ? tiles - 1 - tile.index : tile.index) * kBlockM;
  const int block_rows = min(kBlockM, tile.length - block_row);
  const int first_row = tile.begin + block_row;

  const bool no_sequence = tile.sequence < 0 || tile.sequence == p.batch;
  const auto keys = Mode::keys(p);
  const int k_begin = keys.begin(tile.sequence), k_end = keys.begin(tile.sequence + 1);
  const auto pair = Mode::pair(params, tile.length, max(k_end - k_begin, 0));
  const Range range_first = visible_keys(pair, block_row);
  const Range range_last = visible_keys(pair, block_row + block_rows - 1);
  const int n_first = range_first.first / kBlockN, n_last = ceil_div(range_last.last, kBlockN);
  if (no_sequence || n_first >= n_last) {
    Mode::template store_fully_masked_queries<kThreads, T>(params, head, first_row, block_rows);
    return;
  }

  using Tile = SharedTile<tile_cols(kHeadDim)>;
  const Tile tile_q{shared_base()};
  const Tile tile_do{tile_q.base + Tile::bytes(kBlockM)};
  const Tile tile_k{tile_do.base + Tile::bytes(kBlockM)};
  const Tile tile_v{tile_k.base + Tile::bytes(kBlockN)};
  const int head_kv = head / (p.heads_q / p.heads_kv);
  const T* q = static_cast<const T*>(p.q.data) + first_row * p.q.row_stride + head * p.q.head_stride +
               Mode::template batch_offset<Operand::kQ>(params, first_row);
  const T* d = static_cast<const T*>(params.dout.data) + first_row * params.dout.row_stride +
               head * params.dout.head_stride + Mode::template batch_offset<Operand::kDout>(params, first_row);
  const auto copy_keys = [&](Tile to, const HeadsView& from, int64_t batch_offset, int n) {
    const int64_t row = static_cast<int64_t>(k_begin) + n * kBlockN;
    const T* data =
        static_cast<const T*>(from.data) + row * from.row_stride + head_kv * from.head_stride + batch_offset;
    copy_tile_async<kBlockN, kHeadDim, kThreads>(to, data, from.row_stride, pair.k_limit - n * kBlockN, p.head_dim);
    cp_async_commit();
  };

  copy_tile_async<kBlockM, kHeadDim, kThreads>(tile_q, q, p.q.row_stride, block_rows, p.head_dim);
  copy_tile_async<kBlockM, kHeadDim, kThreads>(tile_do, d, params.dout.row_stride, block_rows, p.head_dim);
  const auto copy_k = [&](int n) {
    copy_keys(tile_k, p.k, Mode::template batch_offset<Operand::kK>(params, k_begin), n);
  };
  copy_k(n_first);

  const uint32_t score_tables = tile_v.base + Tile::bytes(kBlockN);
  ScoreMod::template prepare<kThreads>(p, score_tables);
  const ScoreMod score(p, pair, tile.sequence, head, tile.begin, score_tables);
  const int warp_row = warp_id() * 16;
  const bool warp_has_rows = warp_row < block_rows;
  const int g = lane_id() / 4, t = lane_id() % 4;
  Range range[2];
  float lse[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp_row + 8 * r + g;
    const bool inside = row < block_rows;
    const int64_t at = Mode::row(params, head, first_row) + row;
    range[r] = visible_keys(pair, block_row + row);
    lse[r] = inside ? lse_exponent(load_global(params.lse + at)) : INFINITY;
    delta[r] = inside ? load_global(params.delta + at) : 0.f;
  }
  float dq[1][kOut][4] = {};

  for (int n = n_first; n < n_last; ++n) {
    if (warp_has_rows) score.template gather<Side::kQueries>(warp_row, block_row + warp_row, n * kBlockN);
    cp_async_wait<0>();
    block_sync();  // K has landed. All warps are done with the previous V, so its buffer may be refilled.
    copy_keys(tile_v, p.v, Mode::template batch_offset<Operand::kV>(params, k_begin), n);
    float s[1][kN][4] = {};
    if (warp_has_rows) {
      mma_abt<T, kHeadDim>(s, tile_q, warp_row, tile_k, 0, p.head_dim);
      score.template add<Side::kQueries>(s, warp_row);
    }
    cp_async_wait<0>();
    block_sync();  // V has landed
    if (warp_has_rows) {
      float dp[1][kN][4] = {};
      mma_abt<T, kHeadDim>(dp, tile_do, warp_row, tile_v, 0, p.head_dim);
      const int i0 = block_row + warp_row + g, j0 = n * kBlockN + 2 * t;
      score.with_term(i0, j0, [&](const auto& term) {
        for_each_accumulator<1, kN>([&](int, int c, int e) {
          const int r = e / 2;
          const int j = j0 + 8 * c + e % 2;
          float slope;
          const float x = term(s[0][c][e], 8 * r, 8 * c + e % 2, slope);
          const float p_slope = exp2_approx(x * score.factor() - lse[r]) * slope;
          const bool counts = j >= range[r].first && j < range[r].last && p_slope != 0.f;
          s[0][c][e] = counts ? p_slope * (dp[0][c][e] - delta[r]) : 0.f;
        });
      });
      uint32_t ds[1][kN / 2][4];
      pack_accumulators<T>(ds, s);
      mma_packed_b<T>(dq, ds, tile_k, 0, p.head_dim);
      ScoreMod::Gradient::template add<Side::kQueries>(score, Mode::template table_gradient<Side::kQueries>(params),
                                                       ds[0], warp_row, block_row + warp_row, n * kBlockN);
    }
    block_sync();  // all warps are done with this K, so its buffer may be refilled
    if (n + 1 < n_last) copy_k(n + 1);
  }

  ScoreMod::Gradient::finish(score, Mode::template table_gradient<Side::kQueries>(params), warp_row,
                             block_row + warp_row);
  Mode::template epilogue_dq<T>(params, head, first_row + warp_row, block_rows - warp_row, tile_q, warp_row, dq[0]);
}

}  // namespace warpform
