// The gate of Monarch Mixer's MLP by itself, a = gelu(g) * v of z = [g, v], forward and backward; backward recomputes a
// too, which the gradient of the second weight needs.
//
// A thread has 8 neighbouring columns, a CTA 2048 of one row. Bytes: 6 rows cols forward, 14 backward, which bound it
// but for erff (encoder/gelu.cuh).
// Measured: not yet, no GPU run so far.
#pragma once

#include "encoder/gelu.cuh"
#include "monarch/launch.h"

namespace warpform {

constexpr int kGateThreads = 256;
constexpr int kGateVec = 8;

struct GateWork {
  GateParams p;
  Divisor parts;  // CTAs of a row
};

template <class T, bool kBackward>
__global__ void __launch_bounds__(kGateThreads) gate(const __grid_constant__ GateWork work) {
  const GateParams& p = work.p;
  const int block = static_cast<int>(blockIdx.x);
  const int64_t row = work.parts.quotient(block);
  const int64_t col =
      ((block - row * work.parts.divisor) * kGateThreads + static_cast<int>(threadIdx.x)) * int64_t{kGateVec};
  if (col >= p.cols) return;
  const int64_t at = row * p.cols + col, at_z = 2 * row * p.cols + col;
  float g[kGateVec], v[kGateVec], a[kGateVec];
  load_floats(g, static_cast<const T*>(p.z) + at_z);
  load_floats(v, static_cast<const T*>(p.z) + at_z + p.cols);
  if constexpr (kBackward) {
    float da[kGateVec];
    load_floats(da, static_cast<const T*>(p.da) + at);
#pragma unroll
    for (int i = 0; i < kGateVec; ++i) {
      const float gelu = ErfGelu::value(g[i]);
      a[i] = gelu * v[i];
      g[i] = da[i] * v[i] * ErfGelu::derivative(g[i]);
      v[i] = da[i] * gelu;
    }
    store_floats(static_cast<T*>(p.dz) + at_z, g);
    store_floats(static_cast<T*>(p.dz) + at_z + p.cols, v);
  } else {
#pragma unroll
    for (int i = 0; i < kGateVec; ++i) a[i] = ErfGelu::value(g[i]) * v[i];
  }
  store_floats(static_cast<T*>(p.a) + at, a);
}

}  // namespace warpform
