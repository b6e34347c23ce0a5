// What a launch computes of an attention, a policy of its kernels: Whole, all of it, or a step of it (step.cuh). It
// says where sequences begin, which keys a query sees, and what becomes of results:
//   ForwardParams, BackwardParams  the kernels' parameters
//   queries(p), keys(p)            where the sequences of either side begin (sequences.cuh)
//   pair(params, lq, lk)           two lengths and a mask, for visible_keys and seeing_queries (scores.cuh)
//   gap<operand>(params, row)      elements between where a row's number says that it stands and where it does
//   row(params, head, row)         where lse and delta of a row stand, those of its sequence one after the other
//   table_gradient<owner>(params)  where a score's Gradient goes
//   Rows<kM>                       the ends of a warp's rows in the forward: set(m, r, factor, exponent) gives a row
//                                  what makes O of its sums, and its lse in base 2; write() takes O
//   kStoresDq, kSumsScaledDq       whether a block of keys may store dQ, and whether sums of dQ are scaled at once
//   end_keys, end_queries          the ends of the backward kernels
//   unseen_rows, unseen_keys, unseen_queries   ends of blocks that meet nothing
// Rows are counted over all sequences.
#pragma once

#include "attention/score_mods.cuh"
#include "attention/sequences.cuh"
#include "device/mma.cuh"

namespace warpform {

enum class Operand : int { kQ, kK, kV, kDout };

// Zeros in `rows` rows, from `row` on, of a contiguous [rows, heads, head_dim], columns [col, col + cols).
template <int kThreads, class T>
__device__ __forceinline__ void write_zero_rows(void* data, int heads, int head, int head_dim, int row, int rows,
                                                int col, int cols) {
  const int row_chunks = ceil_div(min(cols, head_dim - col), kChunk);
  for (int64_t i = threadIdx.x; i < int64_t{rows} * row_chunks; i += kThreads) {
    const int64_t r = (static_cast<int64_t>(row) + i / row_chunks) * heads + head;
    T* to = static_cast<T*>(data) + r * head_dim + col + i % row_chunks * kChunk;
    store_global(reinterpret_cast<uint4*>(to), uint4{0, 0, 0, 0});
  }
}

struct Whole {
  using ForwardParams = AttentionForwardParams;
  using BackwardParams = AttentionBackwardParams;
  using Pair = warpform::Pair;
  static constexpr bool kStoresDq = true;
  static constexpr bool kSumsScaledDq = false;

  __device__ __forceinline__ static PackedSequences queries(const AttentionProblem& p) {
    return {p.cu_seqlens_q, p.batch, p.total_q};
  }
  __device__ __forceinline__ static PackedSequences keys(const AttentionProblem& p) {
    return {p.cu_seqlens_k, p.batch, p.total_k};
  }
  template <class Params>
  __device__ __forceinline__ static Pair pair(const Params& params, int q_length, int k_length) {
    return {params.problem, q_length, k_length};
  }
  template <Operand kOperand, class Params>
  __device__ __forceinline__ static int64_t gap(const Params&, int /*row*/) {
    return 0;
  }
  template <class Params>
  __device__ __forceinline__ static int64_t row(const Params& params, int head, int64_t row) {
    return static_cast<int64_t>(head) * params.problem.total_q + row;
  }

  // Of the score's tables, if it has any.
  template <Owner kOwner>
  __device__ __forceinline__ static void* table_gradient(const BackwardParams& params) {
    return kOwner == Owner::kKeys ? params.dp2c : params.dc2p;
  }

  // A query that sees nothing: out 0, lse -inf.
  template <int kThreads, class T>
  __device__ __forceinline__ static void unseen_rows(const ForwardParams& params, int head, int row, int rows) {
    const AttentionProblem& p = params.problem;
    const int row_chunks = p.head_dim / kChunk;
    T* out = static_cast<T*>(params.out);
    for (int i = static_cast<int>(threadIdx.x); i < rows * row_chunks; i += kThreads) {
      const int64_t r = static_cast<int64_t>(row + i / row_chunks) * p.heads_q + head;
      store_global(reinterpret_cast<uint4*>(out + r * p.head_dim + i % row_chunks * kChunk), uint4{0, 0, 0, 0});
    }
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += kThreads) {
      store_global(params.lse + static_cast<int64_t>(head) * p.total_q + row + i, negative_infinity());
    }
  }

