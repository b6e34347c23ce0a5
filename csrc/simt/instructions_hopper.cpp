// Small kernels around each emulated instruction of compute capability 9.0, and the op that runs them: what the emulator
// computes is compared with plain PyTorch by its tests (tests/simt/test_instructions_hopper.py).
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/panel_tile.cuh"
#include "device/warpgroup.cuh"
#include "torch/launch.h"

namespace warpform {
namespace {

constexpr int kSettings = 16;
constexpr int kThreads = 128;

struct HopperParams {
  TensorMap a_map, b_map;
  const void* a;
  const void* b;
  void* out;
  int64_t n;  // elements of a
  int settings[kSettings];
};

template <class T>
T at(const void* p, int64_t i) {
  return load_global(static_cast<const T*>(p) + i);
}
template <class T>
void put(void* p, int64_t i, T v) {
  store_global(static_cast<T*>(p) + i, v);
}
int thread() { return static_cast<int>(threadIdx.x); }
int thread_of_warpgroup() { return thread() % kWarpgroupSize; }
uint32_t slot(int bytes) { return shared_base() + static_cast<uint32_t>(bytes); }

// One thread initialises barriers for these numbers of arrivals; then all may use them.
void start(std::initializer_list<std::pair<uint32_t, int>> barriers) {
  if (thread() == 0) {
    for (const auto& [barrier, arrivals] : barriers) mbarrier_init(barrier, arrivals);
    fence_mbarrier_init();
  }
  block_sync();
}

// ---- mbarriers ----

// a float32 [128] -> out: `settings[0]` times v[t] = v[(t + 37) % 128] + 1, from thread to thread through two buffers.
__global__ void mbarrier_rounds(const __grid_constant__ HopperParams p) {
  const uint32_t barrier = slot(2 * kThreads * 4);
  start({{barrier, kThreads}});
  float v = at<float>(p.a, thread());
  for (int round = 0; round < p.settings[0]; ++round) {
    const int buffer = round % 2 * kThreads * 4;
    store_shared(slot(buffer + thread() * 4), v);
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, static_cast<uint32_t>(round % 2));
    v = load_shared<float>(slot(buffer + (thread() + 37) % kThreads * 4)) + 1;
  }
  put(p.out, thread(), v);
}

// A wait of single lanes, of a phase that ended long ago and of one under way. a float32 [128] -> out, reversed.
__global__ void mbarrier_single_waits(const __grid_constant__ HopperParams p) {
  const uint32_t barrier = slot(kThreads * 4);
  start({{barrier, kThreads}});
  store_shared(slot(thread() * 4), at<float>(p.a, thread()));
  if (thread() % 3 == 0) mbarrier_wait(barrier, 1);  // as if the phase before had ended
  mbarrier_arrive(barrier);
  for (int i = 0; i < thread() % 4; ++i) mbarrier_wait(barrier, 0);
  mbarrier_wait(barrier, 0);
  put(p.out, thread(), load_shared<float>(slot((kThreads - 1 - thread()) * 4)));
}

// a int16 [128] -> out = a + 1: three arrivals, two of which announce a copy of half of a each; the third is of the
// thread that stores the 1.
__global__ void mbarrier_counts(const __grid_constant__ HopperParams p) {
  const uint32_t barrier = slot(1024), one = slot(512);
  start({{barrier, 3}});
  if (thread() == 1 || thread() == 65) {
    mbarrier_arrive_expect(barrier, 128);
    tma_load(slot(thread() == 1 ? 0 : 128), p.a_map, barrier, thread() - 1);
  }
  if (thread() == 90) {
    store_shared(one, int32_t{1});
    mbarrier_arrive(barrier);
  }
  mbarrier_wait(barrier, 0);
  put(p.out, thread(),
      static_cast<int16_t>(load_shared<int16_t>(slot(thread() * 2)) + static_cast<int16_t>(load_shared<int32_t>(one))));
}

// ---- rings: a int16 [n] -> out int16, in tiles of 96, each reversed, zeros behind the last element ----

constexpr int kRingTile = 96, kRingSlot = 256;

template <int kStages>
void consume(const HopperParams& p, Ring<kStages> ring, int tiles, bool every_lane) {
  RingPosition<kStages> at;
  const int i = thread() - kWarpSize;
  for (int tile = 0; tile < tiles; ++tile) {
    at.wait_full(ring);
    put(p.out, tile * kRingTile + i, load_shared<int16_t>(slot(at.stage * kRingSlot + (kRingTile - 1 - i) * 2)));
    if (every_lane) {
      mbarrier_arrive(ring.empty(at.stage));
    } else {
      warp_sync();
      if (elect_one()) mbarrier_arrive(ring.empty(at.stage));
    }
    at.advance();
  }
}

template <int kStages>
Ring<kStages> start_ring(int producers, int consumers) {
  const Ring<kStages> ring{slot(kStages * kRingSlot)};
  if (thread() == 0) {
    ring.init(producers, consumers);
    fence_mbarrier_init();
  }
  block_sync();
  return ring;
}

// One lane of warp 0 has TMA bring the tiles, warps 1 to 3 consume them.
template <int kStages>
__global__ void ring_of_copies(const __grid_constant__ HopperParams p) {
  const Ring<kStages> ring = start_ring<kStages>(1, 3);
  const int tiles = static_cast<int>((p.n + kRingTile - 1) / kRingTile);
  if (warp_id() > 0) return consume<kStages>(p, ring, tiles, false);
  if (elect_one()) {
    RingPosition<kStages> at;
    for (int tile = 0; tile < tiles; ++tile) {
      at.wait_empty(ring);
      mbarrier_arrive_expect(ring.full(at.stage), kRingTile * 2);
      tma_load(slot(at.stage * kRingSlot), p.a_map, ring.full(at.stage), tile * kRingTile);
      at.advance();
    }
  }
}

// All lanes of warp 0 store the tiles; every lane arrives on every barrier.
template <int kStages>
__global__ void ring_of_stores(const __grid_constant__ HopperParams p) {
  const Ring<kStages> ring = start_ring<kStages>(kWarpSize, 3 * kWarpSize);
  const int tiles = static_cast<int>((p.n + kRingTile - 1) / kRingTile);
  if (warp_id() > 0) return consume<kStages>(p, ring, tiles, true);
  RingPosition<kStages> position;
  for (int tile = 0; tile < tiles; ++tile) {
    position.wait_empty(ring);
    for (int i = lane_id(); i < kRingTile; i += kWarpSize) {
      const int64_t from = int64_t{tile} * kRingTile + i;
      store_shared(slot(position.stage * kRingSlot + i * 2), from < p.n ? at<int16_t>(p.a, from) : int16_t{0});
    }
    mbarrier_arrive(ring.full(position.stage));
    position.advance();
  }
}

// ---- TMA: a int16, any number; settings: see box_of -> out int16, the bytes as they lie in shared memory ----

constexpr int kMostBoxBytes = 64 * 1024;

__global__ void tma_box(const __grid_constant__ HopperParams p) {
  const uint32_t barrier = slot(kMostBoxBytes);
  const int* s = p.settings;
  const int elements = s[7] * s[8] * s[9];
  if (thread() == 0) prefetch_tensor_map(p.a_map);
  start({{barrier, 1}});
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier, elements * 2);
    if (s[0] == 1) tma_load(slot(0), p.a_map, barrier, s[10]);
    if (s[0] == 2) tma_load(slot(0), p.a_map, barrier, s[10], s[11]);
    if (s[0] == 3) tma_load(slot(0), p.a_map, barrier, s[10], s[11], s[12]);
  }
  mbarrier_wait(barrier, 0);
  for (int i = thread(); i < elements; i += kThreads) put(p.out, i, load_shared<int16_t>(slot(i * 2)));
}

