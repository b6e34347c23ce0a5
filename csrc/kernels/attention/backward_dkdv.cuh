// Backward of attention: dK and dV of a block of keys, and that block's part of dQ, by the recomputation of
// FlashAttention-2 (Dao, arXiv 2307.08691, algorithm 2) on mma.sync.
//
// Tile      block_n keys of one sequence and key head, 16 a warp, against block_m queries at a time of every query head
//           that shares the key head: the sum over them stays in registers, with no atomics and no copies of dK and dV.
// Loads     All threads copy with 16-byte cp.async: K and V once; Q, dO, lse and delta of the next block while this one
//           is worked on, where shared memory allows two stages.
// Products  S^T = K Q^T and dP^T = V dO^T, keys as rows: P^T and dS^T are then the left operands of dV += P^T dO and
//           dK += dS^T Q straight from registers. Only dS goes through shared memory, for dQ = dS K.
// dQ        By DqMode (launch.h): stored, added with float32 atomics, or left to backward_dq.cuh.
// Bounds    FLOP: 10 head_dim a visible pair (14 in the bucket of 256), against the tensor cores' mma.sync rate.
//           kAccumulate sends L2 head_dim / 8 sectors of float32 additions for each query and block of keys, every one
//           whole and once: an instruction (red.v2 on sm_90) fills 8 sectors, where a float a lane elsewhere takes a
//           shuffle for every two numbers and fills 4.
// Mode      A launch computes the whole attention (full_attention.cuh) or one step of it (step.cuh).
// Measured  H100 80GB HBM3, bfloat16, whole backward with kAccumulate. Batch 1 of 16384 tokens, 16 heads of 128: 23440
//           us, 235 TFLOP/s, 30 % of the floor. Batch 8 of 2048 tokens, 32 heads of 64: 3147 us, 218 TFLOP/s, 28 %;
//           delta takes 92 us of it and the rounding of dQ 62 us, each at over 80 % of the memory's rate.
#pragma once

#include "attention/full_attention.cuh"
#include "attention/tiles.cuh"
#include "device/accumulate.cuh"
#include "device/reduce.cuh"

namespace warpform {

// lse of a query in base 2. A query that sees no key gets +inf, which makes its probabilities 0.
__device__ __forceinline__ float lse_exponent(float lse) {
  return lse == negative_infinity() ? INFINITY : lse * kLog2e;
}

// delta = rowsum(dO * O) - dlse for every query and head, and zeros for the sums of dQ. A row takes 8, 16 or 32 lanes.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(256) varlen_attention_delta(const __grid_constant__ AttentionBackwardParams params) {
  constexpr int kLanes = tile_cols(kHeadDim) / kChunk;
  const AttentionProblem& p = params.problem;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (256 / kLanes) + static_cast<int>(threadIdx.x) / kLanes;
  const int64_t rows = static_cast<int64_t>(p.total_q) * p.heads_q;
  const int64_t row = index < rows ? index / p.heads_q : 0;
  const int head = static_cast<int>(index < rows ? index % p.heads_q : 0);
  const int col = static_cast<int>(threadIdx.x) % kLanes * kChunk;
  float sum = 0.f;
  if (index < rows && col < p.head_dim) {
    using Chunk = Vec<T, kChunk>;
    const auto at = [&](const HeadsView& view) {
      const T* data = static_cast<const T*>(view.data) + row * view.row_stride + head * view.head_stride + col;
      return load_global(reinterpret_cast<const Chunk*>(data));
    };
    const Chunk out = at(params.out), dout = at(params.dout);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += to_float(out[i]) * to_float(dout[i]);
    if (params.dq_mode == DqMode::kAccumulate) {
      float* dq = params.dq_accumulator + index * p.head_dim + col;
      store_global(reinterpret_cast<uint4*>(dq), uint4{0, 0, 0, 0});
      store_global(reinterpret_cast<uint4*>(dq + 4), uint4{0, 0, 0, 0});
    }
  }
  sum = warp_reduce<kLanes>(sum, Sum{});
  if (index < rows && col == 0) {
    const int64_t at = static_cast<int64_t>(head) * p.total_q + row;
    if (params.dlse != nullptr) sum -= load_global(params.dlse + at);
    store_global(params.delta + at, sum);
  }
}

