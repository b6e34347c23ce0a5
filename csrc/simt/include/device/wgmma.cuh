// The host's body of kernels/device/wgmma.cuh, name for name.
#pragma once

#include <type_traits>

#include "device/tensor_map.cuh"
#include "device/types.cuh"
#include "simt/wgmma.h"

namespace warpform {

enum class Major : int { kDepth, kOuter };

constexpr uint64_t wgmma_descriptor(uint32_t address, int leading, int stride, Swizzle swizzle) {
  const int kind = swizzle == Swizzle::kNone ? 0 : 4 - static_cast<int>(swizzle);
  return uint64_t{(address & 0x3ffff) >> 4} | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(kind) << 62;
}

// One for each number of arrays: behind a pack there is no place for the line of the kernel.
namespace simt {
template <class... Registers>
inline void fence(const Where& where, Registers&... registers) {
  const RegisterArray arrays[sizeof...(registers) + 1] = {{&registers, sizeof(registers)}...};
  fence_products(arrays, sizeof...(registers), where);
}
template <class... Registers>
inline void wait(int pending, const Where& where, Registers&... registers) {
  const RegisterArray arrays[sizeof...(registers) + 1] = {{&registers, sizeof(registers)}...};
  wait_for_products(pending, arrays, sizeof...(registers), where);
}
}  // namespace simt

inline void wgmma_fence(const simt::Where& where = simt::Where::current()) { simt::fence(where); }
template <class A>
inline void wgmma_fence(A& a, const simt::Where& where = simt::Where::current()) {
  simt::fence(where, a);
}
template <class A, class B>
inline void wgmma_fence(A& a, B& b, const simt::Where& where = simt::Where::current()) {
  simt::fence(where, a, b);
}
template <class A, class B, class C>
inline void wgmma_fence(A& a, B& b, C& c, const simt::Where& where = simt::Where::current()) {
  simt::fence(where, a, b, c);
}
template <class A, class B, class C, class D>
inline void wgmma_fence(A& a, B& b, C& c, D& d, const simt::Where& where = simt::Where::current()) {
  simt::fence(where, a, b, c, d);
}
inline void wgmma_commit(const simt::Where& where = simt::Where::current()) { simt::commit_products(where); }
template <int kPending>
inline void wgmma_wait(const simt::Where& where = simt::Where::current()) {
  simt::wait(kPending, where);
}
template <int kPending, class A>
inline void wgmma_wait(A& a, const simt::Where& where = simt::Where::current()) {
  simt::wait(kPending, where, a);
}
template <int kPending, class A, class B>
inline void wgmma_wait(A& a, B& b, const simt::Where& where = simt::Where::current()) {
  simt::wait(kPending, where, a, b);
}
template <int kPending, class A, class B, class C>
inline void wgmma_wait(A& a, B& b, C& c, const simt::Where& where = simt::Where::current()) {
  simt::wait(kPending, where, a, b, c);
}
template <int kPending, class A, class B, class C, class D>
inline void wgmma_wait(A& a, B& b, C& c, D& d, const simt::Where& where = simt::Where::current()) {
  simt::wait(kPending, where, a, b, c, d);
}

template <class T, int kN, Major kA = Major::kDepth, Major kB = Major::kDepth>
inline void wgmma(float (&d)[kN / 8][4], uint64_t a, uint64_t b, bool accumulate,
                  const simt::Where& where = simt::Where::current()) {
  static_assert(kN == 64 || kN == 96 || kN == 128 || kN == 176 || kN == 192 || kN == 256);
  simt::issue_product({.d = &d[0][0],
                       .registers_a = nullptr,
                       .a = a,
                       .b = b,
                       .columns = kN,
                       .half = std::is_same_v<T, half_t>,
                       .outer_a = kA == Major::kOuter,
                       .outer_b = kB == Major::kOuter,
                       .accumulate = accumulate},
                      where);
}

template <class T, int kN, Major kB = Major::kDepth>
inline void wgmma(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                  const simt::Where& where = simt::Where::current()) {
  static_assert(kN == 64 || kN == 96 || kN == 128 || kN == 176 || kN == 192 || kN == 256);
  simt::issue_product({.d = &d[0][0],
                       .registers_a = a,
                       .a = 0,
                       .b = b,
                       .columns = kN,
                       .half = std::is_same_v<T, half_t>,
                       .outer_a = false,
                       .outer_b = kB == Major::kOuter,
                       .accumulate = accumulate},
                      where);
}

}  // namespace warpform