  // The ends of 16 kM rows of a warp.
  template <int kM>
  struct Rows {
    const ForwardParams& params;
    int head;
    int row;
    int rows;
    float factors[kM][2];

    __device__ __forceinline__ Rows(const ForwardParams& params_, int head_, int row_, int rows_)
        : params(params_), head(head_), row(row_), rows(rows_) {}

    __device__ __forceinline__ void set(int m, int r, float factor, float exponent) {
      const int i = 16 * m + 8 * r + lane_id() / 4;
      factors[m][r] = factor;
      if (lane_id() % 4 == 0 && i < rows) {
        store_global(params.lse + Whole::row(params, head, row) + i, exponent * kLn2);
      }
    }

    // A warp's own rows of Q's tile take its rows of O, to be written 16 bytes a lane.
    template <class T, int kO, int kCols>
    __device__ __forceinline__ void write(SharedTile<kCols> tile, int tile_row, const float (&o)[kM][kO][4]) const {
      const AttentionProblem& p = params.problem;
      warp_sync();
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        store_accumulators<T>(tile, tile_row + 16 * m, 0, o[m], factors[m][0], factors[m][1]);
      }
      warp_sync();
      const int64_t stride = static_cast<int64_t>(p.heads_q) * p.head_dim;
      T* out = static_cast<T*>(params.out) + row * stride + head * p.head_dim;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        write_rows<T, 8 * kO>(tile, tile_row + 16 * m, 0, out + 16 * m * stride, stride, rows - 16 * m, p.head_dim);
      }
    }
  };

  template <int kThreads, class T>
  __device__ __forceinline__ static void unseen_keys(const BackwardParams& params, int head, int row, int rows, int col,
                                                     int cols) {
    const AttentionProblem& p = params.problem;
    write_zero_rows<kThreads, T>(params.dk, p.heads_kv, head, p.head_dim, row, rows, col, cols);
    write_zero_rows<kThreads, T>(params.dv, p.heads_kv, head, p.head_dim, row, rows, col, cols);
  }

  // K's and V's tiles take dK and dV, to be written 16 bytes a lane: after the last reader of K and V, of any warp.
  template <class T, int kOut, int kCols>
  __device__ __forceinline__ static void end_keys(const BackwardParams& params, int head, int64_t row, int rows,
                                                  SharedTile<kCols> tile_k, SharedTile<kCols> tile_v, int tile_row,
                                                  int col, const float (&dk)[kOut][4], const float (&dv)[kOut][4]) {
    const AttentionProblem& p = params.problem;
    cp_async_wait<0>();
    block_sync();
    store_accumulators<T>(tile_k, tile_row, col, dk, p.softmax_scale, p.softmax_scale);
    store_accumulators<T>(tile_v, tile_row, col, dv, 1.f, 1.f);
    warp_sync();
    const int64_t stride = static_cast<int64_t>(p.heads_kv) * p.head_dim;
    const int64_t at = row * stride + head * p.head_dim;
    write_rows<T, 8 * kOut>(tile_k, tile_row, col, static_cast<T*>(params.dk) + at, stride, rows, p.head_dim);
    write_rows<T, 8 * kOut>(tile_v, tile_row, col, static_cast<T*>(params.dv) + at, stride, rows, p.head_dim);
  }

  template <int kThreads, class T>
  __device__ __forceinline__ static void unseen_queries(const BackwardParams& params, int head, int row, int rows) {
    const AttentionProblem& p = params.problem;
    write_zero_rows<kThreads, T>(params.dq, p.heads_q, head, p.head_dim, row, rows, 0, p.head_dim);
  }

  // A warp's own rows of Q's tile take its rows of dQ.
  template <class T, int kOut, int kCols>
  __device__ __forceinline__ static void end_queries(const BackwardParams& params, int head, int row, int rows,
                                                     SharedTile<kCols> tile, int tile_row, const float (&dq)[kOut][4]) {
    const AttentionProblem& p = params.problem;
    warp_sync();
    store_accumulators<T>(tile, tile_row, 0, dq, p.softmax_scale, p.softmax_scale);
    warp_sync();
    const int64_t stride = static_cast<int64_t>(p.heads_q) * p.head_dim;
    T* out = static_cast<T*>(params.dq) + static_cast<int64_t>(row) * stride + head * p.head_dim;
    write_rows<T, 8 * kOut>(tile, tile_row, 0, out, stride, rows, p.head_dim);
  }
};

}  // namespace warpform
