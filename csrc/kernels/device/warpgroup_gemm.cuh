// The core of products of large matrices on wgmma: C[m, n] = sum over k of A[m, k] B[n, k] for a list of tiles of C, by
// a block of one producer and two consumer warpgroups (sm_90a).
//
// Tile      128 x 256 outputs with four stages or 128 x 128 with six, 64 deep. A consumer warpgroup has 64 rows and all
//           columns: a stage of B serves both.
// Loads     by the policy of the kernel: boxes of tensor maps, which one thread asks for, and copies of 16 bytes by all
//           threads of the producer, for rows that lie scattered. Either operand has its depth or its outer dimension
//           contiguous (Major), as it has in memory: no operand is transposed.
// Walk      A block takes several items (tiles of C) one after the other without a barrier between them: while the
//           consumers store one, the producer loads the next as far as the stages reach.
// Flight    The products of one step stay in flight while those of the next are issued; a stage is given back when the
//           step after it has been issued and its own products are done.
// Registers 168 a thread on entry, then 40 for the producer and 232 for the consumers: 504 a column of threads, as on
//           entry: the pool has no more.
// Bounds    128 x 256: a step takes the tensor cores 1,024 clocks and shared memory 128 bytes a clock for as long, all
//           that it gives. 128 x 128: 512 clocks, of which shared memory needs 640. L2 has to give 0.0117 and 0.0156
//           bytes a FLOP: at the 5.5 TB/s that it is said to give, 470 and 350 TFLOP/s, below the other two. A cluster
//           of two that shares B would halve that; it is the first thing to add if a GPU shows the bound.
// Measured  not yet on a GPU.
#pragma once

#include <type_traits>

#include "device/panel_tile.cuh"
#include "device/warpgroup.cuh"

namespace warpform {

template <int kN_, int kStages_, Major kMajorA_ = Major::kDepth, Major kMajorB_ = Major::kDepth>
struct WarpgroupTile {
  static constexpr int kM = 128, kN = kN_, kDepth = 64, kStages = kStages_;
  static constexpr Major kMajorA = kMajorA_, kMajorB = kMajorB_;
  static constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroupSize;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kCtas = 1;  // an SM
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                    (1 + kConsumers) * (kMostRegisters / kThreads / 8 * 8),
                "what the block has on entry");

  // Of a stage. A row in shared memory is 64 of the depth, or 64 of the outer dimension.
  using A = std::conditional_t<kMajorA == Major::kDepth, PanelTile<kM, kDepth>, PanelTile<kDepth, kM>>;
  using B = std::conditional_t<kMajorB == Major::kDepth, PanelTile<kN, kDepth>, PanelTile<kDepth, kN>>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kRingAt = kStages * kStageBytes;
  // Shared memory of the product; what a kernel has of its own begins here, 16-byte aligned.
  static constexpr int kBytes = kRingAt + Ring<kStages>::kBytes;
  static_assert(kBytes % 16 == 0 && kBytes <= kMostSharedBytes, "shared memory of a block of sm_90");

  static __device__ __forceinline__ A a(int stage) { return {shared_base() + stage * kStageBytes}; }
  static __device__ __forceinline__ B b(int stage) { return {shared_base() + stage * kStageBytes + A::kBytes}; }
  static __device__ __forceinline__ Ring<kStages> ring() { return {shared_base() + kRingAt}; }
};

template <Major kMajorA = Major::kDepth, Major kMajorB = Major::kDepth>
using WideWarpgroupTile = WarpgroupTile<256, 4, kMajorA, kMajorB>;
template <Major kMajorA = Major::kDepth, Major kMajorB = Major::kDepth>
using NarrowWarpgroupTile = WarpgroupTile<128, 6, kMajorA, kMajorB>;