// dq = softmax_scale * the float32 sums, rounded; eight elements a thread.
template <class T>
__global__ void __launch_bounds__(256) varlen_attention_round_dq(
    const __grid_constant__ AttentionBackwardParams params) {
  const AttentionProblem& p = params.problem;
  const int64_t count = static_cast<int64_t>(p.total_q) * p.heads_q * p.head_dim;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x)) * kChunk;
  if (at >= count) return;
  const auto lo = load_global(reinterpret_cast<const Vec<float, 4>*>(params.dq_accumulator + at));
  const auto hi = load_global(reinterpret_cast<const Vec<float, 4>*>(params.dq_accumulator + at + 4));
  Vec<T, kChunk> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = from_float<T>(lo[i] * p.softmax_scale);
    out[i + 4] = from_float<T>(hi[i] * p.softmax_scale);
  }
  store_global(reinterpret_cast<Vec<T, kChunk>*>(static_cast<T*>(params.dq) + at), out);
}

// Stores a warp's accumulators of 16 rows of dQ, scaled and rounded, at dst, as far as `rows` and `cols` reach.
template <class T, int kN>
__device__ __forceinline__ void write_dq(T* dst, int stride, int rows, int cols, const float (&acc)[kN][4],
                                         float scale) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (8 * r + g >= rows) continue;
    T* to = dst + (8 * r + g) * stride + 2 * t;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const uint32_t pair = pack2<T>(acc[n][2 * r] * scale, acc[n][2 * r + 1] * scale);
      if (8 * n < cols) store_global(reinterpret_cast<uint32_t*>(to + 8 * n), pair);
    }
  }
}

