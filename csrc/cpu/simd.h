// Vectors of float32 by the vector extensions of GCC and Clang; their width follows from the instruction set of the
// translation unit. float16 and bfloat16 are widened where they are loaded and rounded once where they are stored.
//
// Everything here has internal linkage, in a namespace of its instruction set: a function that the linker could merge
// with that of another instruction set would run AVX-512 on a CPU without it. tools/gates.py looks at every object.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef WARPFORM_CPU_ISA
#error "csrc/cpu is compiled once for each instruction set, with -DWARPFORM_CPU_ISA=v3, v4 or neon"
#endif

#define WARPFORM_INLINE inline __attribute__((always_inline))
// GCC has __builtin_shufflevector from version 12 on, and Clang has no __builtin_shuffle.
#if defined(__clang__) || __GNUC__ >= 12
#define WARPFORM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define WARPFORM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

namespace warpform::cpu::WARPFORM_CPU_ISA {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
constexpr const char* kIsaName = "x86-64-v4";
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
constexpr const char* kIsaName = "x86-64-v3";
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
constexpr const char* kIsaName = "aarch64";
#else
#error "no instruction set with kernels"
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using IntVec = int32_t __attribute__((vector_size(4 * kLanes)));
using UintVec = uint32_t __attribute__((vector_size(4 * kLanes)));
using ShortVec = uint16_t __attribute__((vector_size(2 * kLanes)));
// Vectors in memory, which begin at any address that an element may have.
using LooseVec = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
using LooseIntVec = int32_t __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
using LooseShortVec = uint16_t __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

// ---- registers ----

// x + 0 would cost an addition, since it turns -0 into 0; x - 0 is x.
WARPFORM_INLINE Vec broadcast(float x) { return x - Vec{}; }
WARPFORM_INLINE IntVec as_int(Vec x) { return (IntVec)x; }
WARPFORM_INLINE Vec as_float(IntVec x) { return (Vec)x; }
WARPFORM_INLINE Vec abs(Vec x) { return as_float(as_int(x) & 0x7fffffff); }

// Where a or b is NaN, b. A maximum that must keep NaN has the constant first.
WARPFORM_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
WARPFORM_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// The number of each lane.
WARPFORM_INLINE IntVec lane_numbers() {
  IntVec v{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}
// All ones in the lanes before n.
WARPFORM_INLINE IntVec first_lanes(int64_t n) {
  const auto bound = static_cast<int32_t>(n < kLanes ? n : kLanes);
  return lane_numbers() < bound;
}

// ---- memory ----

WARPFORM_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
WARPFORM_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

WARPFORM_INLINE Vec widened(ShortVec bits, BFloat16) { return (Vec)(__builtin_convertvector(bits, UintVec) << 16); }
WARPFORM_INLINE Vec widened(ShortVec bits, Float16) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps((__m128i)bits);
#else
  using Halves = __fp16 __attribute__((vector_size(2 * kLanes)));
  return __builtin_convertvector((Halves)bits, Vec);
#endif
}
// To the nearest, ties to even; NaN becomes the NaN whose bits are all set.
WARPFORM_INLINE ShortVec narrowed(Vec v, BFloat16) {
  const UintVec bits = (UintVec)v;
  const UintVec kept = ((bits + (0x7fff + ((bits >> 16) & 1))) | (UintVec)(v != v)) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Compilers make five shuffles of the conversion.
  const __m256i packed = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);
  return (ShortVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(kept, ShortVec);
#endif
}
WARPFORM_INLINE ShortVec narrowed(Vec v, Float16) {
#if defined(__AVX512F__)
  return (ShortVec)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0);
#elif defined(__AVX2__)
  return (ShortVec)_mm256_cvtps_ph((__m256)v, 0);
#else
  using Halves = __fp16 __attribute__((vector_size(2 * kLanes)));
  return (ShortVec) __builtin_convertvector(v, Halves);
#endif
}
template <class T>
WARPFORM_INLINE Vec load(const T* p) {
  return widened(*reinterpret_cast<const LooseShortVec*>(p), T{});
}
template <class T>
WARPFORM_INLINE void store(T* p, Vec v) {
  *reinterpret_cast<LooseShortVec*>(p) = narrowed(v, T{});
}

// The first n elements, 0 <= n; `fill` in the lanes past them. Reads no element past the n-th.
template <class T>
WARPFORM_INLINE Vec load_first(const T* p, int64_t n, float fill = 0.f) {
  if (n >= kLanes) return load(p);
  Vec found;
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) return (Vec)_mm512_mask_loadu_ps((__m512)broadcast(fill), mask, p);
  if constexpr (sizeof(T) == 2) found = widened((ShortVec)_mm256_maskz_loadu_epi16(mask, p), T{});