// ---- policies ----
//
// Items     int count() const: how many items the block walks. Item at(int i) const: the i-th; Item is the policy's
//           own, and item.steps is its number of steps of 64 of the depth. All threads ask, so that what an item takes
//           from memory must not change during the launch.
//           static constexpr bool kMayBeEmpty: whether items without steps occur; the epilogue gets zeros for them.
// Load      static constexpr int kBoxBytes: bytes that boxes bring to each stage, 0 if none.
//           static constexpr bool kCopies: whether the threads of the producer copy.
//           void begin(const Item&): before the first step of an item. The steps come in order.
//           void boxes(const Item&, int step, Tile::A, Tile::B, uint32_t barrier): one thread asks for kBoxBytes, if
//           not 0, that complete on the barrier.
//           void copies(const Item&, int step, Tile::A, Tile::B): if kCopies, the producer's 128 threads, which are the
//           first of the block, begin cp.async; commit and wait are the core's.
//           Boxes and copies together write the whole stage: what lies outside of the matrices is zero in both
//           operands.
// Epilogue  void operator()(const Item&, float (&acc)[1][kN / 8][4], int row): the accumulators of a warp's 16 rows,
//           from `row` of the tile on, in the layout of mma.sync. It may change them.
// Left      static constexpr bool kInRegisters: whether the left operand takes its way through registers, and changes on
//           it. LeftFromShared is without. With it, kMajorA does not count, and
//           void begin(const Item&): a consumer begins an item.
//           void begin_step(int row): and a step of it, of which a warp takes the 16 rows from `row` of the tile on.
//           void fragment(Tile::A, int row, int k, uint32_t (&a)[4]): those rows, and 16 columns from k on, in the
//           layout of mma.sync's left operand. All lanes of the warp call it.
struct LeftFromShared {
  static constexpr bool kInRegisters = false;
};

// A thread of the producer copies a chunk of 8 columns of every sixteenth row of a panel: of row copied_row(turn).
constexpr int kCopiedRows = kWarpgroupSize / (kPanel / kChunk);
__device__ __forceinline__ int copied_row(int turn) {
  return turn * kCopiedRows + static_cast<int>(threadIdx.x) / (kPanel / kChunk);
}
// Copies 64 columns, of which the first `cols` (a multiple of 8) exist, of rows that lie scattered, `stride` elements
// apart, to a panel. rows[turn] is the row in memory that becomes copied_row(turn), negative for zeros.
template <class T, int kTurns>
__device__ __forceinline__ void copy_rows_async(SharedTile<kPanel> panel, const T* from, int64_t stride, int cols,
                                                const int (&rows)[kTurns]) {
  const int c = static_cast<int>(threadIdx.x) % (kPanel / kChunk);
  const bool inside = c * kChunk < cols;
  from += c * kChunk;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    cp_async_16(panel.chunk(copied_row(turn), c), from + rows[turn] * stride, inside && rows[turn] >= 0);
  }
}

// ---- the producer ----

// By one thread: every stage is filled by boxes.
template <class Tile, class Items, class Load>
__device__ __forceinline__ void gemm_produce_boxes(const Items& items, Load& load) {
  const Ring<Tile::kStages> ring = Tile::ring();
  RingPosition<Tile::kStages> at;
  for (int i = 0; i < items.count(); ++i) {
    const auto item = items.at(i);
    load.begin(item);
#pragma unroll 1
    for (int step = 0; step < item.steps; ++step) {
      at.wait_empty(ring);
      mbarrier_arrive_expect(ring.full(at.stage), Load::kBoxBytes);
      load.boxes(item, step, Tile::a(at.stage), Tile::b(at.stage), ring.full(at.stage));
      at.advance();
    }
  }
}

