// Backward of window attention for windows of more than 64 tokens, from the saved log-sum-exp. The sums of one CTA are
// needed by all of a window's CTAs, so three kernels compute the scores, each for the results that it owns.
//
//   queries   64 queries of a window against its keys, 64 at a time: dQ += dS K from registers
//   keys      64 keys against the queries: dV += P^T dO and dK += dS^T Q
//   bias      64 queries and 64 keys of every window of its share: dS for the bias table, where there is one
//
// Delta     dS = P (dP - delta), delta = rowsum(P dP) = rowsum(dO O). The saved output is rounded to 16 bits, and the
//           error of delta is in a whole row of dS, where it does not average out. But a row of dS adds up to 0, so its
//           sum is that error: `queries` corrects delta by it, in float32, for the kernels that follow. Only dQ itself
//           uses the uncorrected delta.
// Tile      One head (two up to 32 columns), a team of four warps a head, 16 rows a warp. CTAs stay with their heads.
// Loads     All threads copy with 16-byte cp.async. Operands of a loop within a window have two stages, one in flight.
// Products  4 + 3 + 2 instead of the 5 of a single pass, and in exchange no atomics and no workspace for dQ: the bits
//           repeat on one model of GPU.
// Bounds    18 N^2 d FLOP a window and head (14 without a table), and 3 (2) N^2 exp2.
// Measured  H100 80GB HBM3, bfloat16, 64 images of 64 x 64, windows of 16 x 16, shifted, 3 heads of 32: 1739 us with
//           the forward, 52 TFLOP/s, 11 % of the floor.
#pragma once

#include "window/gradients.cuh"

namespace warpform {

// CTAs that an SM holds at once: the registers are for as many.
__host__ __device__ constexpr int window_backward_long_ctas(int /*bucket*/) { return 2; }

// delta = rowsum(dO * O) of every token and head, as far as the rounded output tells.
template <class T, int kBucket>
__global__ void __launch_bounds__(256) window_attention_delta(const __grid_constant__ WindowBackwardParams params) {
  constexpr int kLanes = kBucket / kChunk;
  const WindowProblem& p = params.problem;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (256 / kLanes) + static_cast<int>(threadIdx.x) / kLanes;
  const int64_t rows = p.batch * p.image_tokens * p.heads;
  const int col = static_cast<int>(threadIdx.x) % kLanes * kChunk;
  float sum = 0.f;
  if (row < rows && col < p.head_dim) {
    using Chunk = Vec<T, kChunk>;
    const auto out =
        load_global(reinterpret_cast<const Chunk*>(static_cast<const T*>(params.out) + row * p.head_dim + col));
    const auto dout =
        load_global(reinterpret_cast<const Chunk*>(static_cast<const T*>(params.dout) + row * p.head_dim + col));
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += to_float(out[i]) * to_float(dout[i]);
  }
  sum = warp_reduce<kLanes>(sum, Sum{});
  if (row < rows && col == 0) store_global(params.delta + row, sum);
}

// lse, in base 2, and delta of one query; +inf and 0 past the window's last token, which makes its probabilities 0, and
// so for a query that saw no key, whose lse is -inf.
struct QueryFacts {
  float lse;
  float delta;
};
__device__ __forceinline__ float* query_delta(const WindowBackwardParams& params, int image, int row, int head) {
  return params.delta + (image_begin(params.problem, image) + row) * params.problem.heads + head;
}
__device__ __forceinline__ QueryFacts query_facts(const WindowBackwardParams& params, const Rows& rows, int64_t index,
                                                  int image, int head, int query) {
  const WindowProblem& p = params.problem;
  const int row = rows[query];
  QueryFacts facts{INFINITY, 0.f};
  if (row != kOutside) {
    const float lse = load_global(params.lse + (index * p.heads + head) * p.tokens + query) * kLog2e;
    if (lse != negative_infinity()) facts.lse = lse;
  }
  if (row >= 0) facts.delta = load_global(query_delta(params, image, row, head));
  return facts;
}

// Loads the facts of the two queries that a lane has in a warp's accumulators, [16, 8 kN].
template <int kBucket>
__device__ __forceinline__ void load_facts(QueryFacts (&facts)[2], const WindowBackwardParams& params, const Rows& rows,
                                           int64_t index, int image, int first_query) {
  using Position = WindowTile<kBucket>;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    facts[r] = query_facts(params, rows, index, image, Position::head(),
                           first_query + Position::row() + lane_id() / 4 + 8 * r);
  }
}

