// Kernels with one fault each against the rules of mbarriers, TMA, wgmma and warpgroups, and the op that runs them: the
// emulator's tests (tests/simt/test_broken_hopper.py) say how each must be reported, or which result is wrong.
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>
#include <vector>

#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/panel_tile.cuh"
#include "device/warpgroup.cuh"
#include "simt/host.h"
#include "torch/launch.h"

namespace warpform {
namespace {

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

int thread() { return static_cast<int>(threadIdx.x); }
int warp_of_group() { return warp_id() % 4; }
Tile tile(int i) { return {shared_base() + static_cast<uint32_t>(i * Tile::kBytes)}; }
uint32_t barrier(int i) { return shared_base() + static_cast<uint32_t>(kTiles * Tile::kBytes + i * kBarrierBytes); }
constexpr int kSharedBytes = kTiles * Tile::kBytes + kBarriers * kBarrierBytes;

// Thread 0 initialises all barriers for one arrival.
void start() {
  if (thread() == 0) {
    for (int i = 0; i < kBarriers; ++i) mbarrier_init(barrier(i), 1);
    fence_mbarrier_init();
  }
  block_sync();
}

// One thread has 64 rows brought.
void load(const HopperBrokenParams& p, int to, int on, int row) {
  mbarrier_arrive_expect(barrier(on), Tile::kBytes);
  load_panels(tile(to), p.rows, barrier(on), 0, row);
}

// A tile as TMA would bring it, by 128 threads.
void store_tile(const HopperBrokenParams& p, int to) {
  for (int i = thread() % kWarpgroupSize; i < kTileRows * 8; i += kWarpgroupSize) {
    store_shared(tile(to).panel(0).chunk(i / 8, i % 8), load_global(reinterpret_cast<const uint4*>(p.in) + i));
  }
}

void put(const HopperBrokenParams& p, const Accumulators& acc) {
  const int row = warp_of_group() * 16 + lane_id() / 4, col = lane_id() % 4 * 2;
  for (int n = 0; n < 8; ++n) {
    for (int e = 0; e < 4; ++e) store_global(p.out + (row + e / 2 * 8) * 64 + 8 * n + col + e % 2, acc[n][e]);
  }
}

void issue(Accumulators& acc, int a, int b) {
  wgmma_fence(acc);
  warpgroup_abt<bf16_t, 64>(acc, tile(a), 0, tile(b), 0, false);
  wgmma_commit();
}
void multiply(Accumulators& acc, int a, int b) {
  issue(acc, a, b);
  wgmma_wait<0>(acc);
}

// A left operand of ones.
void fill_left(uint32_t (&left)[4][4]) {
  for (auto& step : left) {
    for (uint32_t& r : step) r = pack2<bf16_t>(1, 1);
  }
}

// ---- rings of buffers ----

// The second tile is brought into the buffer that the product may still read.
__global__ void missing_empty_wait(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (warpgroup_id() == 0) {
    if (thread() == 0) {
      load(p, 0, 0, 0);
      mbarrier_wait(barrier(0), 0);
      // a wait for the consumer is missing here
      load(p, 0, 1, 64);
    }
    return;
  }
  Accumulators acc;
  for (int step = 0; step < 2; ++step) {
    mbarrier_wait(barrier(step), 0);
    multiply(acc, 0, 0);
  }
  put(p, acc);
}

// The same with threads that read the buffer.
__global__ void missing_empty_wait_of_threads(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (warpgroup_id() == 0) {
    if (thread() == 0) {
      load(p, 0, 0, 0);
      mbarrier_wait(barrier(0), 0);
      load(p, 0, 1, 64);
    }
    return;
  }
  mbarrier_wait(barrier(0), 0);
  const auto first = load_shared<uint4>(tile(0).panel(0).chunk(thread() % 64, 0));
  mbarrier_wait(barrier(1), 0);
  store_global(p.out + thread(), static_cast<float>(first.x));
}

// The buffer is given back when the product is issued, not when it has read.
__global__ void early_release(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (warpgroup_id() == 0) {
    if (thread() == 0) {
      load(p, 0, 0, 0);
      mbarrier_wait(barrier(2), 0);
      load(p, 0, 1, 64);
    }
    return;
  }
  Accumulators acc;
  for (int step = 0; step < 2; ++step) {
    mbarrier_wait(barrier(step), 0);
    issue(acc, 0, 0);
    if (thread() == kWarpgroupSize && step == 0) mbarrier_arrive(barrier(2));
    wgmma_wait<0>(acc);
  }
  put(p, acc);
}

__global__ void missing_full_wait(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) load(p, 0, 0, 0);
  block_sync();
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

// One warp waits for the copy, and the others do not wait for that warp.
__global__ void wait_of_another_warp(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) load(p, 0, 0, 0);
  if (warp_id() == 0) mbarrier_wait(barrier(0), 0);
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

// One buffer: in the second round the consumer waits for the parity of the first one.
__global__ void parity_not_flipped(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (warpgroup_id() == 0) {
    if (thread() == 0) {
      for (uint32_t step = 0; step < 2; ++step) {
        mbarrier_wait(barrier(1), step ^ 1);
        load(p, 0, 0, 0);
      }
    }
    return;
  }
  Accumulators acc;
  for (int step = 0; step < 2; ++step) {
    mbarrier_wait(barrier(0), 0);
    multiply(acc, 0, 0);
    if (thread() == kWarpgroupSize) mbarrier_arrive(barrier(1));
  }
  put(p, acc);
}

// Two boxes land, one is announced.
__global__ void announces_too_few_bytes(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), Tile::kBytes);
    load_panels(tile(0), p.rows, barrier(0), 0, 0);
    load_panels(tile(1), p.rows, barrier(0), 0, 64);
  }
  mbarrier_wait(barrier(0), 0);
  Accumulators acc;
  multiply(acc, 0, 1);
  put(p, acc);
}

