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
  int batch;
  int height, width, channels;
  int window[2];  // tokens along each axis, divisors of height and width

  // Numbers that follow from the above. Kernels read them from constant memory instead of keeping them in registers.
  Divisor count[2];        // windows along each axis
  Divisor window_width;    // window[1]
  Divisor chunks;          // of 16 bytes that a token has
  int tokens;              // of a window
  int windows;             // of all images
  int tiles;               // of 64 columns
  int64_t window_step[2];  // tokens of the grid from a window to the next along each axis
  int64_t place_step[2];   // from a place in a window to the next
  int64_t image_tokens;    // height * width
  bool vectors;            // every chunk may be read and written at once
  bool weight_vectors;     // the same of rows of the weight
  bool whole_tokens;       // a tile holds whole tokens, and sums over their channels

  void derive() {
    const int element = dtype == DType::kFloat32 ? 4 : 2, vec = 16 / element, tile_chunks = 64 / vec;
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    const int size[2] = {height, width};
    for (int k = 0; k < 2; ++k) {
      count[k].set(size[k] / window[k]);
      const int64_t row = k == 0 ? width : 1;  // tokens from a token to its neighbour along the axis
      window_step[k] = row * (dilated ? 1 : window[k]);
      place_step[k] = row * (dilated ? count[k].divisor : 1);
    }
    window_width.set(window[1]);
    chunks.set((channels + vec - 1) / vec);
    tokens = window[0] * window[1];
    windows = batch * count[0].divisor * count[1].divisor;
    tiles = (windows * chunks.divisor + tile_chunks - 1) / tile_chunks;
    image_tokens = int64_t{height} * width;
    vectors = channels % vec == 0 && x_stride % vec == 0 && gate_stride % vec == 0 && aligned(x) && aligned(gate) &&
              aligned(norm_weight) && aligned(norm_bias);
    weight_vectors = tokens % vec == 0 && aligned(weight);
    whole_tokens = chunks.divisor <= tile_chunks && (chunks.divisor & (chunks.divisor - 1)) == 0;
  }
};

struct WindowMixParams {
  WindowMixProblem problem;
  void* out;  // [batch, height, width, channels]
};
// Writes out, and mean and rstd where they are not null.
void launch_window_mix(const WindowMixParams& params, void* stream);

// dx is the gradient of x. Where a norm's tokens do not lie whole in a tile it is that of the normalised x instead, of
// which LayerNorm's backward makes dx, dnorm_weight and dnorm_bias.
struct WindowMixBackwardParams {
  WindowMixProblem problem;
  const void* dout;    // [batch, height, width, channels], contiguous and 16-byte aligned
  void* dx;            // as dout
  void* dgate;         // as dout, or null without a gate
  void* dweight;       // as weight
  void* dbias;         // as bias, or null
  void* dnorm_weight;  // as norm_weight, or null
  void* dnorm_bias;    // as norm_bias, or null
  float* weight_sums;  // [shares, tokens, tokens], workspace, as what follows
  float* bias_sums;    // [shares, tokens]; where dbias is
  float* norm_sums;    // [2, windows, channels], of dnorm_weight and of dnorm_bias; where dnorm_weight is
  int shares;          // of the columns, each with its own part of the sums: window_mix_shares
};
// A function of the problem and the GPU's number of SMs.
int window_mix_shares(const WindowMixProblem& problem);
void launch_window_mix_backward(const WindowMixBackwardParams& params, void* stream);

// Null if a kernel serves the problem on the current device, else why none does. Looks at sizes alone.
const char* window_mix_unsupported(const WindowMixProblem& problem);

// ---- supported configurations ----

inline constexpr SizeLimit kWindowMixTokens{
    .name = "window_tokens", .max = kWindowMixMaxTokens, .otherwise = "a window of more than 1024 tokens"};

inline constexpr SupportedConfig kWindowMixConfigs[] = {
    {.op = "window_mix", .dtypes = kFloatTypes, .limits = {kWindowMixTokens}, .float_parameters = true},
    {.op = "window_mix_backward", .dtypes = kFloatTypes, .limits = {kWindowMixTokens}, .float_parameters = true},
};

}  // namespace warpform
