// Rows of any dtype seen as float32: the loads and stores of the elementwise and row-wise kernels.
#pragma once

#include <type_traits>

#include "device/memory.cuh"
#include "device/types.cuh"

namespace warpform {

// Elements of T in the widest access, 16 bytes.
template <class T>
constexpr int kWideVec = 16 / static_cast<int>(sizeof(T));

// kN neighbouring elements as they are, in one access.
template <int kN, class T>
__device__ __forceinline__ Vec<T, kN> load_vec(const T* p) {
  return load_global(reinterpret_cast<const Vec<T, kN>*>(p));
}

// kN neighbouring elements in accesses of up to 16 bytes; p is aligned to the width of one access.
template <int kN, class T>
__device__ __forceinline__ void load_floats(float (&v)[kN], const T* p) {
  constexpr int kPiece = kN < kWideVec<T> ? kN : kWideVec<T>;
#pragma unroll
  for (int i = 0; i < kN; i += kPiece) {
    const Vec<T, kPiece> piece = load_vec<kPiece>(p + i);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) v[i + j] = to_float(piece[j]);
  }
}

template <int kN, class T>
__device__ __forceinline__ void store_floats(T* p, const float (&v)[kN]) {
  constexpr int kPiece = kN < kWideVec<T> ? kN : kWideVec<T>;
#pragma unroll
  for (int i = 0; i < kN; i += kPiece) {
    if constexpr (sizeof(T) == 2 && kPiece % 2 == 0) {
      Vec<uint32_t, kPiece / 2> piece;  // one conversion instruction makes two elements
#pragma unroll
      for (int j = 0; j < kPiece; j += 2) piece[j / 2] = pack2<T>(v[i + j], v[i + j + 1]);
      store_global(reinterpret_cast<Vec<uint32_t, kPiece / 2>*>(p + i), piece);
    } else {
      Vec<T, kPiece> piece;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) piece[j] = from_float<T>(v[i + j]);
      store_global(reinterpret_cast<Vec<T, kPiece>*>(p + i), piece);
    }
  }
}

// kN elements from `col` on of a parameter [cols], which is float32 or of the activations' type T. A branch that every
// thread takes alike; a template argument would double the kernels.
template <class T, int kN>
__device__ __forceinline__ void load_parameter(float (&v)[kN], const void* p, bool is_float, int64_t col) {
  if constexpr (!std::is_same_v<T, float>) {
    if (!is_float) return load_floats(v, static_cast<const T*>(p) + col);
  }
  load_floats(v, static_cast<const float*>(p) + col);
}

// True if every pointer that is not null can be accessed 16 bytes at a time.
template <class... Pointers>
inline bool all_aligned(const Pointers*... p) {
  return ((reinterpret_cast<uintptr_t>(p) | ...) % 16) == 0;
}

}  // namespace warpform
