// One step of attention: the queries of a launch meet one block of the keys of a longer sequence. The kernels are those
// of whole sequences (forward.cuh, backward_dkdv.cuh, backward_dq.cuh) with the mode AttentionStep, which changes three
// things:
//
// State     The epilogue merges (out, lse) of earlier steps with this step's in registers. The state stays float32, so
//           that no step rounds what the next one adds to. dQ, dK and dV are added to the given ones.
// Positions Row i is at position offset + i * stride, and masks go by positions: one rule for contiguous, striped and
//           zigzag parts of a sequence. The first and last key of a query, and the first and last query of a key,
//           follow by arithmetic, so blocks outside of the mask are skipped as in whole sequences.
// Sequences A batch of equal lengths needs no cu_seqlens.
//
// Bytes     Beside those of whole sequences the state, read and written once: forward 8 head_dim + 8 a query and head,
//           backward 8 head_dim a query and 16 head_dim a key. An H200 moves 8 head_dim bytes in the time that 400 keys
//           take at its peak (4 head_dim FLOP each), so steps of thousands of keys have the bounds of whole sequences.
//           The state is read in the epilogue, 8 bytes a lane, four lanes a sector: read in the prologue, where the
//           first product would hide it, it made the main loops spill.
// Measured  H100 80GB HBM3, bfloat16. 8192 tokens, 16 query heads, 4 key heads of 128: forward 1704 us, 323 TFLOP/s, 41
//           % of the floor; backward 5936 us, 232 TFLOP/s, 29 %. 2048 tokens, 32 heads of 64: forward 155 us, 222
//           TFLOP/s, 28 %; backward 403 us, 213 TFLOP/s, 27 %.
#pragma once

#include "attention/full_attention.cuh"
#include "device/softmax.cuh"

namespace warpform {

// The keys of a step that a query sees. Neither bound falls with the query's number.
struct StepPair {
  const StepPositions& positions;  // in constant memory: no registers
  int q_length;
  int k_length;
  int q_limit;  // as Pair's: all tokens take part
  int k_limit;
};

__device__ __forceinline__ Range visible_keys(const StepPair& pair, int i) {
  const StepPositions& s = pair.positions;
  const int at = i * s.q_stride;
  return {min(s.by_k_stride.quotient(max(at + s.first_key, 0)), pair.k_limit),
          min(s.by_k_stride.quotient(max(at + s.last_key, 0)), pair.k_limit)};
}

__device__ __forceinline__ Range seeing_queries(const StepPair& pair, int j) {
  if (j >= pair.k_limit) return {0, 0};
  const StepPositions& s = pair.positions;
  const int at = j * s.k_stride;
  return {min(s.by_q_stride.quotient(max(at + s.first_query, 0)), pair.q_limit),
          min(s.by_q_stride.quotient(max(at + s.last_query, 0)), pair.q_limit)};
}

// Elements from the begin of a tensor to row `row` of a head. by_length gives the sequence that the row belongs to.
__device__ __forceinline__ int64_t offset_of(const StateView& view, Divisor by_length, int head, int row) {
  return row * view.row_stride + head * view.head_stride + by_length.quotient(row) * view.batch_offset;
}

// Copies columns [col, col + cols) of `rows` rows from `row` on of a given state to a contiguous [rows, heads,
// head_dim].
template <int kThreads>
__device__ __forceinline__ void carry_rows(const StateView& before, Divisor by_length, float* to, int heads, int head,
                                           int head_dim, int row, int rows, int col, int cols) {
  const int row_pairs = min(cols, head_dim - col) / 2;
  for (int64_t i = threadIdx.x; i < int64_t{rows} * row_pairs; i += kThreads) {
    const int r = row + static_cast<int>(i / row_pairs);
    const int c = col + static_cast<int>(i % row_pairs) * 2;
    Vec<float, 2> pair = {{0.f, 0.f}};
    if (before.data != nullptr) {
      pair =
          load_global(reinterpret_cast<const Vec<float, 2>*>(before.data + offset_of(before, by_length, head, r) + c));
    }
    store_global(reinterpret_cast<Vec<float, 2>*>(to + (static_cast<int64_t>(r) * heads + head) * head_dim + c), pair);
  }
}

// Stores a warp's accumulators of 16 rows from `row` on, times a factor for each half, plus the given state times a
// weight, as far as `rows` and head_dim reach.
template <int kN>
__device__ __forceinline__ void write_sums(const StateView& before, Divisor by_length, float* to, int heads, int head,
                                           int head_dim, int row, int rows, int col, const float (&acc)[kN][4],
                                           const float (&factor)[2], const float (&weight)[2]) {
  // Opaque, here and below: the forward of 128 columns has no register that could hold the lane's place in its main
  // loop.
  const int lane = opaque_lane(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + 8 * r + g;
    if (8 * r + g >= rows) continue;
    const float* from = before.data == nullptr ? nullptr : before.data + offset_of(before, by_length, head, at) + 2 * t;
    float* dst = to + (static_cast<int64_t>(at) * heads + head) * head_dim + 2 * t;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int c = col + 8 * n;
      if (c >= head_dim) continue;
      Vec<float, 2> pair = {{acc[n][2 * r] * factor[r], acc[n][2 * r + 1] * factor[r]}};
      if (from != nullptr) {
        const auto old = load_global(reinterpret_cast<const Vec<float, 2>*>(from + c));
        pair[0] += old[0] * weight[r];
        pair[1] += old[1] * weight[r];
      }
      store_global(reinterpret_cast<Vec<float, 2>*>(dst + c), pair);
    }
  }
}

