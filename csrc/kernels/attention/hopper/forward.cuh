// Forward of softmax attention over packed sequences on Hopper: out = softmax(scores) V and the log-sum-exp of every
// row, by the schedule of FlashAttention-3 (Shah et al., arXiv 2407.08608) on wgmma and TMA.
//
// Tile      kBlockM queries of one sequence and head against kBlockN keys at a time, from the last keys to the first
//           (tiles.cuh). A CTA finds its tile by a search (sequences.cuh); one CTA an SM. In causal attention the later
//           tiles of a sequence, which are longer, come first.
// Roles     Warpgroup 0 is the producer: a lane of its warp 0 issues all copies, its warp 1 writes zeros behind the
//           last value of a sequence. Each further warpgroup is a consumer with 64 of the queries.
// Loads     TMA boxes of kBlockN tokens and 64 columns, two stages of K and of V, Q once. A box reads on into the next
//           sequence. Its keys are masked, its rows of Q are not stored, but 0 times an Inf or NaN of its values would
//           reach the sums: of the one block that crosses the end, V is completed by zero_tail.
// Overlap   S' = Q K^T of the next keys is issued before O += P V of the present ones, and the softmax of S' runs under
//           that product. Where Tile::kPingPong, the consumers issue products by turns besides.
// Registers A consumer thread has two rows: S, O, P as 16-bit operand of wgmma, maximum and sum. P never leaves them.
// Bounds    FLOP: 4 head_dim a visible pair, 4,096 a clock and SM. exp2: 16 a clock and SM, which takes half of the
//           products' time at head_dim 128 and 1.03 of it at 64. Shared memory: 107 to 112 of 128 bytes a clock while
//           the tensor cores are busy. Bytes from L2: K and V once per tile, 0.0078 a FLOP at 128 queries. Predicted
//           from these counts for bfloat16 on an H100: 600 to 650 TFLOP/s at 128 columns, 440 to 490 at 64.
//           A CTA has one tile: the search, the first copies and the epilogue of each are exposed, which a persistent
//           schedule would hide.
// Measured  not yet on a GPU.
#pragma once

#include "attention/full_attention.cuh"
#include "attention/hopper/tiles.cuh"
#include "device/softmax.cuh"

namespace warpform {

struct HopperForwardParams {
  TensorMap q;  // [total_q, heads_q, head_dim], boxes of 64 columns and kBlockM tokens
  TensorMap k;  // [total_k, heads_kv, head_dim], kBlockN tokens
  TensorMap v;  // as k
  AttentionForwardParams forward;
};

// Shared memory of a CTA.
template <class Tile>
struct ForwardBuffers {
  using TileQ = typename Tile::TileQ;
  using TileKV = typename Tile::TileKV;

  uint32_t base;

  __device__ __forceinline__ TileQ q() const { return {base}; }
  __device__ __forceinline__ TileKV k(int stage) const { return {base + TileQ::kBytes + stage * TileKV::kBytes}; }
  __device__ __forceinline__ TileKV v(int stage) const { return k(Tile::kStages + stage); }

  __device__ __forceinline__ uint32_t q_full() const { return k(2 * Tile::kStages).base; }
  // V of the block that crosses the end of the sequence has landed, and zero_tail may complete it.
  __device__ __forceinline__ uint32_t tail() const { return q_full() + kBarrierBytes; }
  __device__ __forceinline__ Ring<Tile::kStages> k_ring() const { return {tail() + kBarrierBytes}; }
  __device__ __forceinline__ Ring<Tile::kStages> v_ring() const {
    return {k_ring().barriers + Ring<Tile::kStages>::kBytes};
  }

  // One thread calls it. Each consumer warpgroup arrives once for a stage that it has emptied.
  __device__ __forceinline__ void init(int consumers) const {
    mbarrier_init(q_full(), 1);
    mbarrier_init(tail(), 1);
    k_ring().init(1, consumers);
    v_ring().init(1, consumers);
    fence_mbarrier_init();
  }
};

// What a CTA computes: rows of one sequence and head, and the blocks of keys that they see.
template <class Tile>
struct ForwardWork {
  const Pair& pair;
  int sequence;
  int sequence_begin;  // its first row in the packed tensors
  int head;
  int head_kv;
  int block_row;  // the first row, in the sequence
  int rows;       // as far as the sequence has any
  int live_rows;  // those before max_seqlen_q; 0 or less: none
  int k_begin;    // the first key, in the packed tensors
  int n_first;    // blocks of keys [n_first, n_last)
  int n_last;

