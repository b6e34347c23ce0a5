// The attention mode that computes whole sequences, and the interface that every mode has. A mode is a policy of the
// attention kernels: it says where sequences begin, which keys a query sees, and it holds the epilogues that store
// results. The other mode is AttentionStep (step.cuh). Rows are counted over all sequences.
//
//   member                          meaning
//   ForwardParams, BackwardParams   parameter structs of the kernels
//   queries(p), keys(p)             where the sequences of either side begin (sequences.cuh)
//   pair(params, lq, lk)            two lengths and a mask, for visible_keys and seeing_queries (score_mods.cuh)
//   batch_offset<operand>(params, row)
//                                   elements to add to row * row_stride, because sequences need not follow each other
//   row(params, head, row)          index of a row in lse and delta; the rows of one sequence are neighbours
//   table_gradient<side>(params)    where a score modification's Gradient adds its sums
//   kStoresDq, kSumsScaledDq        whether the kernel of the keys may store dQ, and whether it scales its sums of dQ
//   Epilogue<kM>                    forward, after the main loop: set(m, r, factor, exponent) takes the factor that
//                                   normalises O of a row, and the row's lse in base 2; write() stores O, [16 kM, 8 kO]
//   epilogue_dkdv                   backward, after the main loop: stores dK and dV of a warp, [16, 8 kOut] each
//   epilogue_dq                     backward, after the main loop: stores dQ of a warp, [16, 8 kOut]
//   store_fully_masked_rows, store_fully_masked_keys, store_fully_masked_queries
//                                   instead of a main loop: the results of a block that no pair belongs to
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

// Ends the online softmax of row 16 m + 8 r + lane / 4 of a warp, elements 2 r and 2 r + 1 of o, and hands the factor
// that normalises it and its lse to an Epilogue. A row that is not live counts as one that sees nothing.
template <class Epilogue, int kO>
__device__ __forceinline__ void finish_row(Epilogue& epilogue, int m, int r, float (&o)[kO][4], float row_max,
                                           float row_sum, float factor, bool live) {
  const float sum = warp_reduce<4>(row_sum, Sum{});
  const bool empty = sum == 0.f || !live;
  if (empty) {
    // A factor of 0 would not do: Inf or NaN among the values of keys that the row does not see would survive it.
#pragma unroll
    for (int n = 0; n < kO; ++n) o[n][2 * r] = o[n][2 * r + 1] = 0.f;
  }
  const float exponent = empty ? negative_infinity() : row_max * factor + log2_approx(sum);
  epilogue.set(m, r, empty ? 0.f : reciprocal_approx(sum), exponent);
}

struct FullAttention {
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
  __device__ __forceinline__ static int64_t batch_offset(const Params&, int /*row*/) {
    return 0;
  }
  template <class Params>
  __device__ __forceinline__ static int64_t row(const Params& params, int head, int64_t row) {
    return static_cast<int64_t>(head) * params.problem.total_q + row;
  }

  // The gradient of the tables that a score modification gathers from; null if it has none.
  template <Side kSide>
  __device__ __forceinline__ static void* table_gradient(const BackwardParams& params) {
    return kSide == Side::kKeys ? params.dp2c : params.dc2p;
  }

  // A query that sees nothing: out 0, lse -inf.
  template <int kThreads, class T>
  __device__ __forceinline__ static void store_fully_masked_rows(const ForwardParams& params, int head, int row,
                                                                 int rows) {
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

  // Stores O and lse of a warp's 16 kM rows.
  template <int kM>
  struct Epilogue {
    const ForwardParams& params;
    int head;
    int row;
    int rows;
    float factors[kM][2];  // of rows 16 m + 8 r + lane / 4

    __device__ __forceinline__ Epilogue(const ForwardParams& params_, int head_, int row_, int rows_)
        : params(params_), head(head_), row(row_), rows(rows_) {}

    __device__ __forceinline__ void set(int m, int r, float factor, float exponent) {
      const int i = 16 * m + 8 * r + lane_id() / 4;
      factors[m][r] = factor;
      if (lane_id() % 4 == 0 && i < rows) {
        store_global(params.lse + FullAttention::row(params, head, row) + i, exponent * kLn2);
      }
    }

    // o is the warp's [16 kM, 8 kO] of O. It goes through the warp's rows of Q's tile, so that a lane stores 16 bytes.
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
  __device__ __forceinline__ static void store_fully_masked_keys(const BackwardParams& params, int head, int row,
                                                                 int rows, int col, int cols) {
    const AttentionProblem& p = params.problem;
    write_zero_rows<kThreads, T>(params.dk, p.heads_kv, head, p.head_dim, row, rows, col, cols);
    write_zero_rows<kThreads, T>(params.dv, p.heads_kv, head, p.head_dim, row, rows, col, cols);
  }

  // dk and dv, a warp's [16, 8 kOut] each, go through the tiles of K and V. All warps must be done with K and V.
  template <class T, int kOut, int kCols>
  __device__ __forceinline__ static void epilogue_dkdv(const BackwardParams& params, int head, int64_t row, int rows,
                                                       SharedTile<kCols> tile_k, SharedTile<kCols> tile_v, int tile_row,
                                                       int col, const float (&dk)[kOut][4],
                                                       const float (&dv)[kOut][4]) {
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
  __device__ __forceinline__ static void store_fully_masked_queries(const BackwardParams& params, int head, int row,
                                                                    int rows) {
    const AttentionProblem& p = params.problem;
    write_zero_rows<kThreads, T>(params.dq, p.heads_q, head, p.head_dim, row, rows, 0, p.head_dim);
  }

  // dq, a warp's [16, 8 kOut], goes through the warp's own rows of Q's tile.
  template <class T, int kOut, int kCols>
  __device__ __forceinline__ static void epilogue_dq(const BackwardParams& params, int head, int row, int rows,
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
