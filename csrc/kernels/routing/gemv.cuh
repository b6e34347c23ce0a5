// The routed layers for one to four tokens, as in decoding: matrix-vector products that read the weight once, only the
// groups that any of the tokens uses. The plan's order is not needed.
//
// Tile      One output a warp: a row of the weight, [inputs], by the tokens, [up to 4, inputs].
// Loads     A lane reads 16 bytes of the weight's row at a time. The tokens, times their gates, lie in shared memory.
// Bounds    The bytes of the weight in use. With 6 shared groups and 2 of 10 that is half of the weight for one token,
//           0.6 for two, 0.75 for four. d = 4096 squared: 33.5 MB dense, 7.8 us at 4.3 TB/s on an H200; half, 3.9 us.
// Measured  H100 80GB HBM3, bfloat16, 4 tokens, d = 2048: gather 15.4 us, 273 GB/s, 9 % of the floor; scatter 15.2 us.
#pragma once

#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "routing/gates.cuh"
#include "routing/group_mask.cuh"
#include "routing/launch.h"

namespace warpform {

constexpr int kGemvThreads = 256, kGemvWarps = kGemvThreads / kWarpSize;
constexpr int kVector = 8;  // 16-bit elements of a load

struct GemvTokens {
  uint64_t masks[kGemvTokens];
  uint64_t any;

