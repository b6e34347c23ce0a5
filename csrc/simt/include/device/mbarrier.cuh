// The host's body of kernels/device/mbarrier.cuh, name for name.
#pragma once

#include "simt/mbarrier.h"

namespace warpform {

constexpr int kBarrierBytes = 8;

inline void mbarrier_init(uint32_t barrier, int arrivals, const simt::Where& where = simt::Where::current()) {
  simt::init_mbarrier(barrier, arrivals, where);
}
inline void fence_mbarrier_init() { simt::fence_mbarrier_inits(); }
inline void mbarrier_arrive(uint32_t barrier, const simt::Where& where = simt::Where::current()) {
  simt::arrive_at_mbarrier(barrier, 0, where);
}
inline void mbarrier_arrive_expect(uint32_t barrier, int bytes, const simt::Where& where = simt::Where::current()) {
  simt::arrive_at_mbarrier(barrier, bytes, where);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, const simt::Where& where = simt::Where::current()) {
  simt::wait_for_mbarrier(barrier, parity, where);
}

}  // namespace warpform
