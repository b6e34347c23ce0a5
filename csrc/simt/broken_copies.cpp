// Kernels with one fault each against the rules of mbarriers, TMA and proxies.
#include "simt/broken_hopper.h"

namespace warpform {
namespace {

using namespace broken;

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

}  // namespace

const broken::BrokenKernels& broken::broken_copies() {
  static const BrokenKernels kernels = {
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
  };
  return kernels;
}

}  // namespace warpform
