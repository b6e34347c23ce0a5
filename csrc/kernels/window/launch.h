// Launch functions of the window attention kernels: pointers into device memory, sizes, an opaque stream. They launch
// and return; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "common/dtype.h"
#include "common/supported.h"

namespace warpform {

// Tokens that a CTA works on at a time, queries or keys. A window of no more is worked on whole: no log-sum-exp is
// saved for it.
inline constexpr int kWindowBlock = 64;
// Tokens along one axis of a window, at most.
inline constexpr int kMaxWindow = 1024;

// The arguments that forward and backward share. A grid of two axes has depth 1, window 1, shift 0. Tensors are
// contiguous, those of 16-bit elements 16-byte aligned.
struct WindowProblem {
  const void* qkv;          // [batch, size[0], size[1], size[2], 3, heads, head_dim]
  const void* table;        // [product of 2 window - 1, heads], or null
  const void* logit_scale;  // [heads], or null
  const void* qkv_bias;     // [3, heads, head_dim] as qkv, or null: q, k and v of padded positions
  DType table_dtype;
  DType logit_scale_dtype;
  DType dtype;
  int batch;
  int heads;
  int head_dim;
  int size[3];    // of the grid: depth, height, width
  int window[3];  // tokens along each axis
  int shift[3];   // 0 <= shift < window
  float scale;    // of q.k, where there is no logit_scale
  float mask_value;

  // Numbers that follow from the above. Kernels read it from constant memory instead of keeping it in registers.
  Divisor count[3];      // windows along each axis
  int windows;           // of all images
  int tokens;            // of a window
  Divisor blocks;        // of a window, kWindowBlock tokens each
  int table_entries;     // of one head
  int64_t image_tokens;  // of an image
  int64_t width;         // heads * head_dim

  void derive() {
    windows = batch, tokens = 1, table_entries = 1, image_tokens = 1;
    for (int k = 0; k < 3; ++k) {
      count[k].set((size[k] + window[k] - 1) / window[k]);
      windows *= count[k].divisor;
      tokens *= window[k];
      table_entries *= 2 * window[k] - 1;
      image_tokens *= size[k];
    }
    blocks.set((tokens + kWindowBlock - 1) / kWindowBlock);
    width = static_cast<int64_t>(heads) * head_dim;
  }
};

struct WindowForwardParams {
  WindowProblem problem;
  void* out;   // [batch, size..., heads * head_dim]
  float* lse;  // [batch, windows, heads, tokens]; null for windows of up to kWindowBlock tokens
};
void launch_window_attention(const WindowForwardParams& params, void* stream);

struct WindowBackwardParams {
  WindowProblem problem;
  const void* dout;  // [batch, size..., heads * head_dim]
  const void* out;   // as dout; only for windows of more than kWindowBlock tokens
  const float* lse;  // as in forward
  void* dqkv;        // as qkv
  void* dtable;      // as table, or null; like the next two
  void* dlogit_scale;
  void* dqkv_bias;
  float* delta;         // [batch, size..., heads], workspace: rowsum(P * dP), of a query; only where lse is
  float* table_sums;    // [table_shares, heads, tokens, tokens], workspace; where dtable is
  float* scale_sums;    // [shares, heads], workspace; where dlogit_scale is
  float* padding_sums;  // [shares, 3, heads, head_dim], workspace; where dqkv_bias is
  int shares;           // of the windows, each with its own part of the sums: window_backward_shares
  int table_shares;
};
// The number of partial sums that a backward leaves: a function of the problem and the GPU's number of SMs.
struct WindowShares {
  int shares;
  int table_shares;
};
WindowShares window_backward_shares(const WindowProblem& problem);
void launch_window_attention_backward(const WindowBackwardParams& params, void* stream);

// Null if a kernel serves the problem on the current device, else why none does. Looks at sizes alone, and derives the
// rest.
const char* window_attention_unsupported(WindowProblem problem, bool backward);

// ---- supported configurations ----

inline constexpr SizeLimit kWindowHeadDim{
    .name = "head_dim", .multiple_of = 8, .max = 128, .otherwise = "head_dim is not a multiple of 8 up to 128"};

inline constexpr SupportedConfig kWindowConfigs[] = {
    {.op = "window_attention", .dtypes = kHalfTypes, .limits = {kWindowHeadDim}},
    {.op = "window_attention_backward", .dtypes = kHalfTypes, .limits = {kWindowHeadDim}},
};

}  // namespace warpform
