// Sums over groups of float32 partial sums, the second stage of a parameter gradient (column_sum.cuh).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace warpform {

struct ColumnSumParams {
  const float* partials;  // [sums, groups, cols]
  void* out[3];           // `sums` of them, [cols]
  int sums;
  int64_t groups;  // 0 gives zeros
  int64_t cols;
  DType dtype;  // of out
};

void launch_column_sum(const char* op, const ColumnSumParams& p, void* stream);

}  // namespace warpform
