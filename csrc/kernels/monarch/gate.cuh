// The gate of Monarch Mixer's MLP by itself, a = gelu(g) * v of z = [g, v], forward and backward. The backward
// recomputes a too, which the gradient of the second weight needs.
//
// Tile      2048 columns of one row a CTA. A thread has four pairs of neighbouring columns, so that a warp moves 128
//           bytes in a row: of 8 neighbouring columns, which go through eight erff with branches, the compiler would
//           make stores of 4 bytes too.
// Loads     4 bytes a lane, straight to registers.
// Bounds    6 rows cols bytes forward, 14 backward, and erff (common/gelu.cuh).
// Measured  not yet.
#pragma once

#include "common/gelu.cuh"
#include "device/mma.cuh"
#include "monarch/launch.h"

namespace warpform {

constexpr int kGateThreads = 256;
constexpr int kGateRounds = 4;
constexpr int kGateCols = kGateThreads * kGateRounds * 2;

struct GateWork {
  GateParams p;
  Divisor parts;  // CTAs of a row
};

template <class T, bool kBackward>
__global__ void __launch_bounds__(kGateThreads) gate(const __grid_constant__ GateWork work) {
  const GateParams& p = work.p;
  const int block = static_cast<int>(blockIdx.x);
  const int64_t row = work.parts.quotient(block);
  const int64_t first = (block - row * work.parts.divisor) * kGateCols + 2 * static_cast<int>(threadIdx.x);
  const auto value = [](const void* matrix, int64_t at) {
    return unpack2<T>(load_global(reinterpret_cast<const uint32_t*>(static_cast<const T*>(matrix) + at)));
  };
  const auto store = [](void* matrix, int64_t at, float a, float b) {
    store_global(reinterpret_cast<uint32_t*>(static_cast<T*>(matrix) + at), pack2<T>(a, b));
  };
  Vec<float, 2> g[kGateRounds], v[kGateRounds], da[kGateRounds];
#pragma unroll
  for (int i = 0; i < kGateRounds; ++i) {
    const int64_t col = first + i * (2 * kGateThreads);
    if (col >= p.cols) break;
    g[i] = value(p.z, 2 * row * p.cols + col);
    v[i] = value(p.z, (2 * row + 1) * p.cols + col);
    if constexpr (kBackward) da[i] = value(p.da, row * p.cols + col);
  }
#pragma unroll
  for (int i = 0; i < kGateRounds; ++i) {
    const int64_t col = first + i * (2 * kGateThreads);
    if (col >= p.cols) break;
    const float gelu[2] = {ErfGelu::value(g[i][0]), ErfGelu::value(g[i][1])};
    store(p.a, row * p.cols + col, gelu[0] * v[i][0], gelu[1] * v[i][1]);
    if constexpr (kBackward) {
      store(p.dz, 2 * row * p.cols + col, da[i][0] * v[i][0] * ErfGelu::derivative(g[i][0]),
            da[i][1] * v[i][1] * ErfGelu::derivative(g[i][1]));
      store(p.dz, (2 * row + 1) * p.cols + col, da[i][0] * gelu[0], da[i][1] * gelu[1]);
    }
  }
}

}  // namespace warpform
