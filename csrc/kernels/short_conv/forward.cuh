// short_conv_gate: x [batch, seqlen, 3 channels], as a projection gives it, becomes the operands of a long convolution,
// [batch, channels, seqlen]: a causal depthwise convolution of up to 4 taps, then gated = third part * first part and
// gate = second part. It is the short filter of Monarch Mixer and Hyena with the transposition that they need anyway.
//
// Tile: see tile.cuh. 256 threads copy it in by cp.async, 16 bytes each along channels; a thread convolves two channels
// (float32: one) at 8 (4) neighbouring times out of shared memory and stores 16 bytes along time. Where seqlen is not a
// multiple of 16 bytes, warps pass their results through shared memory and store elements, 32 neighbours at once.
//
// Bytes a channel and time, in elements: 3 read and 2 written (and 3 / 64 of halo, which the L2 has). Made of PyTorch's
// operations it is 15: transposed copy 3 + 3, convolution 3 + 3, product 2 + 1; the strided gate costs its reader more.
// At batch 64, seqlen 4096, 768 channels in bfloat16 that is 2.0 GB: 0.47 ms at an H200's 4.3 TB/s, against 1.4 ms.
// 19 FLOP and some 50 instructions for 10 bytes, where the card has time for 69: bytes bound it.
// Measured: not yet.
#pragma once

#include "short_conv/tile.cuh"

namespace warpform {

template <class T, int kTaps>
struct ShortConvForward : ShortConvTile<T, kTaps> {
  using Tile = ShortConvTile<T, kTaps>;
  static constexpr int kBlocksPerSm = kTaps == 3 ? 4 : 3;
  static constexpr int kRows = Tile::kTileTimes + Tile::kHalo;
  static constexpr int kWords = Tile::kTimes + Tile::kHalo;  // rows that a thread reads
  static constexpr int kRowBytes = 3 * kRows * Tile::kPieces * 16;
  // A warp's results on their way to unaligned rows: its channels by the tile's times, and 16 bytes against conflicts.
  static constexpr int kStageRow = Tile::kPieces * 16 + 16;
  static constexpr int kStageBytes = Tile::kVec * kStageRow;

  static int shared_bytes(bool vector_times) {
    return kRowBytes + Tile::kParameterBytes + (vector_times ? 0 : kShortConvWarps * kStageBytes);
  }
};

// Stores a thread's values of channel h, kTimes from `time` on; `out` is [batch, channels, seqlen].
template <class Kernel, class T, int kTimes, int kPack>
__device__ __forceinline__ void store_times(T* out, const float (&v)[kPack][kTimes], const ShortConvOrigin& at,
                                            int64_t seqlen, int64_t channels, bool vector_times, uint32_t stage) {
  using Tile = typename Kernel::Tile;
  const ShortConvThread<Tile> me;
  if (vector_times) {
    // Counted in vectors: the compiler makes one store of 16 bytes only where it sees their alignment.
    Vec<T, kTimes>* vectors = reinterpret_cast<Vec<T, kTimes>*>(out);
    const int64_t row_vectors = seqlen / kTimes, vector = at.time / kTimes + me.vector;
#pragma unroll
    for (int h = 0; h < kPack; ++h) {
      const int64_t channel = at.channel + me.channel() + h;
      if (channel >= channels || vector >= row_vectors) continue;
      store_floats(reinterpret_cast<T*>(vectors + (at.batch * channels + channel) * row_vectors + vector), v[h]);
    }
    return;
  }
  stage += me.piece * Kernel::kStageBytes;
#pragma unroll
  for (int h = 0; h < kPack; ++h) {
    Vec<T, kTimes> packed;
#pragma unroll
    for (int s = 0; s < kTimes; ++s) packed[s] = from_float<T>(v[h][s]);
    store_shared(stage + (me.word * kPack + h) * Kernel::kStageRow + me.vector * 16, packed);
  }
  warp_sync();
#pragma unroll 1
  for (int c = 0; c < Tile::kVec; ++c) {
    const int64_t channel = at.channel + me.piece * Tile::kVec + c;
    if (channel >= channels) break;
#pragma unroll
    for (int s = lane_id(); s < Tile::kTileTimes; s += kWarpSize) {
      const T value = load_shared<T>(stage + c * Kernel::kStageRow + s * static_cast<int>(sizeof(T)));
      if (at.time + s < seqlen) store_global(out + (at.batch * channels + channel) * seqlen + at.time + s, value);
    }
  }
  warp_sync();
}

// Part `part` of the convolution at a thread's channels and times.
template <class Kernel, class T, int kPack, int kTimes>
__device__ __forceinline__ void convolve_part(float (&c)[kPack][kTimes], int part, uint32_t rows, uint32_t filters,
                                              int taps) {
  using Tile = typename Kernel::Tile;
  const ShortConvThread<Tile> me;
  Vec<T, kPack> words[Kernel::kWords];
  load_words<Tile, Kernel::kRows>(words, rows, part, me);
#pragma unroll
  for (int h = 0; h < kPack; ++h) {
    convolve<Tile, T>(c[h], words, h, load_filter<Tile>(filters, part, me.channel() + h), taps);
  }
}

template <class T, int kTaps>
__global__ void __launch_bounds__(kShortConvThreads, ShortConvForward<T, kTaps>::kBlocksPerSm) short_conv_gate_kernel(
    const ShortConvLaunch<ShortConvParams> params) {
  using Kernel = ShortConvForward<T, kTaps>;
  using Tile = typename Kernel::Tile;
  constexpr int kRows = Kernel::kRows, kTimes = Tile::kTimes, kPack = Tile::kPack;
  const ShortConvParams& p = params.p;
  // Tiles of channels first: neighbouring blocks read neighbouring parts of the same rows.
  const unsigned channel_tiles = static_cast<unsigned>(params.tiles.channels);
  const ShortConvOrigin at{int64_t{blockIdx.z} * gridDim.y + blockIdx.y,
                           int64_t{blockIdx.x / channel_tiles} * Tile::kTileTimes,
                           int64_t{blockIdx.x % channel_tiles} * Tile::kChannels};
  if (at.batch >= p.batch) return;

  const uint32_t rows = shared_base();
  const uint32_t filters = rows + Kernel::kRowBytes;
  const uint32_t stage = filters + Tile::kParameterBytes;
  copy_rows<Tile, kRows>(rows, static_cast<const T*>(p.x), at, p.seqlen, p.channels, params.tiles.vector_channels);
  cp_async_commit();
  stage_filters<Tile, T>(filters, p, at.channel);
  cp_async_wait<0>();
  block_sync();

  const auto store = [&](void* out, const float (&v)[kPack][kTimes]) {
    store_times<Kernel>(static_cast<T*>(out), v, at, p.seqlen, p.channels, params.tiles.vector_times, stage);
  };
  float gated[kPack][kTimes], other[kPack][kTimes];
  convolve_part<Kernel, T>(gated, 0, rows, filters, p.taps);
  convolve_part<Kernel, T>(other, 2, rows, filters, p.taps);
#pragma unroll
  for (int h = 0; h < kPack; ++h) {
#pragma unroll
    for (int s = 0; s < kTimes; ++s) gated[h][s] *= other[h][s];
  }
  store(p.gated, gated);
  convolve_part<Kernel, T>(other, 1, rows, filters, p.taps);
  store(p.gate, other);
}

}  // namespace warpform