__global__ void announces_too_many_bytes(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), 2 * Tile::kBytes);
    load_panels(tile(0), p.rows, barrier(0), 0, 0);
  }
  mbarrier_wait(barrier(0), 0);
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

// All four warps give back a buffer that one arrival frees.
__global__ void too_many_releases(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (warpgroup_id() == 0) {
    if (thread() == 0) {
      for (uint32_t step = 0; step < 3; ++step) {
        mbarrier_wait(barrier(1), step % 2 ^ 1);
        load(p, 0, 0, 0);
      }
    }
    return;
  }
  Accumulators acc;
  for (uint32_t step = 0; step < 3; ++step) {
    mbarrier_wait(barrier(0), step % 2);
    multiply(acc, 0, 0);
    if (lane_id() == 0) mbarrier_arrive(barrier(1));
  }
  put(p, acc);
}

// ---- mbarriers ----

// The phase lacks bytes alone when a thread arrives that it does not count.
__global__ void too_many_arrivals(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), Tile::kBytes);
    mbarrier_arrive(barrier(0));
    load_panels(tile(0), p.rows, barrier(0), 0, 0);
  }
  mbarrier_wait(barrier(0), 0);
}

__global__ void never_initialised(const __grid_constant__ HopperBrokenParams) { mbarrier_arrive(barrier(0)); }

__global__ void initialised_without_barrier(const __grid_constant__ HopperBrokenParams) {
  if (thread() == 0) {
    mbarrier_init(barrier(0), 4);
    fence_mbarrier_init();
  }
  // block_sync() is missing here
  if (lane_id() == 0) mbarrier_arrive(barrier(0));
  mbarrier_wait(barrier(0), 0);
}

__global__ void initialised_without_fence(const __grid_constant__ HopperBrokenParams p) {
  if (thread() == 0) mbarrier_init(barrier(0), 1);
  block_sync();
  if (thread() == 0) load(p, 0, 0, 0);
  mbarrier_wait(barrier(0), 0);
}

__global__ void fenced_after_the_barrier(const __grid_constant__ HopperBrokenParams p) {
  if (thread() == 0) mbarrier_init(barrier(0), 1);
  block_sync();
  if (thread() == 0) fence_mbarrier_init();
  if (thread() == 64) load(p, 0, 0, 0);
  mbarrier_wait(barrier(0), 0);
}

__global__ void initialised_twice(const __grid_constant__ HopperBrokenParams) {
  start();
  if (thread() == 70) mbarrier_init(barrier(2), 1);
}

