// Shared by the short convolution's kernels: the tile of x in shared memory, and its parameters beside it.
//
// A tile is 128 bytes of channels by 8 vectors of 16 bytes of times (64 by 64 in 16-bit types, 32 by 32 in float32), of
// all three parts of x, with the rows before it (and, backward, behind it) that a convolution of kTaps taps reads.
// x comes with channels last, 128 bytes a row and part; gated and gate are [.., seqlen], 128 bytes a channel. In
// between warp w owns the w-th 16 bytes of channels at all times, and its lane l the word l % 4 of them (two channels,
// or one float32) at the kTimes times of vector l / 4. So what a thread reads and writes along time is one 16-byte
// vector a channel. The 16-byte pieces of a row are permuted by its vector of times, which makes rows 8 vectors apart
// fall into different banks: neither the copy in nor the reading along time meets a conflict.
#pragma once

#include "common/elements.cuh"
#include "device/ptx.cuh"
#include "short_conv/launch.h"

namespace warpform {

constexpr int kShortConvWarps = 8;
constexpr int kShortConvThreads = kShortConvWarps * kWarpSize;

// The tiles into which the launch has cut the tensors, and the tensors that may be accessed 16 bytes at a time.
struct ShortConvTiles {
  int64_t times;         // tiles along time of a sequence
  int64_t channels;      // tiles of channels
  bool vector_channels;  // x and dx
  bool vector_times;     // gated, gate and their gradients
};

template <class Params>
struct ShortConvLaunch {
  Params p;
  ShortConvTiles tiles;
};

template <class T, int kTaps_>
struct ShortConvTile {
  static constexpr int kTaps = kTaps_;                              // or fewer, if it is not 3
  static constexpr int kPieces = 8;                                 // of 16 bytes in a row, and vectors along time
  static constexpr int kVec = 16 / static_cast<int>(sizeof(T));     // channels of a piece
  static constexpr int kPack = 4 / static_cast<int>(sizeof(T));     // channels of a thread
  static constexpr int kTimes = kVec;                               // times of a thread
  static constexpr int kChannels = kPieces * kVec;                  // of a tile
  static constexpr int kTileTimes = kPieces * kTimes;               // of a tile
  static constexpr int kHalo = kTaps - 1;                           // rows before or behind a tile
  static constexpr int kParameterBytes = 3 * kChannels * (16 + 4);  // taps, then biases
  static_assert(kPieces == kShortConvWarps, "a warp owns a piece of every row");

  // Byte of a row's word in a buffer of kRows rows a part.
  template <int kRows>
  static __device__ __forceinline__ int offset(int part, unsigned row, unsigned piece) {
    return static_cast<int>(((part * kRows + row) * kPieces + (piece ^ (row / kTimes % kPieces))) * 16);
  }
};

// The first element of a tile.
struct ShortConvOrigin {
  int64_t batch;
  int64_t time;     // its first time, halo not counted
  int64_t channel;  // its first channel
};

// Copies kRows rows of x from origin.time - kHalo on, in all three parts; zeros beyond the sequence and the channels.
template <class Tile, int kRows, class T>
__device__ __forceinline__ void copy_rows(uint32_t rows, const T* x, const ShortConvOrigin& at, int64_t seqlen,
                                          int64_t channels, bool vector_channels) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t before = at.time - Tile::kHalo;
  const int first = before < 0 ? static_cast<int>(-before) : 0;  // rows that exist: first to end
  const int end = static_cast<int>(min(seqlen - before, int64_t{kRows}));
  const T* from = x + ((at.batch * seqlen + before) * 3) * channels + at.channel;
  if (vector_channels) {
    const int piece = thread % Tile::kPieces;
    const bool exists = at.channel + piece * Tile::kVec < channels;
    from += piece * Tile::kVec;
#pragma unroll
    for (int i = 0; i < ceil_div(kRows * Tile::kPieces, kShortConvThreads); ++i) {
      const int row = thread / Tile::kPieces + i * (kShortConvThreads / Tile::kPieces);
      if (row >= kRows) break;
      const bool valid = exists && row >= first && row < end;
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        const T* source = valid ? from + (int64_t{3} * row + part) * channels : x;
        cp_async_16(rows + Tile::template offset<kRows>(part, row, piece), source, valid);
      }
    }
    return;
  }
  const int c = thread % Tile::kChannels;
  const bool exists = at.channel + c < channels;
  const int byte = c % Tile::kVec * static_cast<int>(sizeof(T));
  constexpr int kStep = kShortConvThreads / Tile::kChannels,
                kBatch = 4;  // rows of the block at once; loads in flight
  for (int row = thread / Tile::kChannels; row < kRows; row += kBatch * kStep) {
    T v[kBatch][3];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int r = row + k * kStep;
      const bool valid = exists && r >= first && r < end;
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        v[k][part] = valid ? load_global(from + (int64_t{3} * r + part) * channels + c) : from_float<T>(0);
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int r = row + k * kStep;
      if (r >= kRows) break;
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        store_shared(rows + Tile::template offset<kRows>(part, r, c / Tile::kVec) + byte, v[k][part]);
      }
    }
  }
}

