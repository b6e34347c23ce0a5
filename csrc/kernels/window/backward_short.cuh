// Backward of window attention for windows of up to 64 tokens: one pass, everything on chip.
//
// Tile      A window of one head (two up to 32 columns), a team of four warps a head, 16 query rows a warp. CTAs stay
//           with their heads and walk over windows.
// Loads     All threads copy Q, K, V and dO of the window with 16-byte cp.async; the other CTA of the SM works
//           meanwhile.
// Products  S = Q K^T, P = softmax; dP = dO V^T, dS = P (dP - rowsum(P dP)), so neither the output nor a log-sum-exp is
//           read; dQ = dS K from registers. P, then dS go through shared memory for dV = P^T dO and dK = dS^T Q, of
//           which a warp owns 16 keys.
// Sums      Over the CTA's windows, in shared memory, each entry by one thread: dS for the bias table (a pair of places
//           is the same in every window), dk and dv of padded tokens, and for logit_scale. Each CTA leaves one partial
//           sum; table_gradient.cuh and column_sum.cuh add them up in a fixed order. No atomics: the bits repeat on one
//           model of GPU.
// Bounds    14 N d bytes and 10 N^2 d FLOP a window and head: bytes.
// Measured  H100 80GB HBM3, bfloat16, 128 images of 56 x 56, windows of 7 x 7, shifted, 3 heads of 32: 437 us, SM
//           53 %, DRAM 36 %; 738 us with forward and sums, 38 % of the floor.
#pragma once

#include "window/gradients.cuh"

