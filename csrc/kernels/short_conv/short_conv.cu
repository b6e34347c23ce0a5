#include <algorithm>

#include "common/column_sum.h"
#include "device/launch.cuh"
#include "short_conv/backward.cuh"
#include "short_conv/forward.cuh"

namespace warpform {
namespace {

template <class T, int kTaps>
void run(const ShortConvLaunch<ShortConvParams>& params, void* stream) {
  constexpr int64_t kMostRows = 65535;
  const dim3 grid(static_cast<unsigned>(params.tiles.times * params.tiles.channels),
                  static_cast<unsigned>(std::min(params.p.batch, kMostRows)),
                  static_cast<unsigned>(ceil_div(params.p.batch, kMostRows)));
  launch<short_conv_gate_kernel<T, kTaps>>("short_conv_gate", grid, kShortConvThreads,
                                           ShortConvForward<T, kTaps>::shared_bytes(params.tiles.vector_times), stream,
                                           params);
}

template <class T, int kTaps>
void run(const ShortConvLaunch<ShortConvBackwardParams>& params, void* stream) {
  launch<short_conv_gate_backward_kernel<T, kTaps>>(
      "short_conv_gate_backward", static_cast<unsigned>(params.p.groups * params.tiles.channels), kShortConvThreads,
      ShortConvBackward<T, kTaps>::kSharedBytes, stream, params);
}

// Three taps are what models have; a kernel of four takes any other number.
template <class Params>
constexpr void (*kRuns[3][2])(const ShortConvLaunch<Params>&, void*) = {
    {run<float, 3>, run<float, 4>},
    {run<half_t, 3>, run<half_t, 4>},
    {run<bf16_t, 3>, run<bf16_t, 4>},
};

template <class Params>
void run_tiles(const ShortConvLaunch<Params>& params, void* stream) {
  kRuns<Params>[static_cast<int>(params.p.dtype)][params.p.taps != 3](params, stream);
}

// `along_channels` and `along_time`: whether the tensors of either layout begin at a multiple of 16 bytes.
template <class Params>
ShortConvTiles tiles_of(const Params& p, bool along_channels, bool along_time) {
  const bool wide = p.dtype == DType::kFloat32;
  const int64_t vec = wide ? kWideVec<float> : kWideVec<half_t>;
  const int64_t times = wide ? ShortConvTile<float, 3>::kTileTimes : ShortConvTile<half_t, 3>::kTileTimes;
  const int64_t channels = wide ? ShortConvTile<float, 3>::kChannels : ShortConvTile<half_t, 3>::kChannels;
  return {.times = ceil_div(p.seqlen, times),
          .channels = ceil_div(p.channels, channels),
          .vector_channels = along_channels && p.channels % vec == 0,
          .vector_times = along_time && p.seqlen % vec == 0};
}
ShortConvTiles tiles_of(const ShortConvParams& p) {
  return tiles_of(p, all_aligned(p.x), all_aligned(p.gated, p.gate));
}
ShortConvTiles tiles_of(const ShortConvBackwardParams& p) {
  return tiles_of(p, all_aligned(p.x, p.dx), all_aligned(p.dgated, p.dgate));
}

}  // namespace

void launch_short_conv_gate(const ShortConvParams& p, void* stream) {
  if (p.batch == 0 || p.seqlen == 0 || p.channels == 0) return;
  run_tiles<ShortConvParams>({p, tiles_of(p)}, stream);
}

int64_t short_conv_gate_backward_groups(const ShortConvBackwardParams& p) {
  if (p.batch == 0 || p.seqlen == 0 || p.channels == 0) return 0;
  // Enough blocks to fill the GPU once, each with as many tiles as possible: few partial sums.
  const ShortConvTiles tiles = tiles_of(p);
  constexpr int64_t kBlocksPerSm = ShortConvBackward<half_t, 3>::kBlocksPerSm;
  return std::clamp<int64_t>(kBlocksPerSm * sm_count() / tiles.channels, 1, p.batch * tiles.times);
}

void launch_short_conv_gate_backward(const ShortConvBackwardParams& p, void* stream) {
  if (p.channels == 0) return;
  if (p.groups > 0) run_tiles<ShortConvBackwardParams>({p, tiles_of(p)}, stream);
  const int64_t rows = 3 * p.channels;
  const auto add_up = [&](const float* partials, void* out, int64_t cols) {
    launch_column_sum(
        "short_conv_gate_backward",
        {.partials = partials, .out = {out}, .sums = 1, .groups = p.groups, .cols = cols, .dtype = p.dtype}, stream);
  };
  add_up(p.partials, p.dweight, rows * p.taps);
  if (p.bias != nullptr) add_up(p.partials + p.groups * rows * p.taps, p.dbias, rows);
}

}  // namespace warpform