// rank, swizzle, three sizes, two strides, three sides of the box, three coordinates, first element.
TensorBox box_of(const HopperParams& p) {
  const int* s = p.settings;
  return {.data = static_cast<const int16_t*>(p.a) + s[13],
          .rank = s[0],
          .sizes = {s[2], s[3], s[4]},
          .strides = {s[5], s[6]},
          .box = {s[7], s[8], s[9]},
          .swizzle = static_cast<Swizzle>(s[1])};
}

// ---- warps ----

// a int16 [32, 4, 2], the registers of each lane -> out int16 [4, 8, 8], the tiles
template <bool kTransposed>
__global__ void stmatrix(const __grid_constant__ HopperParams p) {
  const int lane = lane_id();
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = at<uint32_t>(p.a, lane * 4 + i);
  // Rows in an order of their own, so that addresses matter.
  const uint32_t row = slot(lane * 7 % 32 * 16);
  if constexpr (kTransposed) {
    stmatrix_x4_trans(row, r);
  } else {
    stmatrix_x4(row, r);
  }
  warp_sync();
  put(p.out, lane, load_shared<uint4>(row));
}

// a int16 [32, 4, 2] -> out, the same through shared memory
template <bool kTransposed>
__global__ void stmatrix_ldmatrix(const __grid_constant__ HopperParams p) {
  const int lane = lane_id();
  uint32_t r[4], got[4];
  for (int i = 0; i < 4; ++i) r[i] = at<uint32_t>(p.a, lane * 4 + i);
  const uint32_t row = slot(lane * 7 % 32 * 16);
  if constexpr (kTransposed) {
    stmatrix_x4_trans(row, r);
    warp_sync();
    ldmatrix_x4_trans(got, row);
  } else {
    stmatrix_x4(row, r);
    warp_sync();
    ldmatrix_x4(got, row);
  }
  for (int i = 0; i < 4; ++i) put(p.out, lane * 4 + i, got[i]);
}