namespace warpform {

// CTAs that an SM holds at once: the registers are for as many.
__host__ __device__ constexpr int window_backward_short_ctas(int bucket) { return bucket == 64 ? 3 : 2; }

template <int kBucket>
__host__ __device__ constexpr int window_backward_short_bytes(const WindowProblem& p) {
  const int teams = window_teams(kBucket);
  return 4 * kBlock * window_cols(kBucket) * 2 + teams * kBlock * kBlock * 2 +
         (p.table != nullptr ? ScoreSums<kBucket>::kBytes : 0) + WindowShared::bytes(p, teams) +
         ScaleSums<kBucket>::bytes(p) + (p.qkv_bias != nullptr ? PaddingSums<kBucket>::kBytes : 0) +
         (p.logit_scale != nullptr ? teams * 2 * kBlock * 4 : 0);
}

// Grid: CTAs that share the windows; groups of heads.
template <class T, int kBucket>
__global__ void __launch_bounds__(window_threads(kBucket), window_backward_short_ctas(kBucket))
window_attention_backward_short(const __grid_constant__ WindowBackwardParams params) {
  constexpr int kTeams = window_teams(kBucket), kN = kBlock / 8, kO = kBucket / 8;
  using Tile = SharedTile<window_cols(kBucket)>;
  using Square = SharedTile<kBlock>;
  using Position = WindowTile<kBucket>;
  const WindowProblem& p = params.problem;
  const bool has_table = p.table != nullptr, has_padding = p.qkv_bias != nullptr;

  const Tile tile_q{shared_base()};
  const Tile tile_k{tile_q.base + Tile::bytes(kBlock)};
  const Tile tile_v{tile_k.base + Tile::bytes(kBlock)};
  const Tile tile_do{tile_v.base + Tile::bytes(kBlock)};
  const uint32_t squares = tile_do.base + Tile::bytes(kBlock);
  const ScoreSums<kBucket> score_sums{squares + kTeams * Square::bytes(kBlock)};
  const uint32_t rest = score_sums.base + (has_table ? ScoreSums<kBucket>::kBytes : 0);
  const WindowShared shared(p, rest, kTeams);
  const ScaleSums<kBucket> scale_sums{rest + WindowShared::bytes(p, kTeams)};
  const PaddingSums<kBucket> padding_sums{scale_sums.base + ScaleSums<kBucket>::bytes(p)};
  // Inverse norms of the unscaled rows; WindowShared's are those of lengthened rows.
  const uint32_t original_norms = padding_sums.base + (has_padding ? PaddingSums<kBucket>::kBytes : 0);

  const bool has_head = Position::head() < p.heads;
  const auto square = [&] { return Square{squares + Position::team() * Square::bytes(kBlock)}; };  // P, then dS
  const auto team_sync = [&] { named_barrier_sync(1 + Position::team(), kTeamThreads); };
  const auto original = [&](uint32_t norms) { return norms - shared.norms + original_norms; };
  shared.set<kBucket>(p, Position::first_head());
  if (has_table) score_sums.clear();
  if (has_padding) padding_sums.clear();
  if (p.logit_scale != nullptr) scale_sums.clear();
  const WindowScore<kBucket> score(p, shared);

  for (int index = static_cast<int>(blockIdx.x); index < p.windows; index += static_cast<int>(gridDim.x)) {
    const Window window = window_at(p, index);
    begin_window<kBucket>(shared, p, window);
    const auto copy = [&](Tile to, const TokenRows<T>& from) {
      copy_rows_async<kBucket>(to, from, shared.rows(), 0, p);
    };
    copy(tile_q, qkv_rows<T>(p, 0, window.image, Position::first_head()));
    copy(tile_k, qkv_rows<T>(p, 1, window.image, Position::first_head()));
    copy(tile_v, qkv_rows<T>(p, 2, window.image, Position::first_head()));
    copy(tile_do, out_rows<T>(p, params.dout, window.image, Position::first_head()));
    cp_async_commit();
    cp_async_wait<0>();
    block_sync();
    if (score.cosine) {
      set_inverse_norms<kBucket, T>(shared, tile_q, tile_k, true, true, original_norms);
      block_sync();
    }
    if (!has_head) continue;  // a whole team

    const auto write = [&](const float (&acc)[kO][4], float factor, int which) {
      const int64_t at = (image_begin(p, window.image) * 3 + which) * p.width;
      // V's rows are not read again once the whole team has dP.
      write_gradient<kBucket>(acc, factor, tile_v, Position::row(), Position::col(),
                              static_cast<T*>(params.dqkv) + at + Position::head() * p.head_dim, 3 * p.width,
                              shared.rows(), Position::row(), p.head_dim);
    };

    uint32_t packed_ds[1][kN / 2][4];
    {
      float s[1][kN][4] = {};
      mma_abt<T, kBucket>(s, tile_q, Position::row(), tile_k, 0, p.head_dim, Position::col());
      score.query_rows(s[0], window, Position::row(), Position::row(), 0);
      hide_columns(s[0], 0, p.tokens);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = negative_infinity(), sum = 0.f;
#pragma unroll
        for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[0][n][2 * r], s[0][n][2 * r + 1]));
        top = warp_reduce<4>(top, Max{});
        if (top == negative_infinity()) top = 0.f;  // a row that sees no key: its exponentials are 0 and not NaN
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            s[0][n][e] = exp2_approx(s[0][n][e] - top);
            sum += s[0][n][e];
          }
        }
        sum = warp_reduce<4>(sum, Sum{});
        const float inverse = sum == 0.f ? 0.f : reciprocal_approx(sum);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          s[0][n][2 * r] *= inverse;
          s[0][n][2 * r + 1] *= inverse;
        }
      }
      store_accumulators<T>(square(), Position::row(), 0, s[0], 1.f, 1.f, opaque_lane());

      float dp[1][kN][4] = {};
      mma_abt<T, kBucket>(dp, tile_do, Position::row(), tile_v, 0, p.head_dim, Position::col());
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float delta = 0.f;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          delta += s[0][n][2 * r] * dp[0][n][2 * r] + s[0][n][2 * r + 1] * dp[0][n][2 * r + 1];
        }
        delta = warp_reduce<4>(delta, Sum{});
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) s[0][n][e] *= dp[0][n][e] - delta;
        }
      }
      if (has_table) score_sums.add(s[0]);
      team_sync();  // P is complete; the team is done with V, so its buffer may be overwritten

      float dq[1][kO][4] = {};
      if (score.cosine) {
        float weighted[1][kN][4];
        for_each_accumulator<1, kN>([&](int m, int n, int e) { weighted[m][n][e] = s[m][n][e]; });
        scale_columns(weighted[0], score.key_norms());
        pack_accumulators<T>(packed_ds, weighted);
        mma_packed_b<T>(dq, packed_ds, tile_k, Position::col(), p.head_dim);
        const uint32_t norms = score.query_norms() + Position::row() * 4;
        scale_sums.add(score.gradient_factor() *
                       finish_cosine<T>(dq[0], tile_q, Position::row(), Position::col(), norms, original(norms)));
        scale_rows(s[0], norms);
        pack_accumulators<T>(packed_ds, s);
      } else {
        pack_accumulators<T>(packed_ds, s);
        mma_packed_b<T>(dq, packed_ds, tile_k, Position::col(), p.head_dim);
      }
      write(dq[0], score.gradient_factor(), 0);
    }

    const auto product_of_keys = [&](float (&acc)[1][kO][4], Tile right) {
      const Square left = square();
      const uint32_t lane = opaque(lane_offset_quarters<kBlock>() ^ (Position::row() * 2));
      mma_ab<T, kBlock / 16>(
          acc, [&](int, int step, uint32_t (&a)[4]) { load_a_transposed(a, left, lane, 16 * step, 0); }, right, 0,
          Position::col(), p.head_dim);
    };
    {
      float dv[1][kO][4] = {};
      product_of_keys(dv, tile_do);
      if (has_padding) padding_sums.add(dv[0], 1, shared.rows(), Position::row(), 1.f);
      write(dv[0], 1.f, 2);
    }
    team_sync();  // the team is done with P, so its buffer may be overwritten
    store_packed(square(), Position::row(), packed_ds[0]);
    team_sync();
    {
      float dk[1][kO][4] = {};
      product_of_keys(dk, tile_q);
      if (score.cosine) {
        const uint32_t norms = score.key_norms() + Position::row() * 4;
        finish_cosine<T>(dk[0], tile_k, Position::row(), Position::col(), norms, original(norms));
      }
      if (has_padding) padding_sums.add(dk[0], 0, shared.rows(), Position::row(), score.gradient_factor());
      write(dk[0], score.gradient_factor(), 1);
    }
  }

  block_sync();
  const int share = static_cast<int>(blockIdx.x);
  if (has_table && has_head) {
    const int64_t at = (static_cast<int64_t>(share) * p.heads + Position::head()) * p.tokens * p.tokens;
    score_sums.write(params.table_sums + at, p.tokens, Position::row(), 0);
  }
  if (has_padding) padding_sums.write(p, params.padding_sums, share);
  if (score.cosine) scale_sums.write(p, params.scale_sums, share);
}

}  // namespace warpform
