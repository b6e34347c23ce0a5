// The stencil itself: a thread walks down the rows of its strip of a tile. Every row that it reads adds to the kSize
// rows of sums that it belongs to, so a value is loaded and made float32 once for each thread, and what is live is
// kSize rows of sums. The taps come from one of two sources: LearnedTaps (a filter for each channel) or MeanTaps
// (neighbours that count alike, whose columns are added up first).
#pragma once

#include "spatial/tile.cuh"

namespace warpform {

// Puts the filters of the tile's channels into shared memory as float32, [tap][channel of the tile]; flipped: the last
// tap first. Zeros for channels that do not exist.
template <class T, int kSize>
__device__ __forceinline__ void stage_taps(uint32_t taps, const void* weight, int channel, int64_t channels,
                                           bool flipped) {
  constexpr int kTaps = kSize * kSize, kChannels = SpatialElements<T>::kChannels;
  const T* from = static_cast<const T*>(weight) + int64_t{channel} * kTaps;
  for (int i = static_cast<int>(threadIdx.x); i < kChannels * kTaps; i += kSpatialThreads) {
    const int c = i / kTaps, tap = i % kTaps;
    const float value = channel + c < channels ? to_float(load_global(from + i)) : 0.f;
    store_shared(taps + ((flipped ? kTaps - 1 - tap : tap) * kChannels + c) * 4, value);
  }
}

template <class T, int kSize>
struct LearnedTaps {
  static constexpr int kPack = SpatialElements<T>::kPack;
  static constexpr int kTaps = kSize * kSize;
  static constexpr int kBytes = kTaps * SpatialElements<T>::kChannels * 4;  // staged
  static constexpr bool kInRegisters = kSize < 7;
  using Tap = Vec<float, kPack>;

  uint32_t staged;  // the thread's first tap
  Tap taps[kInRegisters ? kTaps : 1];
  float start[kPack];  // the bias
  bool finite;         // no lane of the warp has an infinity or NaN among its taps

  __device__ __forceinline__ explicit LearnedTaps(uint32_t all) : staged(all + lane_id() * kPack * 4), start{} {
    float zero = 0;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const Tap tap = load(t);
      if constexpr (kInRegisters) taps[t] = tap;
#pragma unroll
      for (int q = 0; q < kPack; ++q) zero += 0.f * tap[q];
    }
    finite = ballot(zero != 0.f) == 0;
  }
  __device__ __forceinline__ Tap load(int t) const {
    return load_shared<Tap>(staged + t * SpatialElements<T>::kChannels * 4);
  }
  __device__ __forceinline__ Tap tap(int t) const {
    if constexpr (kInRegisters) {
      return taps[t];
    } else {
      return load(t);
    }
  }

  // What a row of the tile is to all rows of sums.
  template <int kCols>
  __device__ __forceinline__ void prepare(float (&)[kCols][kPack], int) {}
  // Adds row `ky` of the stencil.
  template <int kCols>
  __device__ __forceinline__ void add(float (&sums)[kStrip][kPack], const float (&row)[kCols][kPack], int ky) const {
#pragma unroll
    for (int kx = 0; kx < kSize; ++kx) {
      const Tap factor = tap(ky * kSize + kx);
#pragma unroll
      for (int c = 0; c < kStrip; ++c) {
#pragma unroll
        for (int q = 0; q < kPack; ++q) sums[c][q] += factor[q] * row[c + kx][q];
      }
    }
  }
};

// How many of the kSize rows (or columns) around one exist; 1 beyond the grid.
template <int kSize>
__device__ __forceinline__ float neighbours(int row, int64_t rows) {
  const int last = static_cast<int>(min(int64_t{row} + kSize / 2, rows - 1));
  return static_cast<float>(max(last - max(row - kSize / 2, 0) + 1, 1));
}
// Its inverse; the test spares most rows the division.
template <int kSize>
__device__ __forceinline__ float inverse_neighbours(int row, int64_t rows) {
  const float count = neighbours<kSize>(row, rows);
  return count == kSize ? 1.f / kSize : 1.f / count;
}

// Sums over the neighbours of a position, of their distances to `shift`: what is large beside the differences of
// neighbours would cost their digits. With kTransposed each neighbour counts instead as one over the number of its own
// neighbours: the transpose of the mean. What is beyond the grid counts as 0.
template <class T, int kSize, bool kTransposed>
struct MeanTaps {
  static constexpr int kPack = SpatialElements<T>::kPack;
  static constexpr int kHalo = kSize / 2;
  static constexpr int kCols = kStrip + 2 * kHalo;

  float columns[kCols];  // the weights or shifts of the columns that the thread reads
  int first_row;         // of the tile with its halo
  int64_t height;
  float across[kStrip][kPack];  // sums along the row at hand
  float start[kPack] = {};