  __device__ __forceinline__ int first_row() const { return sequence_begin + block_row; }
  // Warpgroups that have any of the rows.
  __device__ __forceinline__ int consumers() const { return ceil_div(rows, kWarpgroupRows); }
  // The row of V's last block from which on it is not the sequence's. Only the last block has any: all before it end
  // before a key that some row sees.
  __device__ __forceinline__ int tail_row() const {
    return min(pair.k_limit - (n_last - 1) * Tile::kBlockN, Tile::kBlockN);
  }
  __device__ __forceinline__ bool has_tail() const { return tail_row() < Tile::kBlockN; }
};

// ---- producer ----

// Issues all copies, in the order in which stages become empty: a consumer is done with its keys half a step before it
// is done with the values of the block before. One thread calls it.
template <class Tile>
__device__ __forceinline__ void load_tiles(const HopperForwardParams& params, const ForwardBuffers<Tile>& buffers,
                                           const ForwardWork<Tile>& work) {
  using TileKV = typename Tile::TileKV;
  const auto load = [&](TileKV tile, const TensorMap& map, uint32_t full, int n) {
    mbarrier_arrive_expect(full, TileKV::kBytes);
    load_panels(tile, map, full, 0, work.head_kv, work.k_begin + n * Tile::kBlockN);
  };
  RingPosition<Tile::kStages> k_at, v_at;
  const auto load_keys = [&](int n) {
    k_at.wait_empty(buffers.k_ring());
    load(buffers.k(k_at.stage), params.k, buffers.k_ring().full(k_at.stage), n);
    k_at.advance();
  };
  const auto load_values = [&](int n) {
    v_at.wait_empty(buffers.v_ring());
    load(buffers.v(v_at.stage), params.v, buffers.v_ring().full(v_at.stage), n);
    v_at.advance();
  };

  mbarrier_arrive_expect(buffers.q_full(), Tile::TileQ::kBytes);
  load_panels(buffers.q(), params.q, buffers.q_full(), 0, work.head, work.first_row());
  int n = work.n_last - 1;
  load_keys(n);
  // The first values come before the second keys, as their tail has to be dealt with.
  load(buffers.v(0), params.v, work.has_tail() ? buffers.tail() : buffers.v_ring().full(0), n);
  v_at.advance();
  if (n > work.n_first) load_keys(n - 1);
  --n;
#pragma unroll 1
  for (; n >= work.n_first; --n) {
    if (n > work.n_first) load_keys(n - 1);
    load_values(n);
  }
}

// Makes zeros of the rows of the first V that are not the sequence's, and says in the copy's stead that it is full. One
// warp calls it. The consumers' first Q K^T and softmax run meanwhile.
template <class Tile>
__device__ __forceinline__ void zero_tail(const ForwardBuffers<Tile>& buffers, int row) {
  using TileKV = typename Tile::TileKV;
  constexpr int kLaneBytes = 16;
  mbarrier_wait(buffers.tail(), 0);
#pragma unroll
  for (int i = 0; i < TileKV::kPanels; ++i) {
    const SharedTile<kPanel> panel = buffers.v(0).panel(i);
    // Whole rows, so that the order of the chunks in a row does not matter.
    for (int at = row * panel.kRowBytes + lane_id() * kLaneBytes; at < TileKV::kPanelBytes;
         at += kWarpSize * kLaneBytes) {
      store_shared(panel.base + at, uint4{0, 0, 0, 0});
    }
  }
  fence_proxy_async();
  warp_sync();
  if (elect_one()) mbarrier_arrive(buffers.v_ring().full(0));
}

template <class Tile>
__device__ __forceinline__ void produce(const HopperForwardParams& params, const ForwardBuffers<Tile>& buffers,
                                        const ForwardWork<Tile>& work) {
  give_registers<Tile::kProducerRegisters>();
  if (warp_id() == 0) {
    if (elect_one()) load_tiles(params, buffers, work);
  } else if (warp_id() == 1) {
    if (work.has_tail()) zero_tail(buffers, work.tail_row());
  }
}

// ---- consumers ----

// Named barriers; 0 is the block's.
constexpr int kTurnBarrier = 1;      // and one more for each further consumer
constexpr int kConsumerBarrier = 8;  // of one consumer alone, likewise

// The order in which the consumers issue their products: each waits for its turn and gives it to the next. Between two
// of its turns a consumer has its softmax to do, while the products of the others run.
template <class Tile>
struct Turns {
  int consumer;
  int consumers;

