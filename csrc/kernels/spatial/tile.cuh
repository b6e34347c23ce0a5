// Shared by the stencils on grids of tokens: tiles of x [batch, height, width, channels] in shared memory, and which
// part of a tile a thread owns.
//
// A tile is 8 by 16 positions by 128 bytes of channels (64 in 16-bit types, 32 in float32), with the rows and columns
// around it that the stencil reaches. A position is 128 bytes of shared memory, as it is 128 neighbouring bytes of a
// row of x. A block is four warps; each owns four of the sixteen columns, and its lane l the l-th 4 bytes of channels
// (two of them, or one float32): what a warp reads and writes is always 128 bytes, without bank conflicts, and which
// rows and columns of the grid exist is the same for all its lanes.
#pragma once

#include "common/divisor.h"
#include "common/elements.cuh"
#include "device/ptx.cuh"
#include "spatial/launch.h"

namespace warpform {

constexpr int kSpatialWarps = 4;
constexpr int kSpatialThreads = kSpatialWarps * kWarpSize;
constexpr int kTileRows = 8;
constexpr int kTileCols = 16;
constexpr int kStrip = kTileCols / kSpatialWarps;  // columns of a warp
constexpr int kPositionBytes = 128;
constexpr int kPieces = kPositionBytes / 16;

// The tiles into which the launch has cut a tensor. Neighbouring tiles of channels are neighbours: they read
// neighbouring parts of the same rows.
struct SpatialTiles {
  Divisor channels;  // tiles of channels
  Divisor cols;      // tiles along the width
  Divisor rows;      // tiles along the height
  bool vectors;      // every tensor may be accessed 16 bytes at a time
};

template <class Params>
struct SpatialLaunch {
  Params p;
  SpatialTiles tiles;
};

template <class T>
struct SpatialElements {
  static constexpr int kVec = kWideVec<T>;                       // channels of 16 bytes
  static constexpr int kPack = 4 / static_cast<int>(sizeof(T));  // channels of a thread
  static constexpr int kChannels = kWarpSize * kPack;            // of a tile
};

// The first element of a tile, halo not counted.
struct TileOrigin {
  int batch;
  int row;
  int col;
  int channel;

  // The tile's place in a tensor of this shape.
  __device__ int64_t offset(const SpatialShape& shape) const {
    return ((int64_t{batch} * shape.height + row) * shape.width + col) * shape.channels + channel;
  }
};

// Tile `index` of the tiles of positions, in the order columns, rows, samples.
template <class T>
__device__ __forceinline__ TileOrigin origin_of(const SpatialTiles& tiles, int index, int channel_tile) {
  const int row = tiles.cols.quotient(index), batch = tiles.rows.quotient(row);
  return {batch, (row - batch * tiles.rows.divisor) * kTileRows, (index - row * tiles.cols.divisor) * kTileCols,
          channel_tile * SpatialElements<T>::kChannels};
}

// The tile of a block that works on one.
template <class T>
__device__ __forceinline__ TileOrigin origin_of_block(const SpatialTiles& tiles) {
  const int block = static_cast<int>(blockIdx.x), index = tiles.channels.quotient(block);
  return origin_of<T>(tiles, index, block - index * tiles.channels.divisor);
}

// A tile with kHalo rows and columns around it.
template <int kHalo>
struct HaloTile {
  static constexpr int kRows = kTileRows + 2 * kHalo;
  static constexpr int kCols = kTileCols + 2 * kHalo;
  static constexpr int kBytes = kRows * kCols * kPositionBytes;