  __device__ __forceinline__ MeanTaps(const TileOrigin& at, const SpatialShape& shape, float shift)
      : first_row(at.row - kHalo), height(shape.height) {
    const int first = at.col + SpatialThread<T>().strip - kHalo;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      columns[c] = kTransposed ? inverse_neighbours<kSize>(first + c, shape.width)
                               : (exists(first + c, shape.width) ? shift : 0.f);
    }
  }

  __device__ __forceinline__ void prepare(float (&row)[kCols][kPack], int r) {
    const float weight = kTransposed ? inverse_neighbours<kSize>(first_row + r, height) : 0.f;
    const bool inside = exists(first_row + r, height);
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const float column = kTransposed ? columns[c] * weight : (inside ? columns[c] : 0.f);
#pragma unroll
      for (int q = 0; q < kPack; ++q) row[c][q] = kTransposed ? row[c][q] * column : row[c][q] - column;
    }
#pragma unroll
    for (int q = 0; q < kPack; ++q) {
#pragma unroll
      for (int c = 0; c < kStrip; ++c) {
        across[c][q] = row[c][q];
#pragma unroll
        for (int kx = 1; kx < kSize; ++kx) across[c][q] += row[c + kx][q];
      }
    }
  }
  __device__ __forceinline__ void add(float (&sums)[kStrip][kPack], const float (&)[kCols][kPack], int) const {
#pragma unroll
    for (int c = 0; c < kStrip; ++c) {
#pragma unroll
      for (int q = 0; q < kPack; ++q) sums[c][q] += across[c][q];
    }
  }
};

// Calls emit(r, sums, centre) for every row r of the tile: the stencil's sums at the thread's columns, and the values
// there; until it returns false. Calls read(row, values) for every row of the tile with its halo before.
template <class T, int kSize, class Taps, class Read, class Emit>
__device__ __forceinline__ void slide(uint32_t tile, Taps& taps, const Read& read, const Emit& emit) {
  constexpr int kHalo = kSize / 2, kCols = kStrip + 2 * kHalo, kRows = kTileRows + 2 * kHalo;
  constexpr int kPack = SpatialElements<T>::kPack;
  const SpatialThread<T> me;
  float sums[kTileRows][kStrip][kPack];  // kSize rows are live at a time
  Vec<T, kPack> centres[kTileRows][kStrip];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float row[kCols][kPack];
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const auto word = me.template word<kHalo>(tile, i, c);
#pragma unroll
      for (int q = 0; q < kPack; ++q) row[c][q] = to_float(word[q]);
      if (i >= kHalo && i < kHalo + kTileRows && c >= kHalo && c < kHalo + kStrip) centres[i - kHalo][c - kHalo] = word;
    }
    read(i, row);
    taps.prepare(row, i);
#pragma unroll
    for (int ky = 0; ky < kSize; ++ky) {
      const int r = i - ky;
      if (r < 0 || r >= kTileRows) continue;
      if (ky == 0) {
#pragma unroll
        for (int c = 0; c < kStrip; ++c) {
#pragma unroll
          for (int q = 0; q < kPack; ++q) sums[r][c][q] = taps.start[q];
        }
      }
      taps.add(sums[r], row, ky);
    }
    if (i >= 2 * kHalo) {
      if (!emit(i - 2 * kHalo, sums[i - 2 * kHalo], centres[i - 2 * kHalo])) return;
    }
  }
}

// The same sums for taps of which some are not finite: positions beyond the grid are left out, as zero times infinity
// is NaN. In the same order of additions, so that other channels keep their bits.
template <class T, int kSize, class Emit>
__device__ __forceinline__ void slide_checked(uint32_t tile, const LearnedTaps<T, kSize>& taps, const TileOrigin& at,
                                              const SpatialShape& shape, const Emit& emit) {
  constexpr int kHalo = kSize / 2, kPack = SpatialElements<T>::kPack;
  const SpatialThread<T> me;
#pragma unroll 1
  for (int r = 0; r < kTileRows; ++r) {
    float sums[kStrip][kPack];
#pragma unroll
    for (int c = 0; c < kStrip; ++c) {
#pragma unroll
      for (int q = 0; q < kPack; ++q) sums[c][q] = taps.start[q];
#pragma unroll 1
      for (int t = 0; t < kSize * kSize; ++t) {
        const int y = t / kSize, x = t % kSize;
        if (!exists(at.row + r + y - kHalo, shape.height)) continue;
        if (!exists(at.col + me.strip + c + x - kHalo, shape.width)) continue;
        const auto word = me.template word<kHalo>(tile, r + y, c + x);
        const auto factor = taps.load(t);
#pragma unroll
        for (int q = 0; q < kPack; ++q) sums[c][q] += factor[q] * to_float(word[q]);
      }
    }
    if (!emit(r, sums)) return;
  }
}

}  // namespace warpform