// ---- queries as rows ----

// Q, dO, two of K and V.
template <int kBucket>
__host__ __device__ constexpr int window_backward_queries_bytes(const WindowProblem& p) {
  return 6 * kBlock * window_cols(kBucket) * 2 + WindowShared::bytes(p, window_teams(kBucket));
}

// dS of 16 queries and 64 keys, from the tiles' rows and the queries' facts.
template <class T, int kBucket, int kCols>
__device__ __forceinline__ void score_gradients(float (&ds)[kBlock / 8][4], const WindowProblem& p,
                                                const WindowScore<kBucket>& score, const Window& window,
                                                SharedTile<kCols> tile_q, SharedTile<kCols> tile_do,
                                                SharedTile<kCols> tile_k, SharedTile<kCols> tile_v, int first_query,
                                                int first_key, const QueryFacts (&facts)[2]) {
  using Position = WindowTile<kBucket>;
  constexpr int kN = kBlock / 8;
  float s[1][kN][4] = {};
  mma_abt<T, kBucket>(s, tile_q, Position::row(), tile_k, 0, p.head_dim, Position::col());
  score.query_rows(s[0], window, first_query + Position::row(), Position::row(), first_key);
  hide_columns(s[0], first_key, p.tokens);
  for_each_accumulator<1, kN>([&](int m, int n, int e) { s[m][n][e] = exp2_approx(s[m][n][e] - facts[e / 2].lse); });
  float dp[1][kN][4] = {};
  mma_abt<T, kBucket>(dp, tile_do, Position::row(), tile_v, 0, p.head_dim, Position::col());
  for_each_accumulator<1, kN>([&](int, int n, int e) { ds[n][e] = s[0][n][e] * (dp[0][n][e] - facts[e / 2].delta); });
}

// Grid: CTAs that share the windows' blocks of queries; groups of heads.
template <class T, int kBucket>
__global__ void __launch_bounds__(window_threads(kBucket), window_backward_long_ctas(kBucket))
window_attention_backward_queries(const __grid_constant__ WindowBackwardParams params) {
  constexpr int kTeams = window_teams(kBucket), kN = kBlock / 8, kO = kBucket / 8;
  using Tile = SharedTile<window_cols(kBucket)>;
  using Position = WindowTile<kBucket>;
  const WindowProblem& p = params.problem;

  const Tile tile_q{shared_base()};
  const Tile tile_do{tile_q.base + Tile::bytes(kBlock)};
  const auto tile_k = [&](int stage) { return Tile{tile_q.base + (2 + 2 * stage) * Tile::bytes(kBlock)}; };
  const auto tile_v = [&](int stage) { return Tile{tile_q.base + (3 + 2 * stage) * Tile::bytes(kBlock)}; };
  const WindowShared shared(p, tile_q.base + 6 * Tile::bytes(kBlock), kTeams);

  shared.set<kBucket>(p, Position::first_head());
  const WindowScore<kBucket> score(p, shared);

  const int items = p.windows * p.blocks.divisor;
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    const int index = p.blocks.quotient(item), first_query = (item - index * p.blocks.divisor) * kBlock;
    const Window window = window_at(p, index);
    begin_window<kBucket>(shared, p, window);
    const auto copy = [&](Tile to, const TokenRows<T>& from, int first) {
      copy_rows_async<kBucket>(to, from, shared.rows(), first, p);
    };
    const auto fetch = [&](int stage, int n) {
      copy(tile_k(stage), qkv_rows<T>(p, 1, window.image, Position::first_head()), n * kBlock);
      copy(tile_v(stage), qkv_rows<T>(p, 2, window.image, Position::first_head()), n * kBlock);
      cp_async_commit();
    };
    copy(tile_q, qkv_rows<T>(p, 0, window.image, Position::first_head()), first_query);
    copy(tile_do, out_rows<T>(p, params.dout, window.image, Position::first_head()), first_query);
    fetch(0, 0);

    const bool warp_has_rows = Position::head() < p.heads && first_query + Position::row() < p.tokens;
    QueryFacts facts[2] = {};
    if (warp_has_rows) load_facts<kBucket>(facts, params, shared.rows(), index, window.image, first_query);
    float dq[1][kO][4] = {};
    float left[2] = {};  // the sum of a row of dS, for two rows
    for (int n = 0; n < p.blocks.divisor; ++n) {
      const int stage = n % 2;
      cp_async_wait<0>();
      block_sync();  // block n has arrived, and every warp is done with block n - 1
      if (n + 1 < p.blocks.divisor) fetch(1 - stage, n + 1);
      if (score.cosine) {
        set_inverse_norms<kBucket, T>(shared, tile_q, tile_k(stage), false, /*lengthen_keys=*/true);
        block_sync();
      }
      if (!warp_has_rows) continue;
      float ds[1][kN][4];
      score_gradients<T, kBucket>(ds[0], p, score, window, tile_q, tile_do, tile_k(stage), tile_v(stage), first_query,
                                  n * kBlock, facts);
      for_each_accumulator<1, kN>([&](int m, int n_, int e) { left[e / 2] += ds[m][n_][e]; });
      if (score.cosine) scale_columns(ds[0], score.key_norms());
      uint32_t packed[1][kN / 2][4];
      pack_accumulators<T>(packed, ds);
      mma_packed_b<T>(dq, packed, tile_k(stage), Position::col(), p.head_dim);
    }
    if (!warp_has_rows) continue;

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      left[r] = warp_reduce<4>(left[r], Sum{});
      const int row = shared.rows()[first_query + Position::row() + opaque_lane() / 4 + 8 * r];
      if (row >= 0 && opaque_lane() % 4 == 0) {
        store_global(query_delta(params, window.image, row, Position::head()), facts[r].delta + left[r]);
      }
    }
    if (score.cosine) {
      const uint32_t norms = score.query_norms() + Position::row() * 4;
      finish_cosine<T>(dq[0], tile_q, Position::row(), Position::col(), norms, norms);
    }
    // A warp's own rows of Q take its rows of dQ.
    const int64_t at = image_begin(p, window.image) * 3 * p.width + Position::head() * p.head_dim;
    write_gradient<kBucket>(dq[0], score.gradient_factor(), tile_q, Position::row(), Position::col(),
                            static_cast<T*>(params.dqkv) + at, 3 * p.width, shared.rows(),
                            first_query + Position::row(), p.head_dim);
  }
}

