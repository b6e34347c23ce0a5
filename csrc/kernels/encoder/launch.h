// Launch functions of the padding-free encoder's kernels, but for attention: pointers into device memory, sizes, and an
// opaque stream. They launch and return; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/dtype.h"

namespace warpform {

// ---- packing_plan ----

struct PackingPlanParams {
  const void* mask;     // [batch, seqlen], rows contiguous, mask_bytes an element; a nonzero element is a token
  int mask_bytes;       // 1, 4 or 8
  int64_t mask_stride;  // elements from row to row
  int64_t batch;
  int64_t seqlen;
  int64_t capacity;
  int32_t* cu_seqlens;    // [batch + 1]
  int32_t* lengths;       // [batch]
  int64_t* indices;       // [capacity]
  int64_t* position_ids;  // [capacity]
  int32_t* ranks;         // [batch, seqlen]
  int64_t* summary;       // [2]
};
void launch_packing_plan(const PackingPlanParams& params, void* stream);

// ---- pack and unpack ----

// out[r] = index[r] in [0, in_rows) ? in[index[r]] : 0, rows of row_bytes bytes. pack has int64 indices, unpack int32
// ranks.
struct GatherRowsParams {
  const void* in;     // [in_rows] rows, in_stride bytes apart
  void* out;          // [out_rows, row_bytes]
  const void* index;  // [out_rows]
  int index_bytes;    // 4 or 8
  int64_t in_rows;
  int64_t out_rows;
  int64_t row_bytes;
  int64_t in_stride;
};
void launch_gather_rows(const GatherRowsParams& params, void* stream);

// ---- add_bias_residual_layer_norm ----

// Rows longer than this have no kernel.
constexpr int64_t kLayerNormMaxCols = 16384;

// Activations are of `dtype`; parameters [cols] are all of `dtype` or, with float_parameters, all float32.
struct LayerNormParams {
  const void* x;         // [rows, cols]
  const void* residual;  // [rows, cols] or null
  const void* bias;      // [cols] or null
  const void* weight;    // [cols]
  const void* ln_bias;   // [cols]
  void* out;             // [rows, cols]
  void* sum;             // [rows, cols] or null
  float* mean;           // [rows]
  float* rstd;           // [rows]
  int64_t rows;
  int64_t cols;
  float eps;
  DType dtype;
  bool float_parameters;
};
void launch_layer_norm(const LayerNormParams& params, void* stream);

struct LayerNormBackwardParams {
  const void* dout;    // [rows, cols]
  const void* dsum;    // [rows, cols] or null
  const void* sum;     // [rows, cols]
  const void* weight;  // [cols]
  const float* mean;   // [rows]
  const float* rstd;   // [rows]
  void* dx;            // [rows, cols]
  void* dbias;         // [cols]
  void* dweight;       // [cols]
  void* dln_bias;      // [cols]
  float* partials;     // [3, groups, cols], scratch
  int64_t groups;      // what layer_norm_backward_groups says; the current device decides it
  int64_t rows;
  int64_t cols;
  DType dtype;
  bool float_parameters;
};
int64_t layer_norm_backward_groups(const LayerNormBackwardParams& params);
void launch_layer_norm_backward(const LayerNormBackwardParams& params, void* stream);

// ---- bias_gelu ----

struct BiasGeluParams {
  const void* x;     // [rows, cols]
  const void* bias;  // [cols] or null
  void* out;         // [rows, cols]
  int64_t rows;
  int64_t cols;
  DType dtype;
  bool float_parameters;
  bool tanh;  // the tanh approximation, not erf
};
void launch_bias_gelu(const BiasGeluParams& params, void* stream);

struct BiasGeluBackwardParams {
  const void* dout;  // [rows, cols]
  const void* x;     // [rows, cols]
  const void* bias;  // [cols] or null
  void* dx;          // [rows, cols]
  void* dbias;       // [cols]; not written without a bias
  float* partials;   // [groups, cols], scratch
  int64_t groups;    // what bias_gelu_backward_groups says; the current device decides it, 0 without a bias
  int64_t rows;
  int64_t cols;
  DType dtype;
  bool float_parameters;
  bool tanh;
};
int64_t bias_gelu_backward_groups(const BiasGeluBackwardParams& params);
void launch_bias_gelu_backward(const BiasGeluBackwardParams& params, void* stream);

// ---- supported configurations, JSON objects separated by commas ----

std::string layer_norm_kernel_table();
std::string gelu_kernel_table();

// The family's supported configurations, JSON objects separated by commas.
std::string encoder_kernel_table();

}  // namespace warpform