struct AttentionStep {
  using ForwardParams = AttentionStepParams;
  using BackwardParams = AttentionStepBackwardParams;
  static constexpr bool kStoresDq = false;
  static constexpr bool kSumsScaledDq = true;

  __device__ __forceinline__ static Sequences queries(const AttentionProblem& p) {
    return {p.cu_seqlens_q, p.batch, p.total_q, p.max_seqlen_q};
  }
  __device__ __forceinline__ static Sequences keys(const AttentionProblem& p) {
    return {p.cu_seqlens_k, p.batch, p.total_k, p.max_seqlen_k};
  }
  template <class Params>
  __device__ __forceinline__ static StepPair pair(const Params& params, int q_length, int k_length) {
    return {params.step.positions, q_length, k_length, q_length, k_length};
  }
  template <Operand kOperand, class Params>
  __device__ __forceinline__ static int64_t batch_offset(const Params& params, int row) {
    const StepLayout& s = params.step;
    switch (kOperand) {
      case Operand::kQ: return s.by_q_length.quotient(row) * s.q_batch_offset;
      case Operand::kK: return s.by_k_length.quotient(row) * s.k_batch_offset;
      case Operand::kV: return s.by_k_length.quotient(row) * s.v_batch_offset;
      default: return s.by_q_length.quotient(row) * s.dout_batch_offset;
    }
  }
  template <class Params>
  __device__ __forceinline__ static int64_t row(const Params& params, int head, int64_t row) {
    const StepLayout& s = params.step;
    return row + head * s.head_rows + s.by_q_length.quotient(static_cast<int>(row)) * s.sequence_rows;
  }
  template <Side>
  __device__ __forceinline__ static void* table_gradient(const BackwardParams&) {
    return nullptr;
  }

