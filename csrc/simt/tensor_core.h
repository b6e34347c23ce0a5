// ldmatrix and mma.sync. The layouts of the operands are those that kernels/device/ptx.cuh describes.
#pragma once

#include <cstdint>

#include "simt/scheduler.h"

namespace warpform::simt {

void ldmatrix(uint32_t* r, uint32_t row, bool transposed, const Where& where);

// The registers of one lane. K 16: a[4] and b[2] hold two 16-bit values each; tf32, K 8: one float each.
struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
void mma(Meeting kind, const MmaOperands& operands, const Where& where);

// d[rows][cols] += the product of a, given as [depth][rows], and b [depth][cols]. rows is a multiple of 4, cols of 16.
void multiply_transposed(const float* a, int rows, const float* b, int cols, int depth, float* d);

}  // namespace warpform::simt