// out int32 [settings[0], 128]: which threads each of the calls elects
__global__ void elect(const __grid_constant__ HopperParams p) {
  for (int call = 0; call < p.settings[0]; ++call) {
    put(p.out, call * kThreads + thread(), elect_one() ? int32_t{1} : int32_t{0});
  }
}

// a float32 [threads] -> out = 2 a, by warpgroups that have exchanged registers
template <int kGiven, int kTaken>
__global__ void registers(const __grid_constant__ HopperParams p) {
  if (warpgroup_id() == 0) {
    give_registers<kGiven>();
  } else {
    take_registers<kTaken>();
  }
  put(p.out, thread(), 2 * at<float>(p.a, thread()));
}

// Warpgroups take turns; out int32 [settings[0], warpgroups] says whose turn each was.
template <int kWarpgroups>
__global__ void turns(const __grid_constant__ HopperParams p) {
  constexpr int kPair = 2 * kWarpgroupSize;
  const uint32_t counter = slot(0);
  const int group = warpgroup_id(), next = (group + 1) % kWarpgroups, rounds = p.settings[0];
  if (group == kWarpgroups - 1) {
    if (thread_of_warpgroup() == 0) store_shared(counter, int32_t{0});
    named_barrier_arrive(1, kPair);
  }
  for (int round = 0; round < rounds; ++round) {
    named_barrier_sync(1 + group, kPair);
    if (thread_of_warpgroup() == 0) {
      const auto turn = load_shared<int32_t>(counter);
      put(p.out, turn, int32_t{group});
      store_shared(counter, turn + 1);
    }
    if (round + 1 < rounds || next > 0) named_barrier_arrive(1 + next, kPair);
  }
}

// ---- products ----