  template <int kThreads, class T>
  __device__ __forceinline__ static void store_fully_masked_rows(const ForwardParams& params, int head, int row,
                                                                 int rows) {
    const AttentionProblem& p = params.problem;
    carry_rows<kThreads>(params.out_before, params.step.by_q_length, params.out, p.heads_q, head, p.head_dim, row, rows,
                         0, p.head_dim);
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += kThreads) {
      const int64_t at = AttentionStep::row(params, head, row) + i;
      store_global(params.lse + at,
                   params.lse_before == nullptr ? negative_infinity() : load_global(params.lse_before + at));
    }
  }

  // Merges the part of a row's softmax that is in the registers with the given one.
  template <int kM>
  struct Epilogue {
    const ForwardParams& params;
    int head;
    int row;
    int rows;
    float factors[kM][2];  // of the sums of O, rows 16 m + 8 r + lane / 4
    float weights[kM][2];  // of the given state, the same rows

    __device__ __forceinline__ Epilogue(const ForwardParams& params_, int head_, int row_, int rows_)
        : params(params_), head(head_), row(row_), rows(rows_) {}

    __device__ __forceinline__ void set(int m, int r, float factor, float exponent) {
      const int i = 16 * m + 8 * r + opaque_lane() / 4;
      const int64_t at = AttentionStep::row(params, head, row) + i;
      float before = negative_infinity();
      if (params.lse_before != nullptr && i < rows) before = load_global(params.lse_before + at);
      const float exponent_before = before * kLog2e;
      const float top = fmaxf(exponent, exponent_before);
      const float base = top == negative_infinity() ? 0.f : top;
      const float part = exp2_approx(exponent - base), part_before = exp2_approx(exponent_before - base);
      const float sum = part + part_before;
      const float inverse = sum == 0.f ? 0.f : reciprocal_approx(sum);
      factors[m][r] = factor * (part * inverse);
      weights[m][r] = part_before * inverse;
      if (lane_id() % 4 == 0 && i < rows) {
        // A row that saw nothing in this step keeps the bits of its lse.
        const float lse = part == 0.f ? before : (base + log2_approx(sum)) * kLn2;
        store_global(params.lse + at, lse);
      }
    }

    template <class T, int kO, int kCols>
    __device__ __forceinline__ void write(SharedTile<kCols> /*tile*/, int /*tile_row*/,
                                          const float (&o)[kM][kO][4]) const {
      const AttentionProblem& p = params.problem;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        write_sums(params.out_before, params.step.by_q_length, params.out, p.heads_q, head, p.head_dim, row + 16 * m,
                   rows - 16 * m, 0, o[m], factors[m], weights[m]);
      }
    }
  };

  template <int kThreads, class T>
  __device__ __forceinline__ static void store_fully_masked_keys(const BackwardParams& params, int head, int row,
                                                                 int rows, int col, int cols) {
    const AttentionProblem& p = params.problem;
    carry_rows<kThreads>(params.dk_before, params.step.by_k_length, params.dk, p.heads_kv, head, p.head_dim, row, rows,
                         col, cols);
    carry_rows<kThreads>(params.dv_before, params.step.by_k_length, params.dv, p.heads_kv, head, p.head_dim, row, rows,
                         col, cols);
  }

  template <class T, int kOut, int kCols>
  __device__ __forceinline__ static void epilogue_dkdv(const BackwardParams& params, int head, int64_t row_, int rows,
                                                       SharedTile<kCols> /*tile_k*/, SharedTile<kCols> /*tile_v*/,
                                                       int /*tile_row*/, int col, const float (&dk)[kOut][4],
                                                       const float (&dv)[kOut][4]) {
    const AttentionProblem& p = params.problem;
    cp_async_wait<0>();
    const int row = static_cast<int>(row_);
    write_sums(params.dk_before, params.step.by_k_length, params.dk, p.heads_kv, head, p.head_dim, row, rows, col, dk,
               {p.softmax_scale, p.softmax_scale}, {1.f, 1.f});
    write_sums(params.dv_before, params.step.by_k_length, params.dv, p.heads_kv, head, p.head_dim, row, rows, col, dv,
               {1.f, 1.f}, {1.f, 1.f});
  }

  template <int kThreads, class T>
  __device__ __forceinline__ static void store_fully_masked_queries(const BackwardParams& params, int head, int row,
                                                                    int rows) {
    const AttentionProblem& p = params.problem;
    carry_rows<kThreads>(params.dq_before, params.step.by_q_length, params.dq_accumulator, p.heads_q, head, p.head_dim,
                         row, rows, 0, p.head_dim);
  }

  template <class T, int kOut, int kCols>
  __device__ __forceinline__ static void epilogue_dq(const BackwardParams& params, int head, int row, int rows,
                                                     SharedTile<kCols> /*tile*/, int /*tile_row*/,
                                                     const float (&dq)[kOut][4]) {
    const AttentionProblem& p = params.problem;
    write_sums(params.dq_before, params.step.by_q_length, params.dq_accumulator, p.heads_q, head, p.head_dim, row, rows,
               0, dq, {p.softmax_scale, p.softmax_scale}, {1.f, 1.f});
  }
};

}  // namespace warpform