// A channel's filter: tap i is the factor of x[t - i].
struct ShortConvFilter {
  Vec<float, 4> taps;
  float bias;
};

// Puts the filters of the tile's channels into shared memory as float32, the last tap first; zeros where there is none.
template <class Tile, class T, class Params>
__device__ __forceinline__ void stage_filters(uint32_t filters, const Params& p, int64_t first_channel) {
  for (int i = static_cast<int>(threadIdx.x); i < 3 * Tile::kChannels; i += kShortConvThreads) {
    const int part = i / Tile::kChannels;
    const int64_t channel = first_channel + i % Tile::kChannels;
    const int64_t row = part * p.channels + channel;
    const bool exists = channel < p.channels;
    Vec<float, 4> taps;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool has = exists && k < p.taps;
      taps[k] = has ? to_float(load_global(static_cast<const T*>(p.weight) + row * p.taps + (p.taps - 1 - k))) : 0;
    }
    const float bias = exists && p.bias != nullptr ? to_float(load_global(static_cast<const T*>(p.bias) + row)) : 0;
    store_shared(filters + i * 16, taps);
    store_shared(filters + 3 * Tile::kChannels * 16 + i * 4, bias);
  }
}

template <class Tile>
__device__ __forceinline__ ShortConvFilter load_filter(uint32_t filters, int part, int channel) {
  const int i = part * Tile::kChannels + channel;
  return {load_shared<Vec<float, 4>>(filters + i * 16), load_shared<float>(filters + 3 * Tile::kChannels * 16 + i * 4)};
}

// The part of a tile that a thread owns.
template <class Tile>
struct ShortConvThread {
  int piece = warp_id();
  int word = lane_id() % 4;
  int vector = lane_id() / 4;

  __device__ int time() const { return vector * Tile::kTimes; }
  __device__ int channel() const { return piece * Tile::kVec + word * Tile::kPack; }
};

// The word of a thread kN rows from its first time's halo on.
template <class Tile, int kRows, class T, int kN>
__device__ __forceinline__ void load_words(Vec<T, Tile::kPack> (&words)[kN], uint32_t rows, int part,
                                           const ShortConvThread<Tile>& me) {
#pragma unroll
  for (int r = 0; r < kN; ++r) {
    const int at = Tile::template offset<kRows>(part, me.time() + r, me.piece) + me.word * 4;
    words[r] = load_shared<Vec<T, Tile::kPack>>(rows + at);
  }
}

// The convolution at kN times from words of kN + kHalo rows, channel h of them. A tap that the filter does not have is
// left out: it must not meet an infinity.
template <class Tile, class T, int kWords, int kN>
__device__ __forceinline__ void convolve(float (&c)[kN], const Vec<T, Tile::kPack> (&words)[kWords], int h,
                                         const ShortConvFilter& filter, int taps) {
  static_assert(kWords >= kN + Tile::kHalo);
#pragma unroll
  for (int s = 0; s < kN; ++s) c[s] = filter.bias;
#pragma unroll
  for (int i = Tile::kTaps - 1; i >= 0; --i) {
    if (Tile::kTaps == 3 || i < taps) {
#pragma unroll
      for (int s = 0; s < kN; ++s) c[s] += filter.taps[i] * to_float(words[s + Tile::kHalo - i][h]);
    }
  }
}

}  // namespace warpform
