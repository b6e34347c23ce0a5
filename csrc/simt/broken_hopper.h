// What the broken kernels for compute capability 9.0 share: their input, tiles and barriers in shared memory, and the
// table of a file.
#pragma once

#include <map>
#include <string>

#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/panel_tile.cuh"
#include "device/warpgroup.cuh"

namespace warpform::broken {

constexpr int kRows = 256, kCols = 64;  // of the input
constexpr int kTileRows = 64;
constexpr int kTiles = 4, kBarriers = 8;  // in shared memory

struct HopperBrokenParams {
  TensorMap rows;      // boxes of 64 rows of `in`
  TensorMap too_many;  // the same of a matrix that has 44 rows more
  TensorMap empty;     // never encoded
  const bf16_t* in;    // [kRows, kCols], ones
  float* out;          // [64, 64]
};

using Tile = PanelTile<kTileRows, kCols>;
using Accumulators = float[8][4];

inline int thread() { return static_cast<int>(threadIdx.x); }
inline int warp_of_group() { return warp_id() % 4; }
inline Tile tile(int i) { return {shared_base() + static_cast<uint32_t>(i * Tile::kBytes)}; }
inline uint32_t barrier(int i) {
  return shared_base() + static_cast<uint32_t>(kTiles * Tile::kBytes + i * kBarrierBytes);
}
constexpr int kSharedBytes = kTiles * Tile::kBytes + kBarriers * kBarrierBytes;

// Thread 0 initialises all barriers for one arrival.
inline void start() {
  if (thread() == 0) {
    for (int i = 0; i < kBarriers; ++i) mbarrier_init(barrier(i), 1);
    fence_mbarrier_init();
  }
  block_sync();
}

// One thread has 64 rows brought.
inline void load(const HopperBrokenParams& p, int to, int on, int row) {
  mbarrier_arrive_expect(barrier(on), Tile::kBytes);
  load_panels(tile(to), p.rows, barrier(on), 0, row);
}

// A tile as TMA would bring it, by 128 threads.
inline void store_tile(const HopperBrokenParams& p, int to) {
  for (int i = thread() % kWarpgroupSize; i < kTileRows * 8; i += kWarpgroupSize) {
    store_shared(tile(to).panel(0).chunk(i / 8, i % 8), load_global(reinterpret_cast<const uint4*>(p.in) + i));
  }
}

inline void put(const HopperBrokenParams& p, const Accumulators& acc) {
  const int row = warp_of_group() * 16 + lane_id() / 4, col = lane_id() % 4 * 2;
  for (int n = 0; n < 8; ++n) {
    for (int e = 0; e < 4; ++e) store_global(p.out + (row + e / 2 * 8) * 64 + 8 * n + col + e % 2, acc[n][e]);
  }
}

inline void issue(Accumulators& acc, int a, int b) {
  wgmma_fence(acc);
  warpgroup_abt<bf16_t, 64>(acc, tile(a), 0, tile(b), 0, false);
  wgmma_commit();
}
inline void multiply(Accumulators& acc, int a, int b) {
  issue(acc, a, b);
  wgmma_wait<0>(acc);
}

// A left operand of ones.
inline void fill_left(uint32_t (&left)[4][4]) {
  for (auto& step : left) {
    for (uint32_t& r : step) r = pack2<bf16_t>(1, 1);
  }
}

// ---- kernels by name ----

using BrokenKernels = std::map<std::string, void (*)(const HopperBrokenParams& p)>;

template <auto kKernel, int kThreads>
void run(const HopperBrokenParams& p) {
  launch<kKernel>("broken", dim3(2), kThreads, kSharedBytes, nullptr, p);
}
#define WARPFORM_BROKEN(kernel, threads) {#kernel, run<kernel, threads>}

const BrokenKernels& broken_copies();
const BrokenKernels& broken_products();

}  // namespace warpform::broken
