// The host's body of kernels/device/ptx.cuh, name for name; what each does is described there. The last argument,
// always left to its default, is the line of the kernel that calls.
#pragma once

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <numbers>

#include "device/types.cuh"
#include "simt/builtins.h"
#include "simt/copies.h"
#include "simt/scheduler.h"
#include "simt/tensor_core.h"
#include "simt/warp.h"

namespace warpform {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

// ---- threads of a block ----

inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

inline void block_sync(const simt::Where& where = simt::Where::current()) { simt::block_barrier(where); }
inline void warp_sync(const simt::Where& where = simt::Where::current()) { simt::warp_barrier(where); }

inline void named_barrier_sync(int id, int threads, const simt::Where& where = simt::Where::current()) {
  simt::named_barrier(id, threads, /*wait=*/true, where);
}
inline void named_barrier_arrive(int id, int threads, const simt::Where& where = simt::Where::current()) {
  simt::named_barrier(id, threads, /*wait=*/false, where);
}

// ---- lanes of a warp; all 32 lanes take part ----

namespace simt {
template <class T>
inline T exchange_as(Meeting meeting, T v, int source, const Where& where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "shuffles take 2, 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  bits = exchange(meeting, bits, source, where);
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}
}  // namespace simt

template <class T>
inline T shuffle_xor(T v, int lane_mask, const simt::Where& where = simt::Where::current()) {
  const int source = lane_id() ^ lane_mask;
  return simt::exchange_as(simt::Meeting::kShuffleXor, v, source < 0 || source >= kWarpSize ? lane_id() : source,
                           where);
}
template <class T>
inline T shuffle_up(T v, int delta, const simt::Where& where = simt::Where::current()) {
  const int source = lane_id() - delta;
  return simt::exchange_as(simt::Meeting::kShuffleUp, v, source < 0 ? lane_id() : source, where);
}
template <class T>
inline T shuffle_down(T v, int delta, const simt::Where& where = simt::Where::current()) {
  const int source = lane_id() + delta;
  return simt::exchange_as(simt::Meeting::kShuffleDown, v, source >= kWarpSize ? lane_id() : source, where);
}
template <class T>
inline T shuffle(T v, int lane, const simt::Where& where = simt::Where::current()) {
  return simt::exchange_as(simt::Meeting::kShuffle, v, lane & (kWarpSize - 1), where);
}
inline uint32_t ballot(bool predicate, const simt::Where& where = simt::Where::current()) {
  return simt::vote(predicate, where);
}
inline int popcount(uint32_t x) { return std::popcount(x); }

// ---- asynchronous copies, sm_80 ----

inline void cp_async_16(uint32_t smem, const void* gmem, bool valid = true,
                        const simt::Where& where = simt::Where::current()) {
  simt::begin_copy(smem, gmem, valid, where);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int kPending>
inline void cp_async_wait(const simt::Where& where = simt::Where::current()) {
  simt::wait_for_copies(kPending, where);
}

// ---- tensor cores, sm_80 ----

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, const simt::Where& where = simt::Where::current()) {
  simt::ldmatrix(r, row, /*transposed=*/false, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, const simt::Where& where = simt::Where::current()) {
  simt::ldmatrix(r, row, /*transposed=*/true, where);
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         const simt::Where& where = simt::Where::current()) {
  static_assert(sizeof(T) == 2, "mma_m16n8k16: half_t or bf16_t");
  constexpr bool kHalf = std::is_same_v<T, half_t>;
  simt::mma(kHalf ? simt::Meeting::kMmaHalf : simt::Meeting::kMmaBfloat16, {d, a, {b0, b1}}, where);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             const simt::Where& where = simt::Where::current()) {
  simt::mma(simt::Meeting::kMmaTf32, {d, a, {b0, b1}}, where);
}

// ---- registers ----

// Only register allocation differs on the GPU.
inline uint32_t opaque(uint32_t x) { return x; }

// ---- special functions; results too small for a normal float are 0, as on the device ----

namespace simt {
inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
}  // namespace simt

inline float exp2_approx(float x) { return simt::flush(std::exp2(simt::flush(x))); }
inline float log2_approx(float x) { return simt::flush(std::log2(simt::flush(x))); }
inline float reciprocal_approx(float x) { return simt::flush(1.0f / simt::flush(x)); }
inline float rsqrt_approx(float x) { return 1.0f / std::sqrt(x); }
inline float sin_pi(float x) { return static_cast<float>(std::sin(std::numbers::pi * std::remainder(double{x}, 2.0))); }
inline float cos_pi(float x) { return static_cast<float>(std::cos(std::numbers::pi * std::remainder(double{x}, 2.0))); }

}  // namespace warpform