template <int kN>
void put_accumulators(void* out, int64_t first, const float (&acc)[kN][4]) {
  const int row = warp_id() % 4 * 16 + lane_id() / 4, col = lane_id() % 4 * 2;
  for (int n = 0; n < kN; ++n) {
    for (int e = 0; e < 4; ++e) put(out, first + (row + e / 2 * 8) * (8 * kN) + 8 * n + col + e % 2, acc[n][e]);
  }
}

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// out float32 [64, kN] = 1 + A [64, 64] B [64, kN], four products in a chain. a: A, transposed for kOuter; b: B
// transposed, as it is where kOuterB.
template <class T, int kN, bool kRegisters, Major kA, Major kB>
__global__ void wgmma_tile(const __grid_constant__ HopperParams p) {
  using TileB = std::conditional_t<kB == Major::kOuter, PanelTile<64, round_up(kN, 64)>, PanelTile<kN, 64>>;
  const PanelTile<64, 64> a{slot(0)};
  const TileB b{slot(a.kBytes)};
  const uint32_t barrier = slot(a.kBytes + b.kBytes);
  start({{barrier, 1}});
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier, (kRegisters ? 0 : a.kBytes) + b.kBytes);
    if constexpr (!kRegisters) load_panels(a, p.a_map, barrier, 0, 0);
    load_panels(b, p.b_map, barrier, 0, 0);
  }
  float acc[kN / 8][4];
  for (auto& row : acc) {
    for (float& v : row) v = 1;
  }
  uint32_t left[4][4] = {};
  if constexpr (kRegisters) {
    const int row = warp_id() * 16 + lane_id() / 4, col = lane_id() % 4 * 2;
    for (int step = 0; step < 4; ++step) {
      for (int r = 0; r < 4; ++r) {
        left[step][r] = at<uint32_t>(p.a, ((row + r % 2 * 8) * 64 + step * 16 + r / 2 * 8 + col) / 2);
      }
    }
  }
  mbarrier_wait(barrier, 0);
  wgmma_fence(acc, left);
  for (int step = 0; step < 4; ++step) {
    const uint64_t right = kB == Major::kOuter ? b.depth_by_columns(16 * step, 0) : b.rows_by_depth(0, 16 * step);
    if constexpr (kRegisters) {
      wgmma<T, kN, kB>(acc, left[step], right, true);
    } else {
      wgmma<T, kN, kA, kB>(acc, kA == Major::kOuter ? a.depth_by_columns(16 * step, 0) : a.rows_by_depth(0, 16 * step),
                           right, true);
    }
  }
  wgmma_commit();
  wgmma_wait<0>(acc, left);
  put_accumulators(p.out, 0, acc);
}

// out float32 [2, 64, 64] = A [64, 64] times the transposes of both halves of b [128, 64], in two groups: the first is
// used while the second is under way.
__global__ void wgmma_two_groups(const __grid_constant__ HopperParams p) {
  const PanelTile<64, 64> a{slot(0)};
  const PanelTile<128, 64> b{slot(a.kBytes)};
  const uint32_t barrier = slot(a.kBytes + b.kBytes);
  start({{barrier, 1}});
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier, a.kBytes + b.kBytes);
    load_panels(a, p.a_map, barrier, 0, 0);
    load_panels(b, p.b_map, barrier, 0, 0);
  }
  mbarrier_wait(barrier, 0);
  float first[8][4], second[8][4];
  for (int round = 0; round < 2; ++round) {
    wgmma_fence(first, second);
    warpgroup_abt<bf16_t, 64>(first, a, 0, b, 0, false);
    wgmma_commit();
    warpgroup_abt<bf16_t, 64>(second, a, 0, b, 64, false);
    wgmma_commit();
    wgmma_wait<1>(first);
    put_accumulators(p.out, 0, first);
    wgmma_wait<0>(second);
    put_accumulators(p.out, 64 * 64, second);
  }
}

