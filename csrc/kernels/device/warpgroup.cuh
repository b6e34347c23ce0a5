// Four warps that work together (sm_90): who they are, the registers that they have, and stores of their fragments.
#pragma once

#include "device/ptx.cuh"

namespace warpform {

constexpr int kWarpgroupSize = 128;
constexpr int kMostSharedBytes = 227 * 1024, kMostRegisters = 64 * 1024;  // a block's, on compute capability 9.0

// The same for all lanes of a warp, and the compiler knows it.
__device__ __forceinline__ int warpgroup_id() { return __shfl_sync(kFullMask, threadIdx.x / kWarpgroupSize, 0); }

// Registers a thread from here on, a multiple of 8 in 24 to 256; all warps of a warpgroup call it. give_registers
// returns some to the block; take_registers waits until there are enough.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// True in one lane of the warp, always the same; all 32 lanes call it.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred leader;\n"
      "elect.sync _|leader, %1;\n"
      "selp.u32 %0, 1, 0, leader;\n"
      "}\n"
      : "=r"(elected)
      : "r"(kFullMask));
  return elected != 0;
}

// The inverse of ldmatrix_x4: four 8x8 tiles of 16-bit elements; lane l gives the address of row l % 8 of tile l / 8
// (16-byte aligned) and has of each tile row l / 4, columns 2 (l % 4) and +1. With _trans tiles are stored transposed.
__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace warpform