  __device__ __forceinline__ bool used() const { return Tile::kPingPong && consumers > 1; }
  __device__ __forceinline__ bool last() const { return consumer == consumers - 1; }
  // Before the first turn: it is the first consumer's.
  __device__ __forceinline__ void begin() const {
    if (used() && last()) named_barrier_arrive(kTurnBarrier, 2 * kWarpgroupSize);
  }
  __device__ __forceinline__ void take() const {
    if (used()) named_barrier_sync(kTurnBarrier + consumer, 2 * kWarpgroupSize);
  }
  // `more`: a further round of turns follows.
  __device__ __forceinline__ void give(bool more) const {
    if (used() && (more || !last())) {
      named_barrier_arrive(kTurnBarrier + (last() ? 0 : consumer + 1), 2 * kWarpgroupSize);
    }
  }
};

// A consumer warpgroup: 64 queries, their registers, and the parts of its loop.
template <class T, class Tile, class ScoreMod>
struct ForwardConsumer {
  static constexpr int kS = Tile::kBlockN / 8, kO = Tile::kHeadDim / 8, kBlockN = Tile::kBlockN;

  const ForwardBuffers<Tile>& buffers;
  const ForwardWork<Tile>& work;
  const ScoreMod& score;
  Turns<Tile> turns;
  int tile_row;                             // its first row in the tile
  int warp_row;                             // this warp's first row in the tile
  RingPosition<Tile::kStages> at = {};      // of this step's keys
  RingPosition<Tile::kStages> before = {};  // of the values of the step before it
  // The zeros of s and p are not used. Without them ptxas moves registers about in the loop, 50 instructions a step at
  // 176 keys.
  float s[kS][4] = {};         // scores, then unnormalised probabilities, of the present block
  uint32_t p[kS / 2][4] = {};  // probabilities of the block before
  float o[kO][4] = {};
  float row_max[2] = {negative_infinity(), negative_infinity()}, row_sum[2] = {};
  float rescale[2] = {};  // the factor by which O has to shrink since it was last summed

  __device__ __forceinline__ static void release(uint32_t empty) {
    if (threadIdx.x % kWarpgroupSize == 0) mbarrier_arrive(empty);
  }

  // S = Q K^T of the present block.
  __device__ __forceinline__ void issue_scores() {
    warpgroup_abt<T, Tile::kHeadDim>(s, buffers.q(), tile_row, buffers.k(at.stage), 0, false);
    wgmma_commit();
  }
  // O += P V of the block before.
  __device__ __forceinline__ void issue_values() {
    warpgroup_ab<T>(o, p, buffers.v(before.stage), 0, 0, true);
    wgmma_commit();
  }

