// The host's body of kernels/device/memory.cuh: every access is checked.
#pragma once

#include "device/types.cuh"
#include "simt/builtins.h"
#include "simt/global_memory.h"
#include "simt/shared_memory.h"

namespace warpform {

template <class V>
inline V load_global(const V* p, const simt::Where& where = simt::Where::current()) {
  static_assert(sizeof(typename Raw<sizeof(V)>::type) == sizeof(V));
  simt::check_global(p, sizeof(V), sizeof(V), simt::Access::kRead, where);
  return *p;
}

template <class V>
inline V load_global_streaming(const V* p, const simt::Where& where = simt::Where::current()) {
  return load_global(p, where);
}

template <class V>
inline void store_global(V* p, const V& v, const simt::Where& where = simt::Where::current()) {
  static_assert(sizeof(typename Raw<sizeof(V)>::type) == sizeof(V));
  simt::check_global(p, sizeof(V), sizeof(V), simt::Access::kWrite, where);
  *p = v;
}

inline uint32_t shared_base() { return simt::kSharedBase; }

template <class V>
inline V load_shared(uint32_t address, const simt::Where& where = simt::Where::current()) {
  static_assert(sizeof(V) != 1, "load_shared: 2, 4, 8 or 16 bytes");
  V v;
  simt::load_shared_bytes<sizeof(V)>(address, &v, where);
  return v;
}

template <class V>
inline void store_shared(uint32_t address, const V& v, const simt::Where& where = simt::Where::current()) {
  static_assert(sizeof(V) != 1, "store_shared: 2, 4, 8 or 16 bytes");
  simt::store_shared_bytes<sizeof(V)>(address, &v, where);
}

inline float atomic_add_global(float* p, float v, const simt::Where& where = simt::Where::current()) {
  simt::check_global(p, sizeof(float), sizeof(float), simt::Access::kAtomic, where);
  const float old = *p;
  *p = old + v;
  return old;
}
inline int atomic_add_global(int* p, int v, const simt::Where& where = simt::Where::current()) {
  simt::check_global(p, sizeof(int), sizeof(int), simt::Access::kAtomic, where);
  const int old = *p;
  *p = static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(v));
  return old;
}

}  // namespace warpform
