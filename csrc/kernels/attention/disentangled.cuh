// The scores of disentangled attention (DeBERTa, He et al., arXiv 2006.03654): the kernels of forward.cuh,
// backward_dkdv.cuh and backward_dq.cuh with two terms more, gathered by relative position,
//
//   score(i, j) = softmax_scale * (q_i . k_j + c2p[i, column(i - j)] + p2c[j, column(i - j)])
//
// Tables    c2p = q pos_key^T and p2c = k pos_query^T, [heads, tokens, width] of 16 bits: dense products that the
//           library makes before the launch, for the columns that some distance reaches. In float16 they are stored
//           over a power of two, as they may be larger than any float16 where the scores are not.
// Column    A list in shared memory (2 bytes a distance, up to where the column saturates) gives the column of a
//           distance. Every CTA fills it for itself: one rule for linear positions and for buckets, no logarithm in the
//           loops.
// Loads     16 bits a pair and term. Neighbours along a row of a table have neighbouring columns, or the same: lanes go
//           along rows, where a load touches one to four runs, and not along accumulators, where it would touch eight.
//           Each warp puts its own 16 x 64 pairs of both terms into shared memory; ldmatrix, transposing for the term
//           whose table rows are the tile's columns, brings them into the accumulators' layout.
// Bounds    The load and store unit: for 64 x 64 pairs 256 gathers of 32 lanes, as many reads of the list and half as
//           many stores, against 512 clocks of an A100's tensor cores for both products at head_dim 64. In the backward
//           each of the two kernels gathers again. Bytes: the tables, 4 tokens x heads x width, written once, read
//           through L2.
// Measured  H100 80GB HBM3, bfloat16, 32 sequences of up to 508 tokens, 9188 in all, 12 heads of 64, with the products
//           of the tables: forward 438 us, 43 TFLOP/s, 5 % of the floor; backward 2279 us, 23 TFLOP/s, 3 %.
#pragma once

#include "attention/relative_gradient.cuh"
#include "attention/score_mods.cuh"
#include "attention/tiles.cuh"

namespace warpform {

template <class T>
struct DisentangledBias {
  static constexpr bool kPlain = false;
  static constexpr bool kDqFromKeys = false;  // always DqMode::kSeparate
  using Gradient = RelativeGradient<T>;

  static constexpr int kTile = 64;

  const AttentionProblem& p;  // in constant memory: no registers
  int head;
  int first_token;  // of the sequence
  int last;         // token of the sequence that takes part
  uint32_t shared;  // row_terms, col_terms, an OpenRun for each row, the column of every distance from -reach to reach

  static int shared_bytes(const AttentionProblem& p) { return disentangled_shared_bytes(p.relative.reach); }

  template <int kThreads>
  __device__ __forceinline__ static void prepare(const AttentionProblem& p, uint32_t shared) {
    const RelativeTerms& r = p.relative;
    for (int i = static_cast<int>(threadIdx.x); i < kTile; i += kThreads) {
      store_shared(shared + 2 * SharedTile<kTile>::bytes(kTile) + i * static_cast<int>(sizeof(OpenRun)), OpenRun{});
    }
    for (int i = static_cast<int>(threadIdx.x); i <= 2 * r.reach; i += kThreads) {
      const int rel = i - r.reach;
      const int distance = rel < 0 ? -rel : rel;
      int bucket = distance;
      if (r.mid > 0 && distance > r.mid) {
        const float logarithm = log2f(static_cast<float>(distance) / static_cast<float>(r.mid));
        bucket = r.mid + static_cast<int>(ceilf(logarithm * r.buckets_per_octave));
      }
      const int column = r.centre + (rel < 0 ? -bucket : bucket);
      store_shared(columns(shared) + 2 * i, static_cast<int16_t>(min(max(column, 0), r.width - 1)));
    }
    block_sync();
  }

  __device__ __forceinline__ DisentangledBias(const AttentionProblem& problem, const Pair& pair, int /*sequence*/,
                                              int head_, int first_token_, uint32_t shared_)
      : p(problem), head(head_), first_token(first_token_), last(pair.q_limit - 1), shared(shared_) {}

  __device__ __forceinline__ float factor() const { return p.softmax_scale * kLog2e; }

  // Row of a token of the sequence in a table.
  __device__ __forceinline__ int64_t row(int token) const {
    return static_cast<int64_t>(head) * p.total_q + static_cast<int>(opaque(static_cast<uint32_t>(first_token))) +
           token;
  }

  // Place of a token of the sequence, the last one's for tokens past it; differences of two fit 32 bits.
  __device__ __forceinline__ int place(int token) const {
    token = min(token, last);
    if (p.relative.positions == nullptr) return token;
    const int64_t position = load_global(p.relative.positions + first_token + token);
    return static_cast<int>(min(max(position, int64_t{-kMaxTokens}), int64_t{kMaxTokens}));
  }

  // Column for the place of a row's token and that of a column's token: the column of query minus key.
  template <Side kSide>
  __device__ __forceinline__ int column(int row_token, int col_token) const {
    const int rel = kSide == Side::kQueries ? row_token - col_token : col_token - row_token;
    const int reach = p.relative.reach;
    return load_shared<int16_t>(columns(shared) + 2 * (reach + min(max(rel, -reach), reach)));
  }

