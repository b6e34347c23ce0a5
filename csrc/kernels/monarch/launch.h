// Launch functions of the Monarch products: pointers into device memory, sizes, an opaque stream. They launch and
// return; a launch that fails throws std::runtime_error.
//
// Matrices of activations are [rows, columns] of float16 or bfloat16, 16-byte aligned as their rows are; sizes of
// blocks are multiples of 8. Weights are contiguous.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "common/dtype.h"
#include "common/supported.h"

namespace warpform {

// Elements that sizes of blocks must be multiples of: 16 bytes.
inline constexpr int kMonarchAlignment = 8;

// c[:, g cols + j] = sum_i a[:, g depth + i] b[g, j, i] + bias[g cols + j]
struct BlockGemmParams {
  const void* a;     // [rows, groups * depth], rows a_stride elements apart
  const void* b;     // [groups, cols, depth], or [groups, depth, cols] if b_transposed
  const void* bias;  // [groups * cols] or null
  void* c;           // [rows, groups * cols], contiguous
  int64_t rows;
  int64_t a_stride;
  int groups;
  int cols;
  int depth;
  bool b_transposed;
  DType dtype;
};
void launch_block_gemm(const char* op, const BlockGemmParams& params, void* stream);

// dw[g, j, i] = sum over rows of a[:, g m + j] b[:, g n + i], dbias[g m + j] = sum over rows of a[:, g m + j]
struct WeightGradientParams {
  const void* a;          // [rows, groups * m], rows a_stride elements apart
  const void* b;          // [rows, groups * n], rows b_stride elements apart
  void* dw;               // [groups, m, n]
  void* dbias;            // [groups * m] or null
  float* dw_partials;     // [splits, groups, m, n], workspace; unused by one split
  float* dbias_partials;  // [splits, groups * m], workspace; likewise
  int64_t rows;
  int64_t a_stride;
  int64_t b_stride;
  int groups;
  int m;
  int n;
  int splits;  // of the rows: weight_gradient_splits
  DType dtype;
};
// The number of ranges of rows that are summed apart: a function of the sizes and the GPU's number of SMs.
int weight_gradient_splits(const WeightGradientParams& params);
void launch_weight_gradient(const char* op, const WeightGradientParams& params, void* stream);

// out[:, j outer + i] = in[:, i inner + j]: each row, a matrix [outer, inner], transposed. 16-bit elements.
struct TransposeRowsParams {
  const void* in;  // [rows, outer * inner], rows in_stride elements apart
  void* out;       // [rows, inner * outer], contiguous
  int64_t rows;
  int64_t in_stride;
  int outer;
  int inner;
};
void launch_transpose_rows(const char* op, const TransposeRowsParams& params, void* stream);

// With w1 of [k, q, p] = [blocks1, rows1, cols1] and w2 of [l, s, r] = [blocks2, rows2, cols2]:
// h[:, kappa q + theta] = sum_i x[:, kappa p + i] w1[kappa, theta, i];
// y[:, sigma l + lambda] = sum_rho w2[lambda, sigma, rho] h[:, rho l + lambda]
struct MonarchParams {
  const void* x;   // [rows, blocks1 * cols1], rows x_stride elements apart
  const void* w1;  // [blocks1, rows1, cols1]
  const void* w2;  // [blocks2, rows2, cols2], blocks2 * cols2 = blocks1 * rows1
  void* y;         // [rows, rows2 * blocks2], contiguous
  int64_t rows;
  int64_t x_stride;
  int blocks1;
  int rows1;
  int cols1;
  int blocks2;
  int rows2;
  int cols2;
  DType dtype;
};
// True if launch_monarch serves the sizes on the current device: its intermediate has to fit into shared memory.
bool monarch_fits(const MonarchParams& params);
void launch_monarch(const MonarchParams& params, void* stream);

// z = x times the block-diagonal w_up; y = (gelu(z[:, :f]) * z[:, f:]) times the block-diagonal w_down + bias, GELU by
// erf, f = blocks * inner
struct GluParams {
  const void* x;       // [rows, blocks * in], rows x_stride elements apart
  const void* w_up;    // [blocks, 2 inner, in]
  const void* w_down;  // [blocks, out, inner]
  const void* bias;    // [blocks * out] or null
  void* y;             // [rows, blocks * out], contiguous
  const void* dout;    // [rows, blocks * out], rows dout_stride elements apart; of the gradient alone, as the next two
  void* a;             // [rows, f]: the gated product
  void* dz;            // [rows, 2 f]: the gradient of z
  int64_t rows;
  int64_t x_stride;
  int64_t dout_stride;
  int blocks;
  int in;
  int inner;
  int out;
  DType dtype;
};
// True if launch_glu serves the sizes on the current device: two blocks of x have to fit into shared memory, a block of
// y into registers.
bool glu_fits(const GluParams& params);
void launch_glu(const GluParams& params, void* stream);

// a and dz, from x and dout: glu_gradient.cuh.
bool glu_gradient_fits(const GluParams& params);
void launch_glu_gradient(const GluParams& params, void* stream);

// The gate by itself, where the above do not serve: a = gelu(z[:, :cols]) * z[:, cols:]
struct GateParams {
  const void* z;   // [rows, 2 cols]
  const void* da;  // [rows, cols]: the gradient of a; null in forward
  void* a;         // [rows, cols]
  void* dz;        // [rows, 2 cols]: the gradient of z; null in forward
  int64_t rows;
  int64_t cols;
  DType dtype;
};
void launch_gate(const char* op, const GateParams& params, void* stream);

// ---- supported configurations ----

inline constexpr SizeLimit kMonarchBlockSize{.name = "block_sizes",
                                             .multiple_of = kMonarchAlignment,
                                             .otherwise = "a block has rows or columns that are not a multiple of 8"};

inline constexpr SupportedConfig kMonarchConfigs[] = {
    {.op = "blockdiag_multiply", .dtypes = kHalfTypes, .limits = {kMonarchBlockSize}},
    {.op = "blockdiag_multiply_backward", .dtypes = kHalfTypes, .limits = {kMonarchBlockSize}},
    {.op = "monarch_multiply", .dtypes = kHalfTypes, .limits = {kMonarchBlockSize}},
    {.op = "monarch_multiply_backward", .dtypes = kHalfTypes, .limits = {kMonarchBlockSize}},
    {.op = "blockdiag_glu", .dtypes = kHalfTypes, .limits = {kMonarchBlockSize}},
    {.op = "blockdiag_glu_backward", .dtypes = kHalfTypes, .limits = {kMonarchBlockSize}},
};

}  // namespace warpform
