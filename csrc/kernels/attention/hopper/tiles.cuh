// Tiles of the Hopper attention kernels, with the reason for each. They were chosen by counts of clocks, registers and
// shared memory, and are not measured yet. The counts are clocks of an SM a step (4,096 FLOP of 16-bit wgmma, 16 exp2
// and 4 issue slots a clock).
#pragma once

#include "attention/launch.h"
#include "device/panel_tile.cuh"
#include "device/warpgroup.cuh"

namespace warpform {

constexpr int kWarpgroupRows = 64;  // of a wgmma

// Queries x keys at a time. A consumer warpgroup has 64 of the queries; one more warpgroup is the producer.
//
// kWindow     keys may be hidden from a query that lie before the sequence's end (causal attention, windows).
// kPingPong   the consumer warpgroups issue products by turns, so that the softmax of one runs under the products of
//             the others: at 128x128 and head_dim 128 a softmax is 528 clocks of exp2 and 550 of issue, the products of
//             the other warpgroup are 1,024. FlashAttention-3 does so up to head_dim 128; it is to be measured here.
template <int kHeadDim_, int kBlockM_, int kBlockN_, bool kWindow_, bool kPingPong_>
struct HopperForwardTile {
  static constexpr int kHeadDim = kHeadDim_, kBlockM = kBlockM_, kBlockN = kBlockN_;
  static constexpr bool kWindow = kWindow_, kPingPong = kPingPong_;
  static constexpr int kStages = 2;  // of K and of V
  static constexpr int kConsumers = kBlockM / kWarpgroupRows;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupSize;
  // A thread's registers on entry, 168 or 128, and after setmaxnreg, which moves them between warpgroups. The producer
  // issues copies and needs few; at 24 it leaves two consumers 240.
  static constexpr int kEntryRegisters = kMostRegisters / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;

  using TileQ = PanelTile<kBlockM, kHeadDim>;
  using TileKV = PanelTile<kBlockN, kHeadDim>;
  static constexpr int kBarriers = 2 + 4 * kStages;
  static constexpr int kSharedBytes = TileQ::kBytes + 2 * kStages * TileKV::kBytes + kBarriers * kBarrierBytes;

  static_assert(kHeadDim == 64 || kHeadDim == 128, "columns of O that the consumers have registers for");
  static_assert(kConsumers == 2 || kConsumers == 3, "the registers are for as many");
  static_assert(kBlockM % kWarpgroupRows == 0 && kBlockM <= 256 && kBlockN <= 256, "a box has up to 256 rows");
  static_assert(kSharedBytes <= kMostSharedBytes, "a block has no more shared memory");
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kEntryRegisters,
                "the consumers would wait for registers for ever");
};

// head_dim 128, any mask and score bias. 2,048 clocks of products, 1,056 of exp2, 1,100 of issue; 163,920 bytes. S, O
// and P are 160 registers a thread. The block is square so that causal attention masks one block in a tile.
using HopperTile128 = HopperForwardTile<128, 128, 128, /*kWindow=*/true, /*kPingPong=*/true>;
// head_dim 128, every query sees all keys. 2,816 clocks of products, 1,440 of exp2, 1,356 of issue: a tenth fewer issue
// slots a key than 128 keys take, and fewer waits. 213,072 bytes; S, O and P are 196 registers a thread. 192 keys would
// take 229,456 bytes and 208 registers.
using HopperTile128Wide = HopperForwardTile<128, 128, 176, /*kWindow=*/false, /*kPingPong=*/true>;
// head_dim 64. 1,536 clocks of products, 1,584 of exp2, 1,404 of issue: all three at their limits. A third of the
// reads of K and V from L2 that 64 queries would take; 90,192 bytes. S, O and P are 128 registers of 160.
using HopperTile64 = HopperForwardTile<64, 192, 128, /*kWindow=*/true, /*kPingPong=*/true>;
// head_dim 64, for lengths of which 192 queries would leave much of a tile empty, and for score biases, which need more
// than 160 registers. 1,024 clocks of products, 1,056 of exp2, 956 of issue; 82,000 bytes.
using HopperTile64Small = HopperForwardTile<64, 128, 128, /*kWindow=*/true, /*kPingPong=*/true>;

// Whether blocks of `wide` rows are to be taken instead of `narrow` ones for so many rows: if what is computed in vain
// past the end grows by no more than one part in `share`. The shares are guesses from the counts above: 16 for keys, as
// a wide block saves a tenth of the issue slots, which are half of the products' clocks; 8 for queries, as a wide block
// saves a third of the traffic of K and V.
constexpr bool takes_wide_blocks(int64_t rows, int wide, int narrow, int share) {
  return ceil_div(rows, int64_t{wide}) * wide * share <= ceil_div(rows, int64_t{narrow}) * narrow * (share + 1);
}
// Tiles of so many queries, at most one more a sequence than there are.
inline int64_t forward_hopper_tiles(const AttentionProblem& p, int block_m) {
  return (static_cast<int64_t>(p.total_q / block_m) + p.batch) * p.heads_q;
}
constexpr bool takes_wide_keys(int max_seqlen_k) {
  return takes_wide_blocks(max_seqlen_k, HopperTile128Wide::kBlockN, HopperTile128::kBlockN, 16);
}
// A wide block takes half as long again as a narrow one, so that wide ones must be enough for some rounds of all SMs.
constexpr bool takes_wide_queries(int max_seqlen_q, int64_t wide_tiles, int sm_count) {
  return wide_tiles >= 2 * sm_count &&
         takes_wide_blocks(max_seqlen_q, HopperTile64::kBlockM, HopperTile64Small::kBlockM, 8);
}

}  // namespace warpform