  // Terms from the table of the rows' side: the layout of the tile; a warp has 16 rows to itself.
  __device__ __forceinline__ SharedTile<kTile> row_terms() const { return {shared}; }
  // Terms from the table of the columns' side: the transposed tile; a warp has 16 columns to itself.
  __device__ __forceinline__ SharedTile<kTile> col_terms() const { return {shared + SharedTile<kTile>::bytes(kTile)}; }

  // Address of the open run of a row of row_terms, for the gradient.
  __device__ __forceinline__ uint32_t open_run(int row) const {
    return shared + 2 * SharedTile<kTile>::bytes(kTile) + row * static_cast<int>(sizeof(OpenRun));
  }

  template <Side kSide>
  __device__ __forceinline__ void gather(int tile_row, int row_token, int col_token) const {
    const RelativeTerms& r = p.relative;
    const void* row_table = kSide == Side::kQueries ? r.c2p : r.p2c;
    const void* col_table = kSide == Side::kQueries ? r.p2c : r.c2p;
    // Opaque: addresses made of these are not worth a register each from before the kernel's loop on.
    const int lane = static_cast<int>(opaque(static_cast<uint32_t>(lane_id())));
    row_token = static_cast<int>(opaque(static_cast<uint32_t>(row_token)));
    warp_sync();  // all lanes have read the previous terms, so their place may be overwritten
    if (row_table != nullptr) {
      // A row at a time, two columns a lane.
      const int place0 = place(col_token + 2 * lane), place1 = place(col_token + 2 * lane + 1);
      gather_rows<kTile / 4>(row_table, [&](int i, int& token, int& column0, int& column1) {
        token = row_token + i;
        const int row_place = place(token);
        column0 = column<kSide>(row_place, place0);
        column1 = column<kSide>(row_place, place1);
        return row_terms().pair(tile_row + i, 2 * lane);
      });
    }
    if (col_table != nullptr) {
      // Every second row of eight at a time: their swizzles put them into different banks. Two columns a lane.
      const int col = lane % 8 * 2;
      const int place0 = place(row_token + col), place1 = place(row_token + col + 1);
      gather_rows<kTile / 4>(col_table, [&](int i, int& token, int& column0, int& column1) {
        const int step = i / 2 * 8 + i % 2 + lane / 8 * 2;
        token = col_token + step;
        const int col_place = place(token);
        column0 = column<kSide>(place0, col_place);
        column1 = column<kSide>(place1, col_place);
        return col_terms().pair(step, tile_row + col);
      });
    }
    warp_sync();
  }

  // Both tiles lie as operands of a product do, and so are read into the layout of its accumulators.
  template <Side kSide, int kM, int kN>
  __device__ __forceinline__ void add(float (&scores)[kM][kN][4], int tile_row) const {
    static_assert(kM == 1 && 8 * kN == kTile, "16 rows of a tile");
    const RelativeTerms& r = p.relative;
    if ((kSide == Side::kQueries ? r.c2p : r.p2c) != nullptr) {
      const uint32_t lane = opaque(lane_offset_halves<kTile>());
#pragma unroll
      for (int step = 0; step < kN / 2; ++step) {
        uint32_t terms[4];
        load_a(terms, row_terms(), lane, tile_row, 16 * step);
        add_step(scores[0], terms, step);
      }
    }
    if ((kSide == Side::kQueries ? r.p2c : r.c2p) != nullptr) {
      const uint32_t lane = opaque(lane_offset_quarters<kTile>());
#pragma unroll
      for (int step = 0; step < kN / 2; ++step) {
        uint32_t terms[4];
        load_a_transposed(terms, col_terms(), lane, 16 * step, tile_row);
        add_step(scores[0], terms, step);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void with_term(int, int, F&& f) const {
    f(*this);
  }
  __device__ __forceinline__ float operator()(float score, int, int, float& slope) const {
    slope = 1.f;
    return score;
  }

 private:
  __device__ __forceinline__ static uint32_t columns(uint32_t shared) {
    return shared + 2 * SharedTile<kTile>::bytes(kTile) + kTile * static_cast<int>(sizeof(OpenRun));
  }

  // kRows times two elements a lane from a table to shared memory: of(i, token, column0, column1) says from where and
  // returns to where. Loads of a batch are in flight together.
  template <int kRows, class Of>
  __device__ __forceinline__ void gather_rows(const void* table, Of&& of) const {
    constexpr int kBatch = 2;
    const T* rows = static_cast<const T*>(table) + row(0) * p.relative.width;
#pragma unroll 1
    for (int first = 0; first < kRows; first += kBatch) {
      uint32_t to[kBatch];
      Vec<T, 2> terms[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        int token, column0, column1;
        to[b] = of(first + b, token, column0, column1);
        // Pairs past the sequence are masked; what is read for them is its last row.
        const T* from = rows + static_cast<int64_t>(min(token, last)) * p.relative.width;
        terms[b] = {load_global(from + column0), load_global(from + column1)};
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) store_shared(to[b], terms[b]);
    }
  }

  // Packed terms of 16 x 16 pairs, in the order of a left operand.
  template <int kN>
  __device__ __forceinline__ void add_step(float (&scores)[kN][4], const uint32_t (&terms)[4], int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto pair = unpack2<T>(terms[i]);
      scores[2 * step + i / 2][i % 2 * 2] += pair[0] * p.relative.unit;
      scores[2 * step + i / 2][i % 2 * 2 + 1] += pair[1] * p.relative.unit;
    }
  }
};

}  // namespace warpform