  static constexpr __device__ int position(int row, int col) { return (row * kCols + col) * kPositionBytes; }
};

// True if a row (or column) of a grid of that many exists.
__device__ __forceinline__ bool exists(int row, int64_t rows) { return row >= 0 && row < rows; }

// Copies a tile and its halo by cp.async, or, without vectors, element by element; zeros where there is no element.
template <int kHalo, class T>
__device__ __forceinline__ void copy_tile(uint32_t to, const T* x, const TileOrigin& at, const SpatialShape& shape,
                                          bool vectors) {
  using Tile = HaloTile<kHalo>;
  using Elements = SpatialElements<T>;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row_step = shape.width * shape.channels;
  const int64_t corner = at.offset(shape) - kHalo * row_step - kHalo * shape.channels;  // an element that may not exist
  if (vectors) {
    const int piece = thread % kPieces, column = thread / kPieces;
    static_assert(kSpatialThreads / kPieces == kTileCols, "the block copies the columns of a row at once");
    const bool has_channels = at.channel + piece * Elements::kVec < shape.channels;
    const bool has_column = has_channels && at.col + column < shape.width;
    const int64_t first = corner + piece * Elements::kVec;
    const T* from = x + first + (column + kHalo) * shape.channels;
    to += piece * 16;
#pragma unroll
    for (int row = 0; row < Tile::kRows; ++row) {
      const bool valid = has_column && exists(at.row - kHalo + row, shape.height);
      cp_async_16(to + Tile::position(row, column + kHalo), valid ? from : x, valid);
      from += row_step;
    }
    if constexpr (kHalo > 0) {
      constexpr int kSides = 2 * kHalo, kPositions = Tile::kRows * kSides;
#pragma unroll
      for (int i = 0; i < ceil_div(kPositions, kTileCols); ++i) {
        const int position = column + i * kTileCols, row = position / kSides, side = position % kSides;
        if (position >= kPositions) break;
        const int col = side < kHalo ? side : kTileCols + side;
        const bool valid =
            has_channels && exists(at.row - kHalo + row, shape.height) && exists(at.col - kHalo + col, shape.width);
        cp_async_16(to + Tile::position(row, col), valid ? x + first + row * row_step + col * shape.channels : x,
                    valid);
      }
    }
    return;
  }
  constexpr int kStep = kSpatialThreads / Elements::kChannels;
  constexpr int kBatch = 4;  // loads in flight
  constexpr int kPositions = Tile::kRows * Tile::kCols;
  const int c = thread % Elements::kChannels;
  const bool has_channel = at.channel + c < shape.channels;
#pragma unroll 1
  for (int first = thread / Elements::kChannels; first < kPositions; first += kBatch * kStep) {
    T v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int position = first + i * kStep, row = position / Tile::kCols, col = position % Tile::kCols;
      const bool valid = has_channel && position < kPositions && exists(at.row - kHalo + row, shape.height) &&
                         exists(at.col - kHalo + col, shape.width);
      v[i] = valid ? load_global(x + corner + row * row_step + col * shape.channels + c) : from_float<T>(0);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int position = first + i * kStep;
      if (position >= kPositions) break;
      store_shared(to + position * kPositionBytes + c * static_cast<int>(sizeof(T)), v[i]);
    }
  }
}

// Makes what the block has copied visible to all of it.
__device__ __forceinline__ void wait_for_tiles() {
  cp_async_commit();
  cp_async_wait<0>();
  block_sync();
}

// The part of a tile that a thread owns: kPack channels at kStrip columns of every row.
template <class T>
struct SpatialThread {
  static constexpr int kPack = SpatialElements<T>::kPack;
  using Word = Vec<T, kPack>;

  int strip = warp_id() * kStrip;  // its first column in the tile
  int lane = lane_id();

  __device__ int channel(const TileOrigin& at) const { return at.channel + lane * kPack; }

  // The thread's word at a position of a tile with a halo; `col` counts from its first column.
  template <int kHalo>
  __device__ Word word(uint32_t tile, int row, int col) const {
    return load_shared<Word>(tile + HaloTile<kHalo>::position(row, strip + col) + lane * 4);
  }
};

// The thread's elements at its first column of the tile's first row.
template <class T>
__device__ __forceinline__ int64_t offset_of_thread(const TileOrigin& at, const SpatialShape& shape) {
  const SpatialThread<T> me;
  return at.offset(shape) + me.strip * shape.channels + me.lane * SpatialThread<T>::kPack;
}

// Stores the thread's values at its columns of one row; `to` is that of the first column.
template <class T, int kPack>
__device__ __forceinline__ void store_strip(T* to, const float (&v)[kStrip][kPack], const TileOrigin& at,
                                            const SpatialShape& shape, bool vectors) {
  const SpatialThread<T> me;
  const int64_t channels = shape.channels - me.channel(at), cols = shape.width - at.col - me.strip;
#pragma unroll
  for (int c = 0; c < kStrip; ++c) {
    if (c >= cols || channels <= 0) break;
    if (vectors) {
      store_floats(to, v[c]);
    } else {
#pragma unroll
      for (int q = 0; q < kPack; ++q) {
        if (q < channels) store_global(to + q, from_float<T>(v[c][q]));
      }
    }
    to += shape.channels;
  }
}

}  // namespace warpform
