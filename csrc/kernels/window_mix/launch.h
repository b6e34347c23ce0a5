// Launch functions of window mixing: pointers into device memory, sizes, an opaque stream. They launch and return; a
// launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "common/dtype.h"
#include "common/supported.h"

namespace warpform {

// Tokens of a window, at most: those of 32 x 32.
inline constexpr int64_t kWindowMixMaxTokens = 1024;
// Channels with a norm, at most.
inline constexpr int64_t kWindowMixMaxNormChannels = 16384;

// The arguments that forward and backward share. Token t of the grid, in the order of [batch, height, width], has its
// `channels` neighbouring elements of x at x + t * x_stride, and of the gate alike. All are of `dtype`, but norm_weight
// and norm_bias with float_norm: those are float32.
struct WindowMixProblem {
  const void* x;
  int64_t x_stride;
  const void* gate;  // or null
  int64_t gate_stride;
  const void* weight;       // [tokens, tokens] of a window: (to, from)
  const void* bias;         // [tokens], or null
  const void* norm_weight;  // [channels], or null: nothing is normalised
  const void* norm_bias;    // [channels], or null
  float* mean;              // [batch * height * width], or null without a norm
  float* rstd;              // as mean
  float eps;
  DType dtype;
  bool float_norm;
  bool dilated;  // a window is the tokens at one place of each cell of a grid of cells, else of neighbours
  int64_t batch;
  int height, width, channels;
  int window[2];  // tokens along each axis, divisors of height and width

  // Numbers that follow from the above; derive() sets them.
  Divisor count[2];        // windows along each axis
  Divisor window_width;    // window[1]
  Divisor chunks;          // of 16 bytes that a token has
  int tokens;              // of a window
  int windows;             // of all images
  int64_t window_step[2];  // tokens of the grid from a window to the next along each axis
  int64_t place_step[2];   // from a place in a window to the next
  int64_t image_tokens;    // height * width
  bool vectors;            // every chunk may be read and written at once
  bool weight_vectors;     // the same of rows of the weight
  bool whole_tokens;       // a tile holds whole tokens, and makes their statistics

  void derive();
};

struct WindowMixParams {
  WindowMixProblem problem;
  void* out;  // [batch, height, width, channels]
};
// Writes out, and mean and rstd where they are not null.
void launch_window_mix(const WindowMixParams& params, void* stream);

struct WindowMixBackwardParams {
  WindowMixProblem problem;
  const void* dout;    // [batch, height, width, channels]
  void* dx;            // as dout
  void* dgate;         // as dout, or null without a gate
  void* dweight;       // as weight
  void* dbias;         // as bias, or null
  void* dnorm_weight;  // as norm_weight, or null
  void* dnorm_bias;    // as norm_bias, or null

  // Workspace: sums over a share of the windows each, and where window_mix_normalises_apart() what LayerNorm's backward
  // takes.
  float* weight_sums;     // [shares, tokens, tokens]
  float* bias_sums;       // [shares, tokens]
  float* norm_sums;       // [2, windows, channels]: of dnorm_weight and dnorm_bias
  void* normalised_grad;  // as dout
  const void* dense_x;    // x, tokens end to end
  int shares;             // window_mix_shares
};
// The number of shares: a function of the problem and the GPU's number of SMs.
int window_mix_shares(const WindowMixProblem& problem);
void launch_window_mix_backward(const WindowMixBackwardParams& params, void* stream);

// ---- supported configurations ----

inline constexpr SizeLimit kWindowMixTokens{
    .name = "window_tokens", .max = kWindowMixMaxTokens, .otherwise = "a window of more than 1024 tokens"};

inline constexpr SupportedConfig kWindowMixConfigs[] = {
    {.op = "window_mix", .dtypes = kFloatTypes, .limits = {kWindowMixTokens}, .float_parameters = true},
    {.op = "window_mix_backward", .dtypes = kFloatTypes, .limits = {kWindowMixTokens}, .float_parameters = true},
};

}  // namespace warpform
