// The host's body of kernels/device/warpgroup.cuh, name for name.
#pragma once

#include "device/ptx.cuh"
#include "simt/warpgroup.h"

namespace warpform {

constexpr int kWarpgroupSize = 128;
constexpr int kMostSharedBytes = 227 * 1024, kMostRegisters = 64 * 1024;

inline int warpgroup_id() { return static_cast<int>(threadIdx.x) / kWarpgroupSize; }

template <int kRegisters>
inline void give_registers(const simt::Where& where = simt::Where::current()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  simt::give_registers(kRegisters, where);
}
template <int kRegisters>
inline void take_registers(const simt::Where& where = simt::Where::current()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  simt::take_registers(kRegisters, where);
}

inline bool elect_one(const simt::Where& where = simt::Where::current()) { return simt::elect(where); }

inline void stmatrix_x4(uint32_t row, const uint32_t (&r)[4], const simt::Where& where = simt::Where::current()) {
  simt::stmatrix(row, r, /*transposed=*/false, where);
}
inline void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4], const simt::Where& where = simt::Where::current()) {
  simt::stmatrix(row, r, /*transposed=*/true, where);
}

}  // namespace warpform