// The loop of attention without its softmax: out float32 [64, 128] = the sum over blocks j of round(Q K_j^T) V_j, where
// Q = a [64, 64], b [blocks, 64, 3 * 64] has K in its first 64 columns and V behind them. Warpgroup 0 is the producer,
// and S of the next block is under way together with the product with V.
__global__ void wgmma_pipeline(const __grid_constant__ HopperParams p) {
  constexpr int kStages = 2;
  using Scores = float[8][4];
  const PanelTile<64, 64> q{slot(0)};
  const auto k = [](int stage) { return PanelTile<64, 64>{slot(8192 + stage * 8192)}; };
  const auto v = [](int stage) { return PanelTile<64, 128>{slot(8192 + kStages * 8192 + stage * 16384)}; };
  const uint32_t barriers = slot(8192 + kStages * (8192 + 16384));
  const Ring<kStages> k_ring{barriers}, v_ring{barriers + Ring<kStages>::kBytes};
  const uint32_t q_full = barriers + 2 * Ring<kStages>::kBytes;
  const int blocks = p.settings[0];
  if (thread() == 0) {
    k_ring.init(1, 1);
    v_ring.init(1, 1);
    mbarrier_init(q_full, 1);
    fence_mbarrier_init();
  }
  block_sync();
  if (warpgroup_id() == 0) {
    if (warp_id() == 0 && elect_one()) {
      mbarrier_arrive_expect(q_full, q.kBytes);
      load_panels(q, p.a_map, q_full, 0, 0);
      RingPosition<kStages> at;
      for (int j = 0; j < blocks; ++j) {
        at.wait_empty(k_ring);
        mbarrier_arrive_expect(k_ring.full(at.stage), k(0).kBytes);
        load_panels(k(at.stage), p.b_map, k_ring.full(at.stage), 0, j * 64);
        at.wait_empty(v_ring);
        mbarrier_arrive_expect(v_ring.full(at.stage), v(0).kBytes);
        load_panels(v(at.stage), p.b_map, v_ring.full(at.stage), 64, j * 64);
        at.advance();
      }
    }
    return;
  }
  Scores s;
  float o[16][4] = {};
  uint32_t probabilities[1][4][4];
  auto& left = probabilities[0];
  const auto round = [&] {
    for (int step = 0; step < 4; ++step) pack_a<bf16_t>(left[step], s, step);
  };
  RingPosition<kStages> at_k, at_v;
  mbarrier_wait(q_full, 0);
  at_k.wait_full(k_ring);
  wgmma_fence(s);
  warpgroup_abt<bf16_t, 64>(s, q, 0, k(at_k.stage), 0, false);
  wgmma_commit();
  wgmma_wait<0>(s);
  if (thread_of_warpgroup() == 0) mbarrier_arrive(k_ring.empty(at_k.stage));
  at_k.advance();
  round();
  for (int j = 0; j < blocks; ++j) {
    const bool more = j + 1 < blocks;
    if (more) {
      at_k.wait_full(k_ring);
      wgmma_fence(s, o, left);
      warpgroup_abt<bf16_t, 64>(s, q, 0, k(at_k.stage), 0, false);
      wgmma_commit();
    }
    at_v.wait_full(v_ring);
    wgmma_fence(o, left);
    warpgroup_ab<bf16_t>(o, left, v(at_v.stage), 0, 0, true);
    wgmma_commit();
    if (more) {
      wgmma_wait<1>(s);
      if (thread_of_warpgroup() == 0) mbarrier_arrive(k_ring.empty(at_k.stage));
      at_k.advance();
      for (auto& row : s) {
        for (float& value : row) value += 0.0f;  // ordinary code between the two waits
      }
    }
    wgmma_wait<0>(o, left);
    if (thread_of_warpgroup() == 0) mbarrier_arrive(v_ring.empty(at_v.stage));
    at_v.advance();
    if (more) round();
  }
  put_accumulators(p.out, 0, o);
}

