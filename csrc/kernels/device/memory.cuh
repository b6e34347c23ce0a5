// Every access to global and shared memory that is a plain load or store. Shared memory is dynamic only and addressed
// by 32-bit offsets, as ldmatrix and cp.async address it; shared_base() is where a block's arena begins (1024-byte
// aligned).
#pragma once

#include "device/types.cuh"

namespace warpform {

// Loads sizeof(V) in {1, 2, 4, 8, 16} bytes with one instruction; p must be aligned to sizeof(V).
template <class V>
__device__ __forceinline__ V load_global(const V* p) {
  using R = typename Raw<sizeof(V)>::type;
  const R r = *reinterpret_cast<const R*>(p);
  V v;
  __builtin_memcpy(&v, &r, sizeof(V));
  return v;
}

// Loads like load_global data that is read once, and may leave the caches first.
template <class V>
__device__ __forceinline__ V load_global_streaming(const V* p) {
  using R = typename Raw<sizeof(V)>::type;
  const R r = __ldcs(reinterpret_cast<const R*>(p));
  V v;
  __builtin_memcpy(&v, &r, sizeof(V));
  return v;
}

template <class V>
__device__ __forceinline__ void store_global(V* p, const V& v) {
  using R = typename Raw<sizeof(V)>::type;
  R r;
  __builtin_memcpy(&r, &v, sizeof(V));
  *reinterpret_cast<R*>(p) = r;
}

__device__ __forceinline__ uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char warpform_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(warpform_shared));
}

template <class V>
__device__ __forceinline__ V load_shared(uint32_t address) {
  V v;
  if constexpr (sizeof(V) == 16) {
    uint4 r;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(address)
                 : "memory");
    __builtin_memcpy(&v, &r, 16);
  } else if constexpr (sizeof(V) == 8) {
    uint2 r;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(address) : "memory");
    __builtin_memcpy(&v, &r, 8);
  } else if constexpr (sizeof(V) == 4) {
    uint32_t r;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
    __builtin_memcpy(&v, &r, 4);
  } else {
    static_assert(sizeof(V) == 2, "load_shared: 2, 4, 8 or 16 bytes");
    uint16_t r;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(r) : "r"(address) : "memory");
    __builtin_memcpy(&v, &r, 2);
  }
  return v;
}

template <class V>
__device__ __forceinline__ void store_shared(uint32_t address, const V& v) {
  if constexpr (sizeof(V) == 16) {
    uint4 r;
    __builtin_memcpy(&r, &v, 16);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r.x), "r"(r.y), "r"(r.z), "r"(r.w)
                 : "memory");
  } else if constexpr (sizeof(V) == 8) {
    uint2 r;
    __builtin_memcpy(&r, &v, 8);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(r.x), "r"(r.y) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    uint32_t r;
    __builtin_memcpy(&r, &v, 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(r) : "memory");
  } else {
    static_assert(sizeof(V) == 2, "store_shared: 2, 4, 8 or 16 bytes");
    uint16_t r;
    __builtin_memcpy(&r, &v, 2);
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(r) : "memory");
  }
}

// Adds v to *p and returns the previous value. Order between threads is not defined: sums are not repeatable bit for
// bit.
__device__ __forceinline__ float atomic_add_global(float* p, float v) { return atomicAdd(p, v); }
__device__ __forceinline__ int atomic_add_global(int* p, int v) { return atomicAdd(p, v); }

}  // namespace warpform