#else
  T some[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  found = load(some);
#endif
  return fill == 0.f ? found : first_lanes(n) ? found : broadcast(fill);
}
template <class T>
WARPFORM_INLINE void store_first(T* p, Vec v, int64_t n) {
  if (n >= kLanes) {
    store(p, v);
    return;
  }
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, mask, (__m512)v);
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, mask, (__m256i)narrowed(v, T{}));
#else
  T some[kLanes];
  store(some, v);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
#endif
}

template <class T>
WARPFORM_INLINE float to_float(T x) {
  T some[kLanes] = {x};
  return load(some)[0];
}
template <>
WARPFORM_INLINE float to_float(float x) {
  return x;
}
template <class T>
WARPFORM_INLINE T from_float(float x) {
  T some[kLanes];
  store(some, broadcast(x));
  return some[0];
}
template <>
WARPFORM_INLINE float from_float(float x) {
  return x;
}

// ---- across lanes ----

#if defined(__AVX512F__)
#define WARPFORM_HALVES(fold)                                                                \
  a = fold(a, WARPFORM_SHUFFLE(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
  a = fold(a, WARPFORM_SHUFFLE(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
  a = fold(a, WARPFORM_SHUFFLE(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
  a = fold(a, WARPFORM_SHUFFLE(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif defined(__AVX2__)
#define WARPFORM_HALVES(fold)                                  \
  a = fold(a, WARPFORM_SHUFFLE(a, a, 4, 5, 6, 7, 0, 1, 2, 3)); \
  a = fold(a, WARPFORM_SHUFFLE(a, a, 2, 3, 0, 1, 6, 7, 4, 5)); \
  a = fold(a, WARPFORM_SHUFFLE(a, a, 1, 0, 3, 2, 5, 4, 7, 6));
#else
#define WARPFORM_HALVES(fold)                      \
  a = fold(a, WARPFORM_SHUFFLE(a, a, 2, 3, 0, 1)); \
  a = fold(a, WARPFORM_SHUFFLE(a, a, 1, 0, 3, 2));
#endif
WARPFORM_INLINE Vec add(Vec a, Vec b) { return a + b; }
WARPFORM_INLINE float largest_lane(Vec a) {
  WARPFORM_HALVES(max)
  return a[0];
}
WARPFORM_INLINE float sum_of_lanes(Vec a) {
  WARPFORM_HALVES(add)
  return a[0];
}
#undef WARPFORM_HALVES

WARPFORM_INLINE Vec zip_low(Vec a, Vec b) {
#if defined(__AVX512F__)
  return WARPFORM_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return WARPFORM_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return WARPFORM_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
WARPFORM_INLINE Vec zip_high(Vec a, Vec b) {
#if defined(__AVX512F__)
  return WARPFORM_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return WARPFORM_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return WARPFORM_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// kLanes rows of kLanes elements become their columns.
WARPFORM_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 8
  for (int step = 1; step < kLanes; step *= 2) {
    Vec mixed[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = zip_low(rows[i], rows[i + kLanes / 2]);
      mixed[2 * i + 1] = zip_high(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

// ---- functions ----

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x for x in [-126, 127] as power * (1 + fraction), and for x below as for -126; NaN for NaN. x is split into a whole
// number, by adding a number whose last bit is worth 1, and a rest within 0.5, whose power is a polynomial of degree 6
// (2.6e-9 off).
struct PowerOf2 {
  Vec power, fraction;
};
WARPFORM_INLINE PowerOf2 power_of_2(Vec x) {
  const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23
  const Vec clamped = max(broadcast(-126.f), x);
  const Vec shifted = clamped + magic;
  const Vec rest = clamped - (shifted - magic);
  Vec p = broadcast(1.535336188e-4f);
  p = p * rest + 1.339887440e-3f;
  p = p * rest + 9.618437357e-3f;
  p = p * rest + 5.550332548e-2f;
  p = p * rest + 2.402264791e-1f;
  p = p * rest + kLn2;
  return {(Vec)(((UintVec)shifted << 23) + 0x3f800000u), p * rest};
}

// 2^x for x <= 127: 0 below -126, 1 at 0, NaN for NaN; within 0.94 ulp.
WARPFORM_INLINE Vec exp2(Vec x) {
  const PowerOf2 found = power_of_2(x);
  // A product, unlike a sum of exponents, keeps every NaN.
  return x < -126.f ? Vec{} : (found.fraction + 1.f) * found.power;
}

// Reads elements of `type` as float32: calls f with a null pointer of the element's type.
template <class F>
WARPFORM_INLINE void with_element(DType type, const F& f) {
  switch (type) {
    case DType::kFloat32: f(static_cast<float*>(nullptr)); break;
    case DType::kFloat16: f(static_cast<Float16*>(nullptr)); break;
    case DType::kBFloat16: f(static_cast<BFloat16*>(nullptr)); break;
  }
}

}  // namespace
}  // namespace warpform::cpu::WARPFORM_CPU_ISA