// By a warpgroup: its threads copy, and one of them asks for boxes beside. A stage is announced kLag steps after its
// copies began. The consumers give a stage back when they have begun the step after it, so that kStages - 1 steps of
// lag would wait for each other for ever.
template <class Tile, class Items, class Load>
__device__ __forceinline__ void gemm_produce_copies(const Items& items, Load& load) {
  constexpr int kLag = Tile::kStages - 2;
  const Ring<Tile::kStages> ring = Tile::ring();
  RingPosition<Tile::kStages> at, landing;
  int under_way = 0;
  const auto announce = [&] {
    mbarrier_arrive(ring.full(landing.stage));
    landing.advance();
  };
  for (int i = 0; i < items.count(); ++i) {
    const auto item = items.at(i);
    load.begin(item);
#pragma unroll 1
    for (int step = 0; step < item.steps; ++step) {
      at.wait_empty(ring);
      if (Load::kBoxBytes > 0 && threadIdx.x == 0) {
        mbarrier_arrive_expect(ring.full(at.stage), Load::kBoxBytes);
        load.boxes(item, step, Tile::a(at.stage), Tile::b(at.stage), ring.full(at.stage));
      }
      load.copies(item, step, Tile::a(at.stage), Tile::b(at.stage));
      cp_async_commit();
      at.advance();
      if (under_way == kLag) {
        cp_async_wait<kLag>();
        fence_proxy_async();
        announce();
      } else {
        ++under_way;
      }
    }
  }
  cp_async_wait<0>();
  fence_proxy_async();
  for (; under_way > 0; --under_way) announce();
}

// ---- the consumers ----

// The right operand of a product: 16 of the depth from k on, and all columns of the tile.
template <class Tile>
__device__ __forceinline__ uint64_t gemm_right(typename Tile::B b, int k) {
  if constexpr (Tile::kMajorB == Major::kDepth) {
    return b.rows_by_depth(0, k);
  } else {
    return b.depth_by_columns(k, 0);
  }
}

// acc = A B^T of one step, or += where `accumulate`, for the 64 rows of the tile from `row` on. Issues the products
// only.
template <class T, class Tile>
__device__ __forceinline__ void gemm_step(float (&acc)[Tile::kN / 8][4], typename Tile::A a, typename Tile::B b,
                                          int row, bool accumulate) {
#pragma unroll
  for (int k = 0; k < Tile::kDepth; k += 16) {
    uint64_t left;
    if constexpr (Tile::kMajorA == Major::kDepth) {
      left = a.rows_by_depth(row, k);
    } else {
      left = a.depth_by_columns(k, row);
    }
    wgmma<T, Tile::kN, Tile::kMajorA, Tile::kMajorB>(acc, left, gemm_right<Tile>(b, k), accumulate || k > 0);
  }
}

// The same with the left operand through registers, `row` the first of the warp's 16. Every product is a group of its
// own: before a fragment is loaded, the product of the step before that has its registers is waited for, and three are
// under way meanwhile. At the end the products of the step before are done.
template <class T, class Tile, class Left>
__device__ __forceinline__ void gemm_step_registers(float (&acc)[Tile::kN / 8][4], uint32_t (&a)[Tile::kDepth / 16][4],
                                                    Left& left, typename Tile::A from, typename Tile::B b, int row,
                                                    bool accumulate) {
  constexpr int kProducts = Tile::kDepth / 16;
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    wgmma_wait<kProducts - 1>(a[i]);
    left.fragment(from, row, 16 * i, a[i]);
    wgmma_fence(a[i]);
    wgmma<T, Tile::kN, Tile::kMajorB>(acc, a[i], gemm_right<Tile>(b, 16 * i), accumulate || i > 0);
    wgmma_commit();
  }
}

// Arrivals of a warpgroup that empty a stage. Of the products' reads one thread knows; where warps read the left operand
// themselves, each has to say that it has.
template <class Left>
constexpr int kReleases = Left::kInRegisters ? kWarpgroupSize / kWarpSize : 1;