__global__ void store_over_an_mbarrier(const __grid_constant__ HopperBrokenParams) {
  start();
  if (thread() == 77) store_shared(barrier(3) + 4, 1.0f);
}

__global__ void misaligned_mbarrier(const __grid_constant__ HopperBrokenParams) {
  if (thread() == 0) mbarrier_init(barrier(0) + 4, 1);
}

// Two phases end before the thread that waits for the first one is told.
__global__ void two_phases_ahead(const __grid_constant__ HopperBrokenParams) {
  start();
  if (thread() == 40) mbarrier_wait(barrier(0), 0);
  if (thread() == 41) mbarrier_arrive(barrier(1));  // in the plain order after thread 40 has begun to wait
  if (thread() == 0) {
    mbarrier_wait(barrier(1), 0);
    mbarrier_arrive(barrier(0));
    mbarrier_arrive(barrier(0));
  }
}

// ---- TMA ----

__global__ void misaligned_destination(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), Tile::kBytes);
    tma_load(tile(0).base + 64, p.rows, barrier(0), 0, 0);
  }
  mbarrier_wait(barrier(0), 0);
}

__global__ void box_outside_of_memory(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), Tile::kBytes);
    load_panels(tile(0), p.too_many, barrier(0), 0, kRows - 32);
  }
  mbarrier_wait(barrier(0), 0);
}

// One lane announces the bytes, and all lanes have them brought.
__global__ void every_lane_issues(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) mbarrier_arrive_expect(barrier(0), Tile::kBytes);
  if (warp_id() == 0) load_panels(tile(0), p.rows, barrier(0), 0, 0);
  mbarrier_wait(barrier(0), 0);
}

__global__ void coordinates_of_another_rank(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), Tile::kBytes);
    tma_load(tile(0).base, p.rows, barrier(0), 0, 0, 0);
  }
  mbarrier_wait(barrier(0), 0);
}

__global__ void unencoded_map(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), Tile::kBytes);
    load_panels(tile(0), p.empty, barrier(0), 0, 0);
  }
  mbarrier_wait(barrier(0), 0);
}

__global__ void never_waited_copy(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) load(p, 0, 0, 0);
}

// ---- proxies ----