  // Scores of block n become unnormalised probabilities.
  template <bool kMasked>
  __device__ __forceinline__ void softmax(int n) {
    const int i = work.block_row + warp_row + lane_id() / 4, j = n * kBlockN + 2 * (lane_id() % 4);
    score.with_term(i, j, [&](const auto& term) {
      for_each_accumulator<1, kS>([&](int, int c, int e) {
        float slope;
        s[c][e] = term(s[c][e], 8 * (e / 2), 8 * c + e % 2, slope);
      });
    });
    if constexpr (kMasked) {
      const Range upper = keys_of(i), lower = keys_of(i + 8);
      for_each_accumulator<1, kS>([&](int, int c, int e) {
        const Range& range = e < 2 ? upper : lower;
        const int at = j + 8 * c + e % 2;
        if ((Tile::kWindow && at < range.first) || at >= range.last) s[c][e] = negative_infinity();
      });
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) rescale[r] = online_softmax_row(s, r, row_max[r], row_sum[r], score.factor());
  }
  __device__ __forceinline__ Range keys_of(int i) const {
    if constexpr (!Tile::kWindow) return {0, work.pair.k_limit};
    return visible_keys(work.pair, i);
  }

  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int step = 0; step < kS / 2; ++step) pack_a<T>(p[step], s, step);
  }

  // Most blocks far from the first ones move no maximum of the warp's 16 rows; then O stays as it is.
  __device__ __forceinline__ void rescale_output() {
    if (ballot(rescale[0] != 1.f || rescale[1] != 1.f) == 0) return;
    for_each_accumulator<1, kO>([&](int, int c, int e) { o[c][e] *= rescale[e / 2]; });
  }

  // Waits for the values of block n and the keys of the next one. It stands between the softmax and the wait for P V:
  // in straight code ptxas moves that wait up in front of most of the exponentials, and the product hides nothing.
  // Copies run a step ahead, so as a rule nothing is waited for.
  __device__ __forceinline__ void await_next(int n) {
    at.wait_full(buffers.v_ring());
    before = at;
    at.advance();
    if (n > work.n_first) at.wait_full(buffers.k_ring());
  }

  // The first block: there is no P V yet. O is zero, whatever it is rescaled by.
  __device__ __forceinline__ void begin(int n) {
    mbarrier_wait(buffers.q_full(), 0);
    at.wait_full(buffers.k_ring());
    wgmma_fence(s);
    issue_scores();
    wgmma_wait<0>(s);
    release(buffers.k_ring().empty(at.stage));
    softmax<true>(n);
    pack();
    await_next(n);
  }

  template <bool kMasked>
  __device__ __forceinline__ void step(int n) {
    turns.take();
    wgmma_fence(s, o, p);
    issue_scores();
    issue_values();
    turns.give(n > work.n_first);

    wgmma_wait<1>(s);
    release(buffers.k_ring().empty(at.stage));
    softmax<kMasked>(n);

    const uint32_t v_empty = buffers.v_ring().empty(before.stage);
    await_next(n);
    wgmma_wait<0>(o, p);
    release(v_empty);
    pack();
    rescale_output();
  }

  // P V of the last block.
  __device__ __forceinline__ void end() {
    wgmma_fence(o, p);
    issue_values();
    wgmma_wait<0>(o, p);
  }

  __device__ __forceinline__ void finish(const AttentionForwardParams& params) {
    FullAttention::Epilogue<1> epilogue(params, work.head, work.first_row() + warp_row, work.rows - warp_row);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool live = warp_row + 8 * r + lane_id() / 4 < work.live_rows;
      finish_row(epilogue, 0, r, o, row_max[r], row_sum[r], score.factor(), live);
    }
    // The products of all four warps have read Q.
    named_barrier_sync(kConsumerBarrier + turns.consumer, kWarpgroupSize);
    store_output(epilogue);
  }

  // The warp's 16 rows of O go through those of Q's tile, so that a lane stores 16 bytes and a row of a panel is one
  // whole line of memory.
  __device__ __forceinline__ void store_output(const FullAttention::Epilogue<1>& epilogue) const {
    const AttentionProblem& problem = epilogue.params.problem;
    const uint32_t lane = lane_offset_halves<kPanel>();
#pragma unroll
    for (int step = 0; step < kO / 2; ++step) {
      float scaled[2][4];
      for_each_accumulator<1, 2>(
          [&](int, int c, int e) { scaled[c][e] = o[2 * step + c][e] * epilogue.factors[0][e / 2]; });
      uint32_t fragment[4];
      pack_a<T>(fragment, scaled, 0);
      stmatrix_x4(fragment_address(buffers.q().panel(step / 4), lane, warp_row, step % 4 * 16), fragment);
    }
    warp_sync();
    const int64_t stride = static_cast<int64_t>(problem.heads_q) * problem.head_dim;
    T* out = static_cast<T*>(epilogue.params.out) + epilogue.row * stride + epilogue.head * problem.head_dim;
#pragma unroll
    for (int i = 0; i < Tile::TileQ::kPanels; ++i) {
      write_rows<T, kPanel>(buffers.q().panel(i), warp_row, 0, out + i * kPanel, stride, epilogue.rows, kPanel);
    }
  }
};