// Grid: slots of key blocks; heads_kv; parts of head_dim (1, or 2 in the bucket of 256).
template <class T, int kHeadDim, bool kSmall, class ScoreMod, class Mode>
__global__ void __launch_bounds__(32 * backward_tile(kHeadDim, kSmall).warps) varlen_attention_backward_keys(
    const __grid_constant__ typename Mode::BackwardParams params) {
  constexpr BackwardTile kTile = backward_tile(kHeadDim, kSmall);
  constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kWarps = kTile.warps, kThreads = 32 * kWarps;
  constexpr int kStages = kTile.stages, kOutCols = kTile.out_cols;
  constexpr int kM = kBlockM / 8, kOut = kOutCols / 8;
  // dQ's block_m x kOutCols: 16 rows a warp, the columns split over the warps left, 64 at a time beside dK and dV.
  constexpr int kDqWarpCols = kOutCols / (kWarps / (kBlockM / 16));
  constexpr int kDqParts = ceil_div(kDqWarpCols, 64);
  constexpr int kDq = kDqWarpCols / kDqParts / 8;
  constexpr int kDpTiles = kHeadDim <= 64 ? kM : ScoreMod::kPlain ? kM / 2 : kM / 4;
  static_assert(kBlockN == 16 * kWarps, "16 keys a warp");
  static_assert(kBlockM == 64, "dS is one swizzled tile of 64 columns");
  const AttentionProblem& p = params.problem;

  const int head_kv = static_cast<int>(blockIdx.y);
  const int out_col = kHeadDim > kOutCols ? static_cast<int>(blockIdx.z) * kOutCols : 0;
  const int group = p.heads_q / p.heads_kv;
  const SequenceTile tile = find_tile<kBlockN>(Mode::keys(p), static_cast<int>(blockIdx.x));
  if (tile.index > 0 && tile.index * kBlockN >= tile.length) return;
  const int block_key = tile.index * kBlockN;
  const int block_keys = min(kBlockN, tile.length - block_key);  // 0 in a sequence without keys
  const int first_key = tile.begin + block_key;

  const auto queries = Mode::queries(p);
  const int q_begin = queries.begin(tile.sequence), q_end = queries.begin(tile.sequence + 1);
  const int q_length = max(q_end - q_begin, 0);
  const auto pair = Mode::pair(params, q_length, tile.length);
  const bool owns_dq = Mode::kStoresDq && params.dq_mode == DqMode::kDirect && tile.index == 0;

  // Queries that see some key of the block; all of them where dQ is stored from here.
  const int live_keys = min(block_keys, pair.k_limit - block_key);
  const Range seen_first = seeing_queries(pair, block_key);
  const Range seen_last = seeing_queries(pair, block_key + live_keys - 1);
  const int m_first = owns_dq ? 0 : seen_first.first / kBlockM;
  const int m_last = ceil_div(owns_dq ? q_length : seen_last.last, kBlockM);
  const int steps = max(m_last - m_first, 0) * group;

  // Rows of no sequence, and keys that no query sees.
  const bool no_sequence = tile.sequence < 0 || tile.sequence == p.batch;
  if (no_sequence || live_keys <= 0 || steps == 0) {
    Mode::template store_fully_masked_keys<kThreads, T>(params, head_kv, first_key, block_keys, out_col, kOutCols);
    if constexpr (Mode::kStoresDq) {
      for (int h = head_kv * group; owns_dq && h < (head_kv + 1) * group; ++h) {
        write_zero_rows<kThreads, T>(params.dq, p.heads_q, h, p.head_dim, q_begin, q_length, out_col, kOutCols);
      }
    }
    return;
  }

  using Tile = SharedTile<tile_cols(kHeadDim)>;
  const Tile tile_k{shared_base()};
  const Tile tile_v{tile_k.base + Tile::bytes(kBlockN)};
  const uint32_t stages = tile_v.base + Tile::bytes(kBlockN);
  constexpr int kStageBytes = 2 * Tile::bytes(kBlockM);
  const SharedTile<kBlockM> tile_ds{stages + kStages * kStageBytes};
  const uint32_t rows_base = tile_ds.base + SharedTile<kBlockM>::bytes(kBlockN);  // lse and delta of every stage
  const uint32_t score_tables = rows_base + kStages * 2 * kBlockM * 4;

  const T* k = static_cast<const T*>(p.k.data) + first_key * p.k.row_stride + head_kv * p.k.head_stride +
               Mode::template batch_offset<Operand::kK>(params, first_key);
  const T* v = static_cast<const T*>(p.v.data) + first_key * p.v.row_stride + head_kv * p.v.head_stride +
               Mode::template batch_offset<Operand::kV>(params, first_key);

  const auto copy_queries = [&](int head, int row, int step) {
    const int64_t first = static_cast<int64_t>(q_begin) + row;
    const uint32_t base = stages + step % kStages * kStageBytes;
    const T* q = static_cast<const T*>(p.q.data) + first * p.q.row_stride + head * p.q.head_stride +
                 Mode::template batch_offset<Operand::kQ>(params, q_begin);
    const T* d = static_cast<const T*>(params.dout.data) + first * params.dout.row_stride +
                 head * params.dout.head_stride + Mode::template batch_offset<Operand::kDout>(params, q_begin);
    copy_tile_async<kBlockM, kHeadDim, kThreads>(Tile{base}, q, p.q.row_stride, q_length - row, p.head_dim);
    copy_tile_async<kBlockM, kHeadDim, kThreads>(Tile{base + Tile::bytes(kBlockM)}, d, params.dout.row_stride,
                                                 q_length - row, p.head_dim);
    cp_async_commit();
    const int i = static_cast<int>(threadIdx.x);
    if (i < kBlockM) {
      const uint32_t to = rows_base + (step % kStages * 2 * kBlockM + i) * 4;
      const bool inside = row + i < q_length;
      const int64_t at = Mode::row(params, head, first) + i;
      store_shared(to, inside ? lse_exponent(load_global(params.lse + at)) : INFINITY);
      store_shared(to + kBlockM * 4, inside ? load_global(params.delta + at) : 0.f);
    }
  };

  copy_tile_async<kBlockN, kHeadDim, kThreads>(tile_k, k, p.k.row_stride, live_keys, p.head_dim);
  copy_tile_async<kBlockN, kHeadDim, kThreads>(tile_v, v, p.v.row_stride, live_keys, p.head_dim);
  copy_queries(head_kv * group, m_first * kBlockM, 0);

  const int warp_key = warp_id() * 16;
  const bool warp_has_keys = warp_key < live_keys;
  const int g = lane_id() / 4, t = lane_id() % 4;
  float dk[1][kOut][4] = {}, dv[1][kOut][4] = {};
  ScoreMod::template prepare<kThreads>(p, score_tables);

  // The next step's block of queries: the head's next one, or the first of the next head.
  const auto advance = [&](int& head, int& row) {
    row += kBlockM;
    if (row >= m_last * kBlockM) {
      row = m_first * kBlockM;
      ++head;
    }
  };
  const auto copy_next = [&](int head, int row, int step) {
    if (step + 1 < steps) {
      advance(head, row);
      copy_queries(head, row, step + 1);
    }
  };

  int head = head_kv * group, block_row = m_first * kBlockM;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<0>();
    block_sync();  // this step's Q and dO have landed; the other stage and dS may be refilled
    if (kStages > 1) copy_next(head, block_row, step);
    const uint32_t stage = stages + step % kStages * kStageBytes;
    const Tile tile_q{stage}, tile_do{stage + Tile::bytes(kBlockM)};
    const uint32_t rows = rows_base + step % kStages * 2 * kBlockM * 4;
    const ScoreMod score(p, pair, tile.sequence, head, q_begin, score_tables);

    uint32_t packed_ds[1][kM / 2][4] = {};
    if (warp_has_keys) {
      score.template gather<Side::kKeys>(warp_key, block_key + warp_key, block_row);
      float ds[1][kM][4] = {};
      mma_abt<T, kHeadDim>(ds, tile_k, warp_key, tile_q, 0, p.head_dim);
      score.template add<Side::kKeys>(ds, warp_key);
      const bool masked = block_row < seeing_queries(pair, block_key + live_keys - 1).first ||
                          block_row + kBlockM > seeing_queries(pair, block_key).last ||
                          block_key + warp_key + 16 > pair.k_limit;
      if (masked) {
        const Range upper = seeing_queries(pair, block_key + warp_key + g);
        const Range lower = seeing_queries(pair, block_key + warp_key + g + 8);
        for_each_accumulator<1, kM>([&](int, int n, int e) {
          const int i = block_row + 8 * n + 2 * t + e % 2;
          const Range& range = e < 2 ? upper : lower;
          if (i < range.first || i >= range.last) ds[0][n][e] = negative_infinity();
        });
      }
      // dV += P^T dO, 16 queries at a time: P^T goes from the exponentials straight into the product.
      score.with_term(block_row + 2 * t, block_key + warp_key + g, [&](const auto& term) {
#pragma unroll
        for (int s = 0; s < kM / 2; ++s) {
          uint32_t a[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int n = 2 * s + half;
            const auto lse = load_shared<Vec<float, 2>>(rows + (8 * n + 2 * t) * 4);
            float probability[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float slope;
              const float x = term(ds[0][n][e], 8 * n + e % 2, 8 * (e / 2), slope);
              probability[e] = exp2_approx(x * score.factor() - lse[e % 2]);
              ds[0][n][e] = probability[e] * slope;
            }
            a[2 * half] = pack2<T>(probability[0], probability[1]);
            a[2 * half + 1] = pack2<T>(probability[2], probability[3]);
          }
          mma_ab<T, 1>(
              dv,
              [&](int, int, uint32_t (&fragment)[4]) {
#pragma unroll
                for (int r = 0; r < 4; ++r) fragment[r] = a[r];
              },
              tile_do, 16 * s, out_col, p.head_dim);
        }
      });

      // dP^T in parts: all of it beside S, dK and dV would not fit the registers at 128 columns.
#pragma unroll
      for (int first = 0; first < kM; first += kDpTiles) {
        float dp[1][kDpTiles][4] = {};
        mma_abt<T, kHeadDim>(dp, tile_v, warp_key, tile_do, 8 * first, p.head_dim);
#pragma unroll
        for (int c = 0; c < kDpTiles; ++c) {
          const int n = first + c;
          const auto delta = load_shared<Vec<float, 2>>(rows + (kBlockM + 8 * n + 2 * t) * 4);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            // A pair that does not count has P = 0; whatever its dP is, Inf and NaN too, it must not reach dS.
            const float p_slope = ds[0][n][e];
            ds[0][n][e] = p_slope == 0.f ? 0.f : p_slope * (dp[0][c][e] - delta[e % 2]);
          }
        }
      }
      pack_accumulators<T>(packed_ds, ds);
      mma_packed_b<T>(dk, packed_ds, tile_q, out_col, p.head_dim);
      ScoreMod::Gradient::template add<Side::kKeys>(score, Mode::template table_gradient<Side::kKeys>(params),
                                                    packed_ds[0], warp_key, block_key + warp_key, block_row);
    }

    if (ScoreMod::kDqFromKeys && params.dq_mode != DqMode::kSeparate) {
      // dS^T, keys as rows; a warp without keys writes zeros.
      store_packed(tile_ds, warp_key, packed_ds[0]);
      block_sync();
      const uint32_t lane = opaque(lane_offset_quarters<kBlockM>());
      const int dq_row = warp_id() % (kBlockM / 16) * 16;
#pragma unroll 1  // with a score bias there are no registers for the addresses of two parts of 256 columns
      for (int part = 0; part < kDqParts; ++part) {
        const int dq_col = out_col + (warp_id() / (kBlockM / 16) * kDqParts + part) * (kDq * 8);
        float dq[1][kDq][4] = {};
        // dS is zero where there are no keys, and so is K.
        mma_ab<T, kBlockN / 16>(
            dq, [&](int, int s, uint32_t (&a)[4]) { load_a_transposed(a, tile_ds, lane, 16 * s, dq_row); }, tile_k, 0,
            dq_col, p.head_dim);
        const int row = block_row + dq_row;
        const int64_t at = ((static_cast<int64_t>(q_begin) + row) * p.heads_q + head) * p.head_dim + dq_col;
        const int stride = p.heads_q * p.head_dim;
        if constexpr (Mode::kStoresDq) {
          if (params.dq_mode == DqMode::kDirect) {
            write_dq(static_cast<T*>(params.dq) + at, stride, q_length - row, p.head_dim - dq_col, dq[0],
                     p.softmax_scale);
            continue;
          }
        }
        add_accumulators_global(params.dq_accumulator + at, stride, q_length - row, p.head_dim - dq_col, dq[0],
                                Mode::kSumsScaledDq ? p.softmax_scale : 1.f);
      }
    }
    if (kStages == 1) {
      block_sync();  // all warps are done with this Q and dO, so their buffers may be refilled
      copy_next(head, block_row, step);
    }
    advance(head, block_row);
  }

  ScoreMod::Gradient::finish(ScoreMod(p, pair, tile.sequence, head_kv, q_begin, score_tables),
                             Mode::template table_gradient<Side::kKeys>(params), warp_key, block_key + warp_key);

  // In 64 bits from here on: with an int the kernel of 256 columns spills on sm_80.
  Mode::template epilogue_dkdv<T>(params, head_kv, static_cast<int64_t>(first_key) + warp_key, block_keys - warp_key,
                                  tile_k, tile_v, warp_key, out_col, dk[0], dv[0]);
}

}  // namespace warpform