// out bfloat16 [64, 64] = G G^T, where G are the 64 rows of a [n, 64] that b, int32, names. Warpgroup 0 gathers them by
// copies of threads; the result leaves as in an epilogue, by way of the operand's shared memory.
__global__ void wgmma_gathered(const __grid_constant__ HopperParams p) {
  const PanelTile<64, 64> g{slot(0)};
  const SharedTile<64> rows = g.panel(0);
  const uint32_t full = slot(8192);
  start({{full, kWarpgroupSize}});
  if (warpgroup_id() == 0) {
    for (int i = thread(); i < 64 * 8; i += kWarpgroupSize) {
      const auto* from = static_cast<const bf16_t*>(p.a) + at<int32_t>(p.b, i / 8) * 64;
      cp_async_16(rows.chunk(i / 8, i % 8), from + i % 8 * 8);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    mbarrier_arrive(full);
    return;
  }
  mbarrier_wait(full, 0);
  float acc[8][4];
  wgmma_fence(acc);
  warpgroup_abt<bf16_t, 64>(acc, g, 0, g, 0, false);
  wgmma_commit();
  wgmma_wait<0>(acc);
  named_barrier_sync(1, kWarpgroupSize);
  const int lane = lane_id();
  for (int step = 0; step < 4; ++step) {
    uint32_t r[4];
    pack_a<bf16_t>(r, acc, step);
    stmatrix_x4(rows.chunk(warp_id() % 4 * 16 + lane % 16, 2 * step + lane / 16), r);
  }
  named_barrier_sync(1, kWarpgroupSize);
  for (int i = thread_of_warpgroup(); i < 64 * 8; i += kWarpgroupSize) {
    put(p.out, i, load_shared<uint4>(rows.chunk(i / 8, i % 8)));
  }
}

// out float32 [64, 64] = P V, P = a [64, 64] and V = b [64, 64], of which settings[0] rows count. The others are made
// zero by a warp that stands between TMA and the product, if settings[1].
__global__ void wgmma_tail(const __grid_constant__ HopperParams p) {
  const PanelTile<64, 64> left{slot(0)}, v{slot(8192)};
  const uint32_t tail = slot(16384), full = tail + kBarrierBytes, left_full = full + kBarrierBytes;
  const int length = p.settings[0];
  const bool zeroed = p.settings[1] != 0;
  start({{tail, 1}, {full, 1}, {left_full, 1}});
  if (warpgroup_id() == 0) {
    if (warp_id() == 0 && elect_one()) {
      mbarrier_arrive_expect(left_full, left.kBytes);
      load_panels(left, p.a_map, left_full, 0, 0);
      const uint32_t barrier = zeroed ? tail : full;
      mbarrier_arrive_expect(barrier, v.kBytes);
      load_panels(v, p.b_map, barrier, 0, 0);
    } else if (warp_id() == 1 && zeroed) {
      mbarrier_wait(tail, 0);
      for (int i = lane_id(); i < (64 - length) * 8; i += kWarpSize) {
        store_shared(v.base + static_cast<uint32_t>(length * 128 + i * 16), Vec<uint32_t, 4>{{0, 0, 0, 0}});
      }
      fence_proxy_async();
      warp_sync();
      if (lane_id() == 0) mbarrier_arrive(full);
    }
    return;
  }
  mbarrier_wait(left_full, 0);
  mbarrier_wait(full, 0);
  float acc[8][4];
  wgmma_fence(acc);
  for (int step = 0; step < 4; ++step) {
    wgmma<bf16_t, 64, Major::kDepth, Major::kOuter>(acc, left.rows_by_depth(0, 16 * step),
                                                    v.depth_by_columns(16 * step, 0), step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>(acc);
  put_accumulators(p.out, 0, acc);
}

// ---- the op ----

using Settings = std::vector<int64_t>;

struct Instruction {
  void (*run)(HopperParams& p);
  std::vector<int64_t> (*shape)(const Tensor& a, const Settings& settings);
  ScalarType dtype;
};

std::vector<int64_t> as_a(const Tensor& a, const Settings&) { return sizes_of(a); }
std::vector<int64_t> tiles_of_ring(const Tensor& a, const Settings&) {
  return {(a.numel() + kRingTile - 1) / kRingTile, kRingTile};
}
std::vector<int64_t> box_elements(const Tensor&, const Settings& s) { return {s.at(7) * s.at(8) * s.at(9)}; }
std::vector<int64_t> matrices(const Tensor&, const Settings&) { return {4, 8, 8}; }
std::vector<int64_t> calls(const Tensor&, const Settings& s) { return {s.at(0), kThreads}; }
template <int kWarpgroups>
std::vector<int64_t> all_turns(const Tensor&, const Settings& s) {
  return {s.at(0), kWarpgroups};
}
template <int kColumns, int kCount = 1>
std::vector<int64_t> products(const Tensor&, const Settings&) {
  if constexpr (kCount == 1) return {64, kColumns};
  return {kCount, 64, kColumns};
}

TensorMap encoded(const TensorBox& box) {
  TensorMap map;
  check(encode_tensor_map(map, box), "_hopper_instruction: no tensor map describes this box");
  return map;
}
TensorMap rows_map(const void* data, int64_t rows, int64_t cols, int box_rows) {
  return encoded({data, 2, {cols, rows, 1}, {cols, 0}, {64, box_rows, 1}, Swizzle::k128});
}
TensorMap line_map(const HopperParams& p, int box) {
  return encoded({p.a, 1, {p.n, 1, 1}, {0, 0}, {box, 1, 1}, Swizzle::kNone});
}

template <auto kKernel, int kOfThreads = kThreads, int kSharedBytes = 4096>
void run(HopperParams& p) {
  launch<kKernel>("hopper_instruction", dim3(1), kOfThreads, kSharedBytes, nullptr, p);
}
template <auto kKernel, int kBox>
void run_on_line(HopperParams& p) {
  p.a_map = line_map(p, kBox);
  run<kKernel>(p);
}
void run_tma(HopperParams& p) {
  const TensorBox box = box_of(p);
  check(box.box[0] * box.box[1] * box.box[2] * 2 <= kMostBoxBytes, "_hopper_instruction: the box is too large");
  p.a_map = encoded(box);
  run<tma_box, kThreads, kMostBoxBytes + kBarrierBytes>(p);
}
template <class T, int kN, bool kRegisters, Major kA, Major kB>
void run_product(HopperParams& p) {
  p.a_map = rows_map(p.a, 64, 64, 64);
  p.b_map = kB == Major::kOuter ? rows_map(p.b, 64, kN, 64) : rows_map(p.b, kN, 64, kN);
  run<wgmma_tile<T, kN, kRegisters, kA, kB>, kThreads, 8192 + round_up(kN, 64) * 128 + kBarrierBytes>(p);
}
void run_two_groups(HopperParams& p) {
  p.a_map = rows_map(p.a, 64, 64, 64);
  p.b_map = rows_map(p.b, 128, 64, 128);
  run<wgmma_two_groups, kThreads, 3 * 8192 + kBarrierBytes>(p);
}
void run_pipeline(HopperParams& p) {
  p.a_map = rows_map(p.a, 64, 64, 64);
  p.b_map = rows_map(p.b, p.settings[0] * 64, 192, 64);
  run<wgmma_pipeline, 2 * kThreads, 8192 + 2 * 24576 + 9 * kBarrierBytes>(p);
}
void run_tail(HopperParams& p) {
  p.a_map = rows_map(p.a, 64, 64, 64);
  p.b_map = rows_map(p.b, 64, 64, 64);
  run<wgmma_tail, 2 * kThreads, 2 * 8192 + 3 * kBarrierBytes>(p);
}

using Instructions = std::map<std::string, Instruction>;

// wgmma_TYPE_COLUMNS_LEFT_RIGHT
template <class T, int kN>
void add_products(Instructions& all, const std::string& type) {
  constexpr Major kDepth = Major::kDepth, kOuter = Major::kOuter;
  const std::string name = "wgmma_" + type + "_" + std::to_string(kN);
  const auto add = [&](const char* layout, void (*run)(HopperParams&)) {
    all[name + layout] = {run, products<kN>, ScalarType::Float};
  };
  add("_shared_depth", run_product<T, kN, false, kDepth, kDepth>);
  add("_shared_outer", run_product<T, kN, false, kDepth, kOuter>);
  add("_transposed_depth", run_product<T, kN, false, kOuter, kDepth>);
  add("_transposed_outer", run_product<T, kN, false, kOuter, kOuter>);
  add("_registers_depth", run_product<T, kN, true, kDepth, kDepth>);
  add("_registers_outer", run_product<T, kN, true, kDepth, kOuter>);
}
template <class T>
void add_products(Instructions& all, const std::string& type) {
  add_products<T, 64>(all, type);
  add_products<T, 96>(all, type);
  add_products<T, 128>(all, type);
  add_products<T, 176>(all, type);
  add_products<T, 192>(all, type);
  add_products<T, 256>(all, type);
}

const Instructions& instructions() {
  static const Instructions all = [] {
    Instructions made = {
        {"mbarrier_rounds", {run<mbarrier_rounds>, as_a, ScalarType::Float}},
        {"mbarrier_single_waits", {run<mbarrier_single_waits>, as_a, ScalarType::Float}},
        {"mbarrier_counts", {run_on_line<mbarrier_counts, 64>, as_a, ScalarType::Short}},
        {"ring_of_copies_2", {run_on_line<ring_of_copies<2>, kRingTile>, tiles_of_ring, ScalarType::Short}},
        {"ring_of_copies_3", {run_on_line<ring_of_copies<3>, kRingTile>, tiles_of_ring, ScalarType::Short}},
        {"ring_of_copies_4", {run_on_line<ring_of_copies<4>, kRingTile>, tiles_of_ring, ScalarType::Short}},
        {"ring_of_stores_2", {run<ring_of_stores<2>>, tiles_of_ring, ScalarType::Short}},
        {"ring_of_stores_3", {run<ring_of_stores<3>>, tiles_of_ring, ScalarType::Short}},
        {"tma", {run_tma, box_elements, ScalarType::Short}},
        {"stmatrix", {run<stmatrix<false>, 32>, matrices, ScalarType::Short}},
        {"stmatrix_trans", {run<stmatrix<true>, 32>, matrices, ScalarType::Short}},
        {"stmatrix_ldmatrix", {run<stmatrix_ldmatrix<false>, 32>, as_a, ScalarType::Short}},
        {"stmatrix_ldmatrix_trans", {run<stmatrix_ldmatrix<true>, 32>, as_a, ScalarType::Short}},
        {"elect", {run<elect>, calls, ScalarType::Int}},
        {"registers_384", {run<registers<24, 240>, 384>, as_a, ScalarType::Float}},
        {"registers_512", {run<registers<32, 160>, 512>, as_a, ScalarType::Float}},
        {"turns_2", {run<turns<2>, 256>, all_turns<2>, ScalarType::Int}},
        {"turns_3", {run<turns<3>, 384>, all_turns<3>, ScalarType::Int}},
        {"wgmma_two_groups", {run_two_groups, products<64, 2>, ScalarType::Float}},
        {"wgmma_pipeline", {run_pipeline, products<128>, ScalarType::Float}},
        {"wgmma_gathered", {run<wgmma_gathered, 256, 8192 + kBarrierBytes>, products<64>, ScalarType::BFloat16}},
        {"wgmma_tail", {run_tail, products<64>, ScalarType::Float}},
    };
    add_products<half_t>(made, "float16");
    add_products<bf16_t>(made, "bfloat16");
    return made;
  }();
  return all;
}

torch::stable::Tensor hopper_instruction(std::string name, torch::stable::Tensor a_, torch::stable::Tensor b_,
                                         std::vector<int64_t> settings) {
  constexpr const char* kOp = "_hopper_instruction";
  const Tensor a(a_), b(b_);
  const auto found = instructions().find(name);
  check(found != instructions().end(), kOp, ": none is called ", name);
  check(a.is_contiguous() && b.is_contiguous(), kOp, ": a and b must be contiguous");
  check(settings.size() <= kSettings, kOp, ": at most ", kSettings, " settings");
  Tensor out = empty(kOp, found->second.shape(a, settings), found->second.dtype, a);
  const Launch launch(kOp, a);
  HopperParams p{{}, {}, launch.in(a), launch.in(b), launch.out(out), a.numel(), {}};
  for (size_t i = 0; i < settings.size(); ++i) p.settings[i] = static_cast<int>(settings[i]);
  found->second.run(p);
  return out.as_torch();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(warpform_simt, m) {
  // Runs one emulated instruction of compute capability 9.0, or a small kernel around it, by name.
  m.def("_hopper_instruction(str name, Tensor a, Tensor b, int[] settings) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(warpform_simt, CompositeExplicitAutograd, m) {
  m.impl("_hopper_instruction", TORCH_BOX(&hopper_instruction));
}

}  // namespace warpform
