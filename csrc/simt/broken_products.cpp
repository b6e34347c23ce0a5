// Kernels with one fault each against the rules of wgmma and warpgroups.
#include "simt/broken_hopper.h"

namespace warpform {
namespace {

using namespace broken;

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

}  // namespace

const broken::BrokenKernels& broken::broken_products() {
  static const BrokenKernels kernels = {
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
  return kernels;
}

}  // namespace warpform