// ---- keys as rows ----

// K, V, two of Q and dO, of each stage and team two floats a query.
template <int kBucket>
__host__ __device__ constexpr int window_backward_keys_bytes(const WindowProblem& p) {
  const int teams = window_teams(kBucket);
  return 6 * kBlock * window_cols(kBucket) * 2 + 2 * teams * kBlock * 8 + WindowShared::bytes(p, teams) +
         PaddingSums<kBucket>::kBytes + ScaleSums<kBucket>::kBytes;
}

// Grid: CTAs that share the windows' blocks of keys; groups of heads.
template <class T, int kBucket>
__global__ void __launch_bounds__(window_threads(kBucket), window_backward_long_ctas(kBucket))
window_attention_backward_keys(const __grid_constant__ WindowBackwardParams params) {
  constexpr int kTeams = window_teams(kBucket), kN = kBlock / 8, kO = kBucket / 8;
  using Tile = SharedTile<window_cols(kBucket)>;
  using Position = WindowTile<kBucket>;
  const WindowProblem& p = params.problem;

  const Tile tile_k{shared_base()};
  const Tile tile_v{tile_k.base + Tile::bytes(kBlock)};
  const auto tile_q = [&](int stage) { return Tile{tile_k.base + (2 + 2 * stage) * Tile::bytes(kBlock)}; };
  const auto tile_do = [&](int stage) { return Tile{tile_k.base + (3 + 2 * stage) * Tile::bytes(kBlock)}; };
  const uint32_t facts = tile_k.base + 6 * Tile::bytes(kBlock);
  // Before what depends on the problem's sizes: addresses that are no registers.
  const PaddingSums<kBucket> padding_sums{facts + 2 * kTeams * kBlock * 8};
  const ScaleSums<kBucket> scale_sums{padding_sums.base + PaddingSums<kBucket>::kBytes};
  const WindowShared shared(p, scale_sums.base + ScaleSums<kBucket>::kBytes, kTeams);

  shared.set<kBucket>(p, Position::first_head());
  if (p.qkv_bias != nullptr) padding_sums.clear();
  if (p.logit_scale != nullptr) scale_sums.clear();
  const WindowScore<kBucket> score(p, shared);

  const int items = p.windows * p.blocks.divisor;
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    const int index = p.blocks.quotient(item), first_key = (item - index * p.blocks.divisor) * kBlock;
    const Window window = window_at(p, index);
    begin_window<kBucket>(shared, p, window);
    const auto copy = [&](Tile to, const TokenRows<T>& from, int first) {
      copy_rows_async<kBucket>(to, from, shared.rows(), first, p);
    };
    // A block of queries: Q, dO and of each team lse and delta.
    const auto fetch = [&](int stage, int n) {
      copy(tile_q(stage), qkv_rows<T>(p, 0, window.image, Position::first_head()), n * kBlock);
      copy(tile_do(stage), out_rows<T>(p, params.dout, window.image, Position::first_head()), n * kBlock);
      cp_async_commit();
      const int i = Position::thread() % kTeamThreads;
      if (i < kBlock && Position::head() < p.heads) {
        const QueryFacts of = query_facts(params, shared.rows(), index, window.image, Position::head(), n * kBlock + i);
        store_shared(facts + ((stage * kTeams + Position::team()) * 2 * kBlock + i) * 4, of.lse);
        store_shared(facts + ((stage * kTeams + Position::team()) * 2 * kBlock + kBlock + i) * 4, of.delta);
      }
    };
    copy(tile_k, qkv_rows<T>(p, 1, window.image, Position::first_head()), first_key);
    copy(tile_v, qkv_rows<T>(p, 2, window.image, Position::first_head()), first_key);
    fetch(0, 0);

    const bool warp_has_rows = Position::head() < p.heads && first_key + Position::row() < p.tokens;
    float dk[1][kO][4] = {}, dv[1][kO][4] = {};
    for (int n = 0; n < p.blocks.divisor; ++n) {
      const int stage = n % 2;
      cp_async_wait<0>();
      block_sync();  // block n has arrived, and every warp is done with block n - 1
      if (n + 1 < p.blocks.divisor) fetch(1 - stage, n + 1);
      if (score.cosine) {
        set_inverse_norms<kBucket, T>(shared, tile_q(stage), tile_k, /*lengthen_queries=*/true);
        block_sync();
      }
      if (!warp_has_rows) continue;

      // Keys as rows: P^T and dS^T are left operands straight from registers.
      float s[1][kN][4] = {};
      mma_abt<T, kBucket>(s, tile_k, Position::row(), tile_q(stage), 0, p.head_dim, Position::col());
      score.key_rows(s[0], window, first_key + Position::row(), Position::row(), n * kBlock);
      const uint32_t lse =
          facts + (stage * kTeams + Position::team()) * 2 * kBlock * 4 + static_cast<uint32_t>(opaque_lane() % 4) * 8;
#pragma unroll
      for (int c = 0; c < kN; ++c) {
        const auto of = load_shared<Vec<float, 2>>(lse + 8 * c * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[0][c][e] = exp2_approx(s[0][c][e] - of[e % 2]);
      }
      uint32_t packed[1][kN / 2][4];
      pack_accumulators<T>(packed, s);
      mma_packed_b<T>(dv, packed, tile_do(stage), Position::col(), p.head_dim);

      float dp[1][kN][4] = {};
      mma_abt<T, kBucket>(dp, tile_v, Position::row(), tile_do(stage), 0, p.head_dim, Position::col());
#pragma unroll
      for (int c = 0; c < kN; ++c) {
        const auto of = load_shared<Vec<float, 2>>(lse + kBlock * 4 + 8 * c * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[0][c][e] *= dp[0][c][e] - of[e % 2];
      }
      if (score.cosine) scale_columns(s[0], score.query_norms());
      pack_accumulators<T>(packed, s);
      mma_packed_b<T>(dk, packed, tile_q(stage), Position::col(), p.head_dim);
    }
    if (!warp_has_rows) continue;

    if (score.cosine) {
      const uint32_t norms = score.key_norms() + Position::row() * 4;
      scale_sums.add(score.gradient_factor() *
                     finish_cosine<T>(dk[0], tile_k, Position::row(), Position::col(), norms, norms));
    }
    if (p.qkv_bias != nullptr) {
      padding_sums.add(dk[0], 0, shared.rows(), first_key + Position::row(), score.gradient_factor());
      padding_sums.add(dv[0], 1, shared.rows(), first_key + Position::row(), 1.f);
    }
    // A warp's own rows of K and V take its rows of dK and dV.
    const int64_t at = image_begin(p, window.image) * 3 * p.width + Position::head() * p.head_dim;
    T* dqkv = static_cast<T*>(params.dqkv) + at;
    write_gradient<kBucket>(dk[0], score.gradient_factor(), tile_k, Position::row(), Position::col(), dqkv + p.width,
                            3 * p.width, shared.rows(), first_key + Position::row(), p.head_dim);
    write_gradient<kBucket>(dv[0], 1.f, tile_v, Position::row(), Position::col(), dqkv + 2 * p.width, 3 * p.width,
                            shared.rows(), first_key + Position::row(), p.head_dim);
  }
  if (p.qkv_bias == nullptr && p.logit_scale == nullptr) return;
  block_sync();
  if (p.qkv_bias != nullptr) padding_sums.write(p, params.padding_sums, static_cast<int>(blockIdx.x));
  if (p.logit_scale != nullptr) scale_sums.write(p, params.scale_sums, static_cast<int>(blockIdx.x));
}

// Grid: shares of the windows x blocks of queries x blocks of keys; groups of heads.
template <class T, int kBucket>
__global__ void __launch_bounds__(window_threads(kBucket), window_backward_long_ctas(kBucket))
window_attention_backward_bias(const __grid_constant__ WindowBackwardParams params) {
  constexpr int kTeams = window_teams(kBucket), kN = kBlock / 8;
  using Tile = SharedTile<window_cols(kBucket)>;
  using Position = WindowTile<kBucket>;
  const WindowProblem& p = params.problem;

  const Tile tile_q{shared_base()};
  const Tile tile_do{tile_q.base + Tile::bytes(kBlock)};
  const Tile tile_k{tile_do.base + Tile::bytes(kBlock)};
  const Tile tile_v{tile_k.base + Tile::bytes(kBlock)};
  const ScoreSums<kBucket> sums{tile_v.base + Tile::bytes(kBlock)};
  const WindowShared shared(p, sums.base + ScoreSums<kBucket>::kBytes, kTeams);

  shared.set<kBucket>(p, Position::first_head());
  sums.clear();
  const WindowScore<kBucket> score(p, shared);

  const int rows_of_pairs = p.blocks.quotient(static_cast<int>(blockIdx.x)), share = p.blocks.quotient(rows_of_pairs);
  const int first_key = (static_cast<int>(blockIdx.x) - rows_of_pairs * p.blocks.divisor) * kBlock;
  const int first_query = (rows_of_pairs - share * p.blocks.divisor) * kBlock;
  const bool warp_has_rows = Position::head() < p.heads && first_query + Position::row() < p.tokens;
  for (int index = share; index < p.windows; index += params.table_shares) {
    const Window window = window_at(p, index);
    begin_window<kBucket>(shared, p, window);
    const auto copy = [&](Tile to, const TokenRows<T>& from, int first) {
      copy_rows_async<kBucket>(to, from, shared.rows(), first, p);
    };
    copy(tile_q, qkv_rows<T>(p, 0, window.image, Position::first_head()), first_query);
    copy(tile_do, out_rows<T>(p, params.dout, window.image, Position::first_head()), first_query);
    copy(tile_k, qkv_rows<T>(p, 1, window.image, Position::first_head()), first_key);
    copy(tile_v, qkv_rows<T>(p, 2, window.image, Position::first_head()), first_key);
    cp_async_commit();
    QueryFacts facts[2] = {};
    if (warp_has_rows) load_facts<kBucket>(facts, params, shared.rows(), index, window.image, first_query);
    cp_async_wait<0>();
    block_sync();
    if (score.cosine) {
      set_inverse_norms<kBucket, T>(shared, tile_q, tile_k);
      block_sync();
    }
    if (!warp_has_rows) continue;
    float ds[kN][4];
    score_gradients<T, kBucket>(ds, p, score, window, tile_q, tile_do, tile_k, tile_v, first_query, first_key, facts);
    sums.add(ds);
  }
  if (!warp_has_rows) return;
  const int64_t at = (static_cast<int64_t>(share) * p.heads + Position::head()) * p.tokens * p.tokens;
  sums.write(params.table_sums + at, p.tokens, first_query + Position::row(), first_key);
}

// Q, dO, K, V and the sums.
template <int kBucket>
__host__ __device__ constexpr int window_backward_bias_bytes(const WindowProblem& p) {
  return 4 * kBlock * window_cols(kBucket) * 2 + ScoreSums<kBucket>::kBytes +
         WindowShared::bytes(p, window_teams(kBucket));
}

}  // namespace warpform