template <class T, class Tile, class ScoreMod>
__device__ __forceinline__ void consume(const HopperForwardParams& params, const ForwardBuffers<Tile>& buffers,
                                        const ForwardWork<Tile>& work) {
  const int index = warpgroup_id() - 1, tile_row = index * kWarpgroupRows;
  // Without a row of its own a warpgroup would slow the others down; no barrier counts it.
  if (index >= work.consumers()) return;
  take_registers<Tile::kConsumerRegisters>();

  const ScoreMod score(params.forward.problem, work.pair, work.sequence, work.head, work.sequence_begin, 0);
  ForwardConsumer<T, Tile, ScoreMod> consumer{.buffers = buffers,
                                              .work = work,
                                              .score = score,
                                              .turns = {index, work.consumers()},
                                              .tile_row = tile_row,
                                              .warp_row = tile_row + warp_id() % 4 * 16};
  // All of the warpgroup's rows see all keys of the blocks [n_left, n_right): its first row sees the lowest last key,
  // its last one the highest first key.
  const int last_row = min(tile_row + kWarpgroupRows, work.rows) - 1;
  const int n_right = visible_keys(work.pair, work.block_row + tile_row).last / Tile::kBlockN;
  const int n_left = ceil_div(visible_keys(work.pair, work.block_row + last_row).first, Tile::kBlockN);

  int n = work.n_last - 1;
  if (n > work.n_first) consumer.turns.begin();
  consumer.begin(n);
  --n;
  // Loops of their own, so that the one for most blocks compares nothing.
  if constexpr (Tile::kWindow) {
#pragma unroll 1
    for (; n >= work.n_first && n >= n_right; --n) consumer.template step<true>(n);
  }
#pragma unroll 1
  for (; n >= work.n_first && (!Tile::kWindow || n >= n_left); --n) consumer.template step<false>(n);
  if constexpr (Tile::kWindow) {
#pragma unroll 1
    for (; n >= work.n_first; --n) consumer.template step<true>(n);
  }
  consumer.end();
  consumer.finish(params.forward);
}

template <class T, class Tile, class ScoreMod>
__global__ void __launch_bounds__(Tile::kThreads, 1) varlen_attention_forward_hopper(
    const __grid_constant__ HopperForwardParams params) {
  constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kThreads = Tile::kThreads;
  const AttentionProblem& p = params.forward.problem;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(params.q);
    prefetch_tensor_map(params.k);
    prefetch_tensor_map(params.v);
  }

  const SequenceTile tile = find_tile<kBlockM>(FullAttention::queries(p), static_cast<int>(blockIdx.x));
  const int tiles = ceil_div(tile.length, kBlockM);
  if (tile.index >= tiles) return;
  const int head = static_cast<int>(blockIdx.y);
  const int block_row = (p.window_right >= 0 ? tiles - 1 - tile.index : tile.index) * kBlockM;
  const int rows = min(kBlockM, tile.length - block_row);
  const auto keys = FullAttention::keys(p);
  const int k_begin = keys.begin(tile.sequence), k_end = keys.begin(tile.sequence + 1);
  const Pair pair(p, tile.length, max(k_end - k_begin, 0));
  // First and last row see the lowest and the highest key of the block.
  const ForwardWork<Tile> work{.pair = pair,
                               .sequence = tile.sequence,
                               .sequence_begin = tile.begin,
                               .head = head,
                               .head_kv = head / (p.heads_q / p.heads_kv),
                               .block_row = block_row,
                               .rows = rows,
                               .live_rows = min(rows, pair.q_limit - block_row),
                               .k_begin = k_begin,
                               .n_first = visible_keys(pair, block_row).first / kBlockN,
                               .n_last = ceil_div(visible_keys(pair, block_row + rows - 1).last, kBlockN)};
  const bool of_no_sequence = tile.sequence < 0 || tile.sequence == p.batch;
  if (of_no_sequence || work.live_rows <= 0 || work.n_first >= work.n_last) {
    FullAttention::store_fully_masked_rows<kThreads, T>(params.forward, head, work.first_row(), rows);
    return;
  }

  const ForwardBuffers<Tile> buffers{shared_base()};
  if (threadIdx.x == 0) buffers.init(work.consumers());
  block_sync();
  if (warpgroup_id() == 0) {
    produce(params, buffers, work);
  } else {
    consume<T, Tile, ScoreMod>(params, buffers, work);
  }
}

}  // namespace warpform
