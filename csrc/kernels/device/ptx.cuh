// A short wrapper for every instruction that C++ cannot express. Kernels call these and never write PTX
// themselves, so that csrc/simt/include/device/ptx.cuh can take the place of this file on a machine without a GPU.
#pragma once

#include "device/types.cuh"

namespace warpform {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

// ---- threads of a block ----

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// Barrier `id` (1 to 15) of `threads` threads (a multiple of 32): wait for the others, or only tell them.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- lanes of a warp; all 32 lanes take part ----

template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int lane_mask) {
  return __shfl_xor_sync(kFullMask, v, lane_mask);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T v, int delta) {
  return __shfl_up_sync(kFullMask, v, delta);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T v, int delta) {
  return __shfl_down_sync(kFullMask, v, delta);
}
template <class T>
__device__ __forceinline__ T shuffle(T v, int lane) {
  return __shfl_sync(kFullMask, v, lane);
}
__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(kFullMask, predicate); }
__device__ __forceinline__ int popcount(uint32_t x) { return __popc(x); }

// ---- asynchronous copies, sm_80 ----

// Copies 16 bytes from global to shared memory, past the registers and L1; zeros where !valid: gmem is not read then
// and may point anywhere. Both addresses 16-byte aligned.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(__cvta_generic_to_global(gmem)),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are in flight. Other threads see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores, sm_80 ----

// Four 8x8 tiles of 16-bit elements: lane l gives the address of row l % 8 of tile l / 8 (16-byte aligned); lane l gets
// of each tile row l / 4, columns 2 (l % 4) and +1. With _trans each tile arrives transposed.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d[16x8] += a[16x16] b[16x8], float32 accumulation. Lane l, g = l / 4, t = l % 4:
// a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8), each with its right neighbour; b0 (2t, g), b1 (2t +
// 8, g), each with the one below; d0, d1 (g, 2t), (g, 2t + 1); d2, d3 the same in row g + 8.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<half_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16x8] += a[16x8] b[8x8] in tf32 (float32 registers, 10 bits of mantissa used). a0 (g, t), a1 (g + 8, t), a2 (g, t +
// 4), a3 (g + 8, t + 4); b0 (t, g), b1 (t + 4, g); d as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- registers ----

// Returns x as a value that the compiler knows nothing about: numbers that follow from it inside of a loop are computed
// there, instead of each being kept in a register from before the loop on.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- special functions ----

// 2^x, relative error 2^-22; -inf gives 0, NaN stays NaN.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x), absolute error 2^-22 around 1; 0 gives -inf.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_approx(float x) { return rsqrtf(x); }
// sin(pi x) and cos(pi x): the argument is exact, the result is within 1 ulp.
__device__ __forceinline__ float sin_pi(float x) { return sinpif(x); }
__device__ __forceinline__ float cos_pi(float x) { return cospif(x); }

}  // namespace warpform
