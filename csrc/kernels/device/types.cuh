// Element types of the kernels and their conversions. The same text serves the GPU and the emulator: cuda_fp16.h and
// cuda_bf16.h compute correctly under a plain host compiler.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifndef __CUDACC__
#include <algorithm>
#endif

namespace warpform {

#ifndef __CUDACC__
using std::max;  // device code has them without a namespace
using std::min;
#endif

using half_t = __half;
using bf16_t = __nv_bfloat16;

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(half_t x) { return __half2float(x); }
__host__ __device__ inline float to_float(bf16_t x) { return __bfloat162float(x); }

// Round to nearest even into T.
template <class T>
__host__ __device__ inline T from_float(float x);
template <>
__host__ __device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__host__ __device__ inline half_t from_float<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
__host__ __device__ inline bf16_t from_float<bf16_t>(float x) {
  return __float2bfloat16_rn(x);
}

// Two 16-bit values in one register, `lo` in the low half: the unit in which tensor-core operands are held.
template <class T>
__host__ __device__ inline uint32_t pack2(float lo, float hi);
template <>
__host__ __device__ inline uint32_t pack2<half_t>(float lo, float hi) {
  const __half2 v = __floats2half2_rn(lo, hi);
  uint32_t r;
  __builtin_memcpy(&r, &v, 4);
  return r;
}
template <>
__host__ __device__ inline uint32_t pack2<bf16_t>(float lo, float hi) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  uint32_t r;
  __builtin_memcpy(&r, &v, 4);
  return r;
}

// kN values of T that one instruction moves.
template <class T, int kN>
struct alignas(sizeof(T) * kN) Vec {
  T v[kN];
  __host__ __device__ T& operator[](int i) { return v[i]; }
  __host__ __device__ const T& operator[](int i) const { return v[i]; }
};

// sizeof(V) bytes in the register type of a load or store of that width.
template <int kBytes>
struct Raw;
template <>
struct Raw<1> {
  using type = uint8_t;
};
template <>
struct Raw<2> {
  using type = uint16_t;
};
template <>
struct Raw<4> {
  using type = uint32_t;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace warpform
