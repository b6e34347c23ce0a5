// Launch functions of the short convolution in front of a long one: pointers into device memory, sizes, and an opaque
// stream. They launch and return; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/supported.h"

namespace warpform {

// Convolutions of more taps have no kernel.
constexpr int64_t kShortConvMaxTaps = 4;

// c[b, ch, t] = bias[ch] + sum over j of weight[ch, j] x[b, t - (taps - 1) + j, ch], zeros before t = 0;
// gated = c[:, 2D:3D] c[:, 0:D], gate = c[:, D:2D]. All are of `dtype`.
struct ShortConvParams {
  const void* x;       // [batch, seqlen, 3, channels]
  const void* weight;  // [3 channels, taps]
  const void* bias;    // [3 channels] or null
  void* gated;         // [batch, channels, seqlen]
  void* gate;          // [batch, channels, seqlen]
  int64_t batch;
  int64_t seqlen;
  int64_t channels;
  int taps;  // 1 to kShortConvMaxTaps
  DType dtype;
};
void launch_short_conv_gate(const ShortConvParams& params, void* stream);

struct ShortConvBackwardParams {
  const void* dgated;  // [batch, channels, seqlen]
  const void* dgate;   // [batch, channels, seqlen]
  const void* x;       // [batch, seqlen, 3, channels]
  const void* weight;  // [3 channels, taps]
  const void* bias;    // [3 channels] or null
  void* dx;            // [batch, seqlen, 3, channels]
  void* dweight;       // [3 channels, taps]
  void* dbias;         // [3 channels]; not written without a bias
  float* partials;     // [groups, 3 channels, taps] and behind them, with a bias, [groups, 3 channels]: scratch
  int64_t groups;      // the result of short_conv_gate_backward_groups; the current device decides it
  int64_t batch;
  int64_t seqlen;
  int64_t channels;
  int taps;
  DType dtype;
};
int64_t short_conv_gate_backward_groups(const ShortConvBackwardParams& params);
void launch_short_conv_gate_backward(const ShortConvBackwardParams& params, void* stream);

// ---- supported configurations ----

inline constexpr SizeLimit kShortConvTaps{.name = "max_taps", .max = kShortConvMaxTaps, .as_number = true};

inline constexpr SupportedConfig kShortConvConfigs[] = {
    {.op = "short_conv_gate", .dtypes = kFloatTypes, .limits = {kShortConvTaps}},
    {.op = "short_conv_gate_backward", .dtypes = kFloatTypes, .limits = {kShortConvTaps}},
};

}  // namespace warpform
