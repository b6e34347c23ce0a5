// The host's body of kernels/device/bulk.cuh, name for name.
#pragma once

#include "device/tensor_map.cuh"
#include "simt/bulk.h"

namespace warpform {

inline void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x,
                     const simt::Where& where = simt::Where::current()) {
  simt::begin_bulk_copy(to, map, barrier, {x, 0, 0}, 1, where);
}
inline void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y,
                     const simt::Where& where = simt::Where::current()) {
  simt::begin_bulk_copy(to, map, barrier, {x, y, 0}, 2, where);
}
inline void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y, int z,
                     const simt::Where& where = simt::Where::current()) {
  simt::begin_bulk_copy(to, map, barrier, {x, y, z}, 3, where);
}

inline void prefetch_tensor_map(const TensorMap& map, const simt::Where& where = simt::Where::current()) {
  simt::check_tensor_map(map, where);
}

inline void fence_proxy_async() { simt::fence_proxy(); }

}  // namespace warpform
