// Launch function of _wgmma_product, a product of one tile by one warpgroup, for tests: it shows whether descriptors,
// swizzles and tensor maps mean to the hardware what device/wgmma.cuh says. It launches and returns; where it cannot, it
// throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace warpform {

constexpr int kProductRows = 64, kProductCols = 64, kProductMaxDepth = 64;

// Where the left operand is: in shared memory, contiguous along the depth or along its rows, or in registers.
enum class ProductLeft : int { kDepth, kOuter, kRegisters };

struct WgmmaProductParams {
  const void* a;  // [64, depth], or [depth, 64] for kOuter; 16-byte aligned
  const void* b;  // [64 columns, depth], or [depth, 64 columns] where outer_b; 16-byte aligned
  float* out;     // [64, 64]
  int depth;      // a multiple of 16, at most 64
  DType dtype;    // float16 or bfloat16
  ProductLeft left;
  bool outer_b;    // b is contiguous along its columns
  int span;        // bytes after which the swizzle repeats along a row: 32, 64 or 128, or 16 without a swizzle
  bool by_stores;  // threads store the operands into shared memory; else TMA brings them
};
void launch_wgmma_product(const WgmmaProductParams& params, void* stream);

}  // namespace warpform