  __device__ __forceinline__ explicit GemvTokens(const Routes& r) : any(0) {
#pragma unroll
    for (int t = 0; t < kGemvTokens; ++t) {
      masks[t] = t < r.tokens ? static_cast<uint64_t>(load_global(r.group_mask + t)) : 0;
      if (r.num_groups < 64) masks[t] &= (uint64_t{1} << r.num_groups) - 1;
      any |= masks[t];
    }
  }
};

// sums[t] += the product of eight elements of the weight and of token t, which lies `pitch` bytes behind token
// t - 1.
template <class T>
__device__ __forceinline__ void add_products(float (&sums)[kGemvTokens], const Vec<T, kVector>& w, uint32_t x,
                                             int pitch, int tokens) {
#pragma unroll
  for (int t = 0; t < kGemvTokens; ++t) {
    if (t >= tokens) break;
    const auto v = load_shared<Vec<T, kVector>>(x + t * pitch);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[t] += to_float(w[i]) * to_float(v[i]);
  }
}

struct HiddenGatherGemvWork {
  HiddenGatherParams p;
  Divisor vectors;  // of a group
};

// Shared memory: the groups in use; of each token the power of two that its gates are taken over, and the inverse; then
// of each token those parts of x, times their gates, rounded as in a tile.
__host__ __device__ constexpr int gather_gemv_bytes(int num_groups, int width) {
  return kMaxGroups * 4 + kGemvTokens * static_cast<int>(sizeof(PowerOfTwo)) + kGemvTokens * num_groups * width * 2;
}

template <class T>
__global__ void __launch_bounds__(kGemvThreads) hidden_gather_gemv(const __grid_constant__ HiddenGatherGemvWork work) {
  const HiddenGatherParams& p = work.p;
  const Routes& r = p.routes;
  const int thread = static_cast<int>(threadIdx.x);
  const GemvTokens routed(r);
  const uint32_t list = shared_base(), powers = list + kMaxGroups * 4;
  const uint32_t x = powers + kGemvTokens * static_cast<int>(sizeof(PowerOfTwo));
  const auto power = [&](int t) { return load_shared<PowerOfTwo>(powers + t * static_cast<int>(sizeof(PowerOfTwo))); };
  const int groups = popcount(routed.any), vectors = groups * work.vectors.divisor, pitch = vectors * 16;
  if (thread < r.num_groups && routed.any >> thread & 1) {
    store_shared(list + popcount(routed.any & ((uint64_t{1} << thread) - 1)) * 4, thread);
  }
  if (thread < r.tokens) {
    const auto mask = static_cast<uint64_t>(load_global(r.group_mask + thread));
    float largest = 0.f;
    for (int g = 0; p.gates != nullptr && g < r.num_groups; ++g) {
      if (mask >> g & 1) largest = fmaxf(largest, fabsf(load_global(p.gates + thread * r.num_groups + g)));
    }
    store_shared(powers + thread * static_cast<int>(sizeof(PowerOfTwo)), power_above(largest));
  }
  block_sync();
  for (int i = thread; i < vectors * r.tokens; i += kGemvThreads) {
    const int t = i / vectors, v = i - t * vectors, place = work.vectors.quotient(v);
    const int g = load_shared<int>(list + place * 4);
    Vec<T, kVector> value{};
    uint64_t mask = 0;
#pragma unroll
    for (int k = 0; k < kGemvTokens; ++k) mask = k == t ? routed.masks[k] : mask;
    if (mask >> g & 1) {
      const int at = g * r.width + (v - place * work.vectors.divisor) * kVector;
      value = load_global(reinterpret_cast<const Vec<T, kVector>*>(static_cast<const T*>(p.x) + t * p.x_stride + at));
      if (p.gates != nullptr) {
        const float gate = load_global(p.gates + t * r.num_groups + g) * power(t).inverse;
#pragma unroll
        for (int k = 0; k < kVector; ++k) value[k] = from_float<T>(to_float(value[k]) * gate);
      }
    }
    store_shared(x + t * pitch + v * 16, value);
  }
  block_sync();

  const int outputs = r.dense_width;
  for (int o = static_cast<int>(blockIdx.x) * kGemvWarps + warp_id(); o < outputs;
       o += static_cast<int>(gridDim.x) * kGemvWarps) {
    const T* w = static_cast<const T*>(p.w.data) + o * p.w.stride;
    float sums[kGemvTokens] = {};
#pragma unroll 4
    for (int v = lane_id(); v < vectors; v += kWarpSize) {
      const int place = work.vectors.quotient(v);
      const int g = load_shared<int>(list + place * 4);
      const int at = g * r.width + (v - place * work.vectors.divisor) * kVector;
      const auto row = load_global_streaming(reinterpret_cast<const Vec<T, kVector>*>(w + at));
      add_products(sums, row, x + v * 16, pitch, r.tokens);
    }
    const float bias = p.bias == nullptr ? 0.f : to_float(load_global(static_cast<const T*>(p.bias) + o));
#pragma unroll
    for (int t = 0; t < kGemvTokens; ++t) {
      const float sum = warp_reduce(sums[t], Sum{});
      if (lane_id() == 0 && t < r.tokens) {
        store_global(static_cast<T*>(p.out) + int64_t{t} * outputs + o, from_float<T>(sum * power(t).value + bias));
      }
    }
  }
}

struct HiddenScatterGemvWork {
  HiddenScatterParams p;
  Divisor width;  // of a group
};

// Shared memory: the tokens.
__host__ __device__ constexpr int scatter_gemv_bytes(int dense_width) { return kGemvTokens * dense_width * 2; }

template <class T>
__global__ void __launch_bounds__(kGemvThreads) hidden_scatter_gemv(
    const __grid_constant__ HiddenScatterGemvWork work) {
  const HiddenScatterParams& p = work.p;
  const Routes& r = p.routes;
  const int thread = static_cast<int>(threadIdx.x);
  const GemvTokens routed(r);
  const uint32_t x = shared_base();
  const int vectors = r.dense_width / kVector, pitch = vectors * 16;
  for (int i = thread; i < vectors * r.tokens; i += kGemvThreads) {
    const int t = i / vectors, v = i - t * vectors;
    store_shared(x + t * pitch + v * 16, load_global(reinterpret_cast<const Vec<T, kVector>*>(
                                             static_cast<const T*>(p.x) + t * p.x_stride + v * kVector)));
  }
  block_sync();

  const int outputs = r.num_groups * r.width;
  for (int o = static_cast<int>(blockIdx.x) * kGemvWarps + warp_id(); o < outputs;
       o += static_cast<int>(gridDim.x) * kGemvWarps) {
    const int g = work.width.quotient(o);
    float sums[kGemvTokens] = {};
    if (routed.any >> g & 1) {
      const T* w = static_cast<const T*>(p.w.data) + o * p.w.stride;
#pragma unroll 4
      for (int v = lane_id(); v < vectors; v += kWarpSize) {
        const auto row = load_global_streaming(reinterpret_cast<const Vec<T, kVector>*>(w + v * kVector));
        add_products(sums, row, x + v * 16, pitch, r.tokens);
      }
    }
    const float bias = p.bias == nullptr ? 0.f : to_float(load_global(static_cast<const T*>(p.bias) + o));
#pragma unroll
    for (int t = 0; t < kGemvTokens; ++t) {
      const float sum = warp_reduce(sums[t], Sum{});
      if (lane_id() != 0 || t >= r.tokens) continue;
      const bool used = routed.masks[t] >> g & 1;
      const float gate = used && p.gates != nullptr ? load_global(p.gates + t * r.num_groups + g) : 1.f;
      const float z = used ? sum + bias : 0.f;
      const int64_t at = int64_t{t} * outputs + o;
      store_global(static_cast<T*>(p.out) + at, from_float<T>(z * gate));
      if (p.ungated != nullptr) store_global(static_cast<T*>(p.ungated) + at, from_float<T>(z));
    }
  }
}

}  // namespace warpform