__global__ void missing_proxy_fence(const __grid_constant__ HopperBrokenParams p) {
  store_tile(p, 0);
  // fence_proxy_async() is missing here
  block_sync();
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

__global__ void proxy_fence_before_the_store(const __grid_constant__ HopperBrokenParams p) {
  fence_proxy_async();
  store_tile(p, 0);
  block_sync();
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

__global__ void proxy_fence_of_another_thread(const __grid_constant__ HopperBrokenParams p) {
  store_tile(p, 0);
  block_sync();
  if (warp_id() == 0) fence_proxy_async();
  block_sync();
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

__global__ void proxy_fence_after_the_barrier(const __grid_constant__ HopperBrokenParams p) {
  store_tile(p, 0);
  block_sync();
  fence_proxy_async();
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

__global__ void missing_proxy_fence_after_stmatrix(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) load(p, 1, 0, 0);
  const uint32_t ones = pack2<bf16_t>(1, 1), r[4] = {ones, ones, ones, ones};
  const int lane = lane_id();
  for (int col = 0; col < 64; col += 16) {
    stmatrix_x4(tile(0).panel(0).chunk(warp_id() * 16 + lane % 16, col / 8 + lane / 16), r);
  }
  block_sync();
  mbarrier_wait(barrier(0), 0);
  Accumulators acc;
  multiply(acc, 0, 1);
  put(p, acc);
}

// The tail of a tile is zeroed after the copy has landed.
__global__ void missing_proxy_fence_after_zeroing(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) load(p, 0, 0, 0);
  mbarrier_wait(barrier(0), 0);
  if (warp_id() == 1) store_shared(tile(0).panel(0).chunk(60 + lane_id() / 8, lane_id() % 8), uint4{0, 0, 0, 0});
  block_sync();
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

// One lane tells of what all lanes of its warp have zeroed.
__global__ void missing_warp_sync_before_an_arrival(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) load(p, 0, 0, 0);
  mbarrier_wait(barrier(0), 0);
  if (warp_id() == 1) {
    store_shared(tile(0).panel(0).chunk(60 + lane_id() / 8, lane_id() % 8), uint4{0, 0, 0, 0});
    fence_proxy_async();
    // warp_sync() is missing here
    if (elect_one()) mbarrier_arrive(barrier(1));
  }
  mbarrier_wait(barrier(1), 0);
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

// A producer that gathers rows by copies of threads.
__global__ void missing_proxy_fence_after_cp_async(const __grid_constant__ HopperBrokenParams p) {
  for (int i = thread(); i < kTileRows * 8; i += kWarpgroupSize) {
    cp_async_16(tile(0).panel(0).chunk(i / 8, i % 8), p.in + i * 8);
  }
  cp_async_commit();
  cp_async_wait<0>();
  block_sync();
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

// What threads stored is overwritten by a copy that does not know of it.
__global__ void missing_proxy_fence_before_tma(const __grid_constant__ HopperBrokenParams p) {
  start();
  store_tile(p, 0);
  block_sync();
  if (thread() == 0) load(p, 0, 0, 0);
  mbarrier_wait(barrier(0), 0);
}

// ---- descriptions of operands ----

void load_and_wait(const HopperBrokenParams& p, int to) {
  start();
  if (thread() == 0) load(p, to, 0, 0);
  mbarrier_wait(barrier(0), 0);
}

void multiply_described(const HopperBrokenParams& p, uint64_t a, uint64_t b) {
  Accumulators acc;
  wgmma_fence(acc);
  wgmma<bf16_t, 64>(acc, a, b, false);
  wgmma_commit();
  wgmma_wait<0>(acc);
  put(p, acc);
}

// From eight rows to the next eight it is 1024 bytes.
__global__ void wrong_stride(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  multiply_described(p, tile(0).rows_by_depth(0, 0), wgmma_descriptor(tile(0).base, 16, 2048, Swizzle::k128));
}

// Only the first 16 columns are there, which another swizzle looks for elsewhere.
__global__ void wrong_swizzle(const __grid_constant__ HopperBrokenParams p) {
  start();
  if (thread() == 0) load(p, 1, 0, 0);
  if (thread() < kTileRows) {
    for (int c = 0; c < 2; ++c) {
      store_shared(tile(0).panel(0).chunk(thread(), c), load_global(reinterpret_cast<const uint4*>(p.in)));
    }
  }
  fence_proxy_async();
  block_sync();
  mbarrier_wait(barrier(0), 0);
  multiply_described(p, tile(1).rows_by_depth(0, 0), wgmma_descriptor(tile(0).base, 16, 1024, Swizzle::k64));
}

// The operand is past the end of shared memory.
__global__ void operand_out_of_bounds(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, kTiles - 1);
  const Tile last = tile(kTiles - 1);
  multiply_described(p, last.rows_by_depth(0, 0), wgmma_descriptor(last.base, 16, 16384, Swizzle::k128));
}

// The copy followed the bits of the address, and the product begins where the pattern does not.
__global__ void tile_inside_of_a_pattern(const __grid_constant__ HopperBrokenParams p) {
  start();
  const Tile shifted{tile(0).base + 512};
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(0), Tile::kBytes);
    load_panels(shifted, p.rows, barrier(0), 0, 0);
  }
  mbarrier_wait(barrier(0), 0);
  multiply_described(p, shifted.rows_by_depth(0, 0), shifted.rows_by_depth(0, 0));
}

__global__ void another_description_in_one_warp(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  multiply_described(p, tile(0).rows_by_depth(0, 0), tile(0).rows_by_depth(0, warp_id() == 2 ? 16 : 0));
}

__global__ void another_left_description_in_one_warp(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  multiply_described(p, tile(0).rows_by_depth(0, warp_id() == 2 ? 16 : 0), tile(0).rows_by_depth(0, 0));
}

__global__ void one_warp_accumulates(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc = {};
  wgmma_fence(acc);
  wgmma<bf16_t, 64>(acc, tile(0).rows_by_depth(0, 0), tile(0).rows_by_depth(0, 0), warp_id() == 2);
  wgmma_commit();
  wgmma_wait<0>(acc);
  put(p, acc);
}

// ---- products and their registers ----

__global__ void missing_wgmma_fence(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc = {};
  warpgroup_abt<bf16_t, 64>(acc, tile(0), 0, tile(0), 0, true);
  wgmma_commit();
  wgmma_wait<0>(acc);
  put(p, acc);
}

// The second product adds to what ordinary code wrote after the first.
__global__ void missing_second_wgmma_fence(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc = {};
  wgmma_fence(acc);
  for (int step = 0; step < 2; ++step) {
    warpgroup_abt<bf16_t, 64>(acc, tile(0), 0, tile(0), 0, true);
    wgmma_commit();
    wgmma_wait<0>(acc);
    for (auto& row : acc) row[0] *= 0.5f;
  }
  put(p, acc);
}

__global__ void left_operand_not_fenced(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc;
  uint32_t left[4][4];
  fill_left(left);
  wgmma_fence(acc);
  warpgroup_ab<bf16_t>(acc, left, tile(0), 0, 0, false);
  wgmma_commit();
  wgmma_wait<0>(acc, left);
  put(p, acc);
}

__global__ void written_after_the_fence(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc;
  uint32_t left[4][4];
  fill_left(left);
  wgmma_fence(acc, left);
  if (thread() == 77) left[1][2] = 0;
  warpgroup_ab<bf16_t>(acc, left, tile(0), 0, 0, false);
  wgmma_commit();
  wgmma_wait<0>(acc, left);
  put(p, acc);
}

// The next P is packed while the product of the last one reads it.
__global__ void left_operand_overwritten(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc;
  uint32_t left[4][4];
  fill_left(left);
  wgmma_fence(acc, left);
  warpgroup_ab<bf16_t>(acc, left, tile(0), 0, 0, false);
  wgmma_commit();
  if (thread() == 77) left[1][2] = pack2<bf16_t>(2, 2);
  wgmma_wait<0>(acc, left);
  put(p, acc);
}

__global__ void accumulators_written(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc;
  issue(acc, 0, 0);
  if (thread() == 77) acc[3][1] = 0;
  wgmma_wait<0>(acc);
  put(p, acc);
}

// No report, but a result of NaN.
__global__ void accumulators_read(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc;
  issue(acc, 0, 0);
  put(p, acc);
  wgmma_wait<0>(acc);
}

// Two groups of one product each are in flight; the wait leaves the one whose result is used.
__global__ void wait_for_too_few_groups(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators first, second;
  wgmma_fence(first, second);
  wgmma<bf16_t, 64>(first, tile(0).rows_by_depth(0, 0), tile(0).rows_by_depth(0, 0), false);
  wgmma_commit();
  wgmma<bf16_t, 64>(second, tile(0).rows_by_depth(0, 0), tile(0).rows_by_depth(0, 0), false);
  wgmma_commit();
  wgmma_wait<1>(first, second);
  put(p, second);
  wgmma_wait<0>(second);
}

// The product is in no group when the wait for all groups ends.
__global__ void missing_wgmma_commit(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc;
  wgmma_fence(acc);
  warpgroup_abt<bf16_t, 64>(acc, tile(0), 0, tile(0), 0, false);
  wgmma_wait<0>(acc);
  put(p, acc);
}

__global__ void wait_that_names_others(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators first, second;
  issue(first, 0, 0);
  issue(second, 0, 0);
  wgmma_wait<0>(second);
  put(p, first);
}

__global__ void never_waited_product(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc;
  issue(acc, 0, 0);
}

// The operand is overwritten by threads while the product reads it.
__global__ void store_under_a_product(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc;
  issue(acc, 0, 0);
  if (thread() == 77) store_shared(tile(0).base, 1.0f);
  wgmma_wait<0>(acc);
  put(p, acc);
}

__global__ void three_warps_multiply(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  if (warp_id() == 3) return;
  Accumulators acc;
  multiply(acc, 0, 0);
  put(p, acc);
}

__global__ void half_a_warp_multiplies(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc;
  wgmma_fence(acc);
  if (lane_id() < 16) warpgroup_abt<bf16_t, 64>(acc, tile(0), 0, tile(0), 0, false);
  wgmma_commit();
  wgmma_wait<0>(acc);
  put(p, acc);
}

__global__ void warps_multiply_in_two_places(const __grid_constant__ HopperBrokenParams p) {
  load_and_wait(p, 0);
  Accumulators acc;
  if (warp_id() < 2) {
    multiply(acc, 0, 0);
  } else {
    wgmma_fence(acc);
    wgmma<bf16_t, 64>(acc, tile(0).rows_by_depth(0, 0), tile(0).rows_by_depth(0, 0), false);
    wgmma_commit();
    wgmma_wait<0>(acc);
  }
  put(p, acc);
}

// ---- warpgroups ----

// The turn of the first warpgroup is never given.
__global__ void missing_first_turn(const __grid_constant__ HopperBrokenParams p) {
  constexpr int kPair = 2 * kWarpgroupSize;
  const int group = warpgroup_id();
  for (int round = 0; round < 2; ++round) {
    named_barrier_sync(1 + group, kPair);
    store_global(p.out + thread(), 0.0f);
    named_barrier_arrive(2 - group, kPair);
  }
}

__global__ void registers_of_three_consumers(const __grid_constant__ HopperBrokenParams) {
  if (warpgroup_id() == 0) {
    give_registers<24>();
  } else {
    take_registers<240>();
  }
}

// One of the consumers is forgotten, and the producer gives too few for the others.
__global__ void registers_of_a_pool_too_small(const __grid_constant__ HopperBrokenParams) {
  if (warpgroup_id() == 0) {
    give_registers<32>();
  } else {
    take_registers<240>();
  }
}

__global__ void three_warps_take_registers(const __grid_constant__ HopperBrokenParams) {
  if (warpgroup_id() == 0) {
    give_registers<24>();
  } else if (warp_of_group() != 1) {
    take_registers<240>();
  }
}

__global__ void takes_fewer_registers(const __grid_constant__ HopperBrokenParams) {
  if (warpgroup_id() == 0) {
    give_registers<24>();
  } else {
    take_registers<160>();
  }
}

// ---- the op ----

using Run = void (*)(const HopperBrokenParams& p);
template <auto kKernel, int kThreads>
void run(const HopperBrokenParams& p) {
  launch<kKernel>("broken", dim3(2), kThreads, kSharedBytes, nullptr, p);
}

#define WARPFORM_BROKEN(kernel, threads) {#kernel, run<kernel, threads>}
const std::map<std::string, Run> kKernels = {
    WARPFORM_BROKEN(missing_empty_wait, 256),
    WARPFORM_BROKEN(missing_empty_wait_of_threads, 256),
    WARPFORM_BROKEN(early_release, 256),
    WARPFORM_BROKEN(missing_full_wait, 128),
    WARPFORM_BROKEN(wait_of_another_warp, 128),
    WARPFORM_BROKEN(parity_not_flipped, 256),
    WARPFORM_BROKEN(announces_too_few_bytes, 128),
    WARPFORM_BROKEN(announces_too_many_bytes, 128),
    WARPFORM_BROKEN(too_many_releases, 256),
    WARPFORM_BROKEN(too_many_arrivals, 128),
    WARPFORM_BROKEN(never_initialised, 128),
    WARPFORM_BROKEN(initialised_without_barrier, 128),
    WARPFORM_BROKEN(initialised_without_fence, 128),
    WARPFORM_BROKEN(fenced_after_the_barrier, 128),
    WARPFORM_BROKEN(initialised_twice, 128),
    WARPFORM_BROKEN(store_over_an_mbarrier, 128),
    WARPFORM_BROKEN(misaligned_mbarrier, 128),
    WARPFORM_BROKEN(two_phases_ahead, 128),
    WARPFORM_BROKEN(misaligned_destination, 128),
    WARPFORM_BROKEN(box_outside_of_memory, 128),
    WARPFORM_BROKEN(every_lane_issues, 128),
    WARPFORM_BROKEN(coordinates_of_another_rank, 128),
    WARPFORM_BROKEN(unencoded_map, 128),
    WARPFORM_BROKEN(never_waited_copy, 128),
    WARPFORM_BROKEN(missing_proxy_fence, 128),
    WARPFORM_BROKEN(proxy_fence_before_the_store, 128),
    WARPFORM_BROKEN(proxy_fence_of_another_thread, 128),
    WARPFORM_BROKEN(proxy_fence_after_the_barrier, 128),
    WARPFORM_BROKEN(missing_proxy_fence_after_stmatrix, 128),
    WARPFORM_BROKEN(missing_proxy_fence_after_zeroing, 128),
    WARPFORM_BROKEN(missing_warp_sync_before_an_arrival, 128),
    WARPFORM_BROKEN(missing_proxy_fence_after_cp_async, 128),
    WARPFORM_BROKEN(missing_proxy_fence_before_tma, 128),
    WARPFORM_BROKEN(wrong_stride, 128),
    WARPFORM_BROKEN(wrong_swizzle, 128),
    WARPFORM_BROKEN(operand_out_of_bounds, 128),
    WARPFORM_BROKEN(tile_inside_of_a_pattern, 128),
    WARPFORM_BROKEN(another_description_in_one_warp, 128),
    WARPFORM_BROKEN(another_left_description_in_one_warp, 128),
    WARPFORM_BROKEN(one_warp_accumulates, 128),
    WARPFORM_BROKEN(missing_wgmma_fence, 128),
    WARPFORM_BROKEN(missing_second_wgmma_fence, 128),
    WARPFORM_BROKEN(left_operand_not_fenced, 128),
    WARPFORM_BROKEN(written_after_the_fence, 128),
    WARPFORM_BROKEN(left_operand_overwritten, 128),
    WARPFORM_BROKEN(accumulators_written, 128),
    WARPFORM_BROKEN(accumulators_read, 128),
    WARPFORM_BROKEN(wait_for_too_few_groups, 128),
    WARPFORM_BROKEN(missing_wgmma_commit, 128),
    WARPFORM_BROKEN(wait_that_names_others, 128),
    WARPFORM_BROKEN(never_waited_product, 128),
    WARPFORM_BROKEN(store_under_a_product, 128),
    WARPFORM_BROKEN(three_warps_multiply, 128),
    WARPFORM_BROKEN(half_a_warp_multiplies, 128),
    WARPFORM_BROKEN(warps_multiply_in_two_places, 128),
    WARPFORM_BROKEN(missing_first_turn, 256),
    WARPFORM_BROKEN(registers_of_three_consumers, 512),
    WARPFORM_BROKEN(registers_of_a_pool_too_small, 384),
    WARPFORM_BROKEN(three_warps_take_registers, 384),
    WARPFORM_BROKEN(takes_fewer_registers, 384),
};
#undef WARPFORM_BROKEN

TensorMap map_of(const bf16_t* data, int rows) {
  TensorMap map;
  const TensorBox box{data, 2, {kCols, rows, 1}, {kCols, 0}, {kCols, kTileRows, 1}, Swizzle::k128};
  check(encode_tensor_map(map, box), "_broken_hopper: no tensor map describes the input");
  return map;
}

void broken_hopper(std::string name, torch::stable::Tensor in_, torch::stable::Tensor out_) {
  constexpr const char* kOp = "_broken_hopper";
  const auto kernel = kKernels.find(name);
  check(kernel != kKernels.end(), kOp, ": no kernel is called ", name);
  const Tensor in(in_), out(out_);
  check(in.numel() == kRows * kCols && in.scalar_type() == ScalarType::BFloat16 && in.is_contiguous() &&
            out.numel() == 64 * 64 && out.scalar_type() == ScalarType::Float && out.is_contiguous(),
        kOp, ": in must be bfloat16 [256, 64] and out float32 [64, 64], got ", Got{in}, " and ", Got{out});
  const Launch launch(kOp, in);
  const auto* data = launch.in<bf16_t>(in);
  kernel->second({map_of(data, kRows), map_of(data, kRows + 44), {}, data, launch.out<float>(out)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(warpform_simt, m) {
  // Runs a faulty kernel by name; raises the emulator's report, if the fault is one that it reports.
  m.def("_broken_hopper(str name, Tensor a, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(warpform_simt, CompositeExplicitAutograd, m) {
  m.impl("_broken_hopper", TORCH_BOX(&broken_hopper));
}

}  // namespace warpform