// Sums `steps` steps into accumulators by products that issue(step, stage) issues, of which the first overwrite them. A
// warpgroup calls it, for which kReleases<Left> threads arrive at the empty barriers. With the left operand in registers
// issue() commits, too, and waits for the products of the step before.
template <class Left = LeftFromShared, int kStages, class Issue, class... Accumulators>
__device__ __forceinline__ void wgmma_steps(Ring<kStages> ring, RingPosition<kStages>& at, int steps, Issue&& issue,
                                            Accumulators&... acc) {
  const auto release = [&](int stage) {
    if (threadIdx.x % (kWarpgroupSize / kReleases<Left>) == 0) mbarrier_arrive(ring.empty(stage));
  };
  int before = 0;  // the stage of the step before
  wgmma_fence(acc...);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    at.wait_full(ring);
    if constexpr (Left::kInRegisters) {
      issue(step, at.stage);
    } else {
      wgmma_fence();
      issue(step, at.stage);
      wgmma_commit();
      wgmma_wait<1>();  // the step before is done; the accumulators stay under way
    }
    if (step > 0) release(before);
    before = at.stage;
    at.advance();
  }
  wgmma_wait<0>(acc...);
  if (steps > 0) release(before);
}

template <class T, class Tile, class Items, class Epilogue, class Left>
__device__ __forceinline__ void gemm_consume(const Items& items, Epilogue& epilogue, Left& left) {
  const int row = (warpgroup_id() - 1) * 64;
  const int warp_row = row + shuffle(warp_id() % 4, 0) * 16;  // the compiler knows that lanes agree
  RingPosition<Tile::kStages> at;
  float acc[1][Tile::kN / 8][4] = {};
#pragma unroll 1
  for (int i = 0; i < items.count(); ++i) {
    const auto item = items.at(i);
    if (Items::kMayBeEmpty && item.steps == 0) {
      for_each_accumulator<1, Tile::kN / 8>([&](int m, int n, int e) { acc[m][n][e] = 0.f; });
    }
    if constexpr (Left::kInRegisters) {
      uint32_t a[Tile::kDepth / 16][4] = {};
      left.begin(item);
      wgmma_steps<Left>(
          Tile::ring(), at, item.steps,
          [&](int step, int stage) {
            left.begin_step(warp_row);
            gemm_step_registers<T, Tile>(acc[0], a, left, Tile::a(stage), Tile::b(stage), warp_row, step > 0);
          },
          acc[0]);
      wgmma_wait<0>(a);
    } else {
      wgmma_steps(
          Tile::ring(), at, item.steps,
          [&](int step, int stage) { gemm_step<T, Tile>(acc[0], Tile::a(stage), Tile::b(stage), row, step > 0); },
          acc[0]);
    }
    epilogue(item, acc, warp_row);
  }
}

// ---- both ----

// The kernel's body, for Tile::kThreads threads and Tile::kBytes of shared memory. All threads call it, once; what the
// kernel has stored to shared memory before is seen by all afterwards.
template <class T, class Tile, class Items, class Load, class Epilogue, class Left = LeftFromShared>
__device__ __forceinline__ void warpgroup_gemm(const Items& items, Load load, Epilogue epilogue, Left left = {}) {
  static_assert(Load::kCopies || Load::kBoxBytes == Tile::kStageBytes, "a stage is filled");
  const Ring<Tile::kStages> ring = Tile::ring();
  if (threadIdx.x == 0) {
    ring.init(Load::kCopies ? kWarpgroupSize + (Load::kBoxBytes > 0) : 1, Tile::kConsumers * kReleases<Left>);
    fence_mbarrier_init();
  }
  block_sync();
  if (warpgroup_id() == 0) {
    give_registers<Tile::kProducerRegisters>();
    if constexpr (Load::kCopies) {
      gemm_produce_copies<Tile>(items, load);
    } else if (threadIdx.x == 0) {
      gemm_produce_boxes<Tile>(items, load);
    }
  } else {
    take_registers<Tile::kConsumerRegisters>();
    gemm_consume<T, Tile>(items, epilogue, left);
  }
}

}  // namespace warpform
