// Window mixing as one product: Y = W X, where W [n, n] is the weight and X has a row for each of the n places of a
// window and a column for each channel of each window. Nothing is partitioned in memory: a place is an offset that all
// windows share, a window a first token.
//
// X is cut into tiles of 64 columns, which are chunks of 16 bytes of a token each. Neighbouring chunks are those of a
// token and then those of the next window, so that windows of 32 channels share a tile and none is filled up by zeros.
// kLanes neighbouring lanes share a row of a tile, and a lane has two chunks of it, kLanes apart: the same columns in
// every load and in every result.
//
// Products are made by mma.sync of 16-bit elements, or by FMA of float32 from the same tiles. Both are the three of
// MixProduct; a warp's or a thread's results are visited row by row.
#pragma once

#include <type_traits>

#include "common/elements.cuh"
#include "device/block_tile.cuh"
#include "window_mix/launch.h"

namespace warpform {

constexpr int kMixRows = 64;  // places that a CTA works on at a time
constexpr int kMixCols = 64;  // columns of a tile
constexpr int kMixThreads = 128;

// 64 columns of float32. 16-byte chunk c of row r lies at chunk c ^ (r ^ r / 4) % 8: the rows that the lanes of a warp
// read at one column, neighbours or every fourth one, lie in different groups of four banks.
struct FloatTile {
  uint32_t base;

  __device__ __forceinline__ uint32_t chunk(int row, int c) const {
    return base + row * (kMixCols * 4) + ((c ^ ((row ^ (row >> 2)) & 7)) << 4);
  }
  __device__ __forceinline__ uint32_t element(int row, int col) const { return chunk(row, col / 4) + (col % 4) * 4; }
};

template <class T>
struct MixShape {
  static constexpr int kVec = kWideVec<T>;                  // elements of a chunk
  static constexpr int kChunks = kMixCols / kVec;           // of a tile's row
  static constexpr int kLanes = kChunks / 2;                // that share a row
  static constexpr int kRowsAtOnce = kMixThreads / kLanes;  // of a load by all threads
  static constexpr int kPasses = kMixRows / kRowsAtOnce;
  static constexpr int kTileBytes = kMixRows * kMixCols * static_cast<int>(sizeof(T));
  static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;  // tiles of the weight: float32 leaves room for two
  using Tile = std::conditional_t<sizeof(T) == 2, SharedTile<kMixCols>, FloatTile>;

  __device__ static __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  __device__ static __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kLanes; }
  // The same for loads: places and addresses that follow from it are computed at each, instead of being held in
  // registers through the loops around.
  __device__ static __forceinline__ int load_row() { return static_cast<int>(opaque(static_cast<uint32_t>(row()))); }
};

// ---- which element is where ----

// A chunk of the window whose first token is `token`: channels from `channel` on, of which `count` exist; 0 past the
// last window.
struct MixColumn {
  int64_t token;
  int channel;
  int count;
};

template <class T>
__device__ __forceinline__ MixColumn mix_column(const WindowMixProblem& p, int chunk) {
  const int window = p.chunks.quotient(chunk);
  const int rest = p.count[1].quotient(window), x = window - rest * p.count[1].divisor;
  const int image = p.count[0].quotient(rest), y = rest - image * p.count[0].divisor;
  MixColumn column;
  column.token = image * p.image_tokens + y * p.window_step[0] + x * p.window_step[1];
  column.channel = (chunk - window * p.chunks.divisor) * MixShape<T>::kVec;
  column.count = window < p.windows ? min(MixShape<T>::kVec, p.channels - column.channel) : 0;
  return column;
}

// The calling lane's columns of a tile.
template <class T>
struct MixColumns {
  MixColumn column[2];

  __device__ __forceinline__ MixColumns(const WindowMixProblem& p, int tile) {
    using Shape = MixShape<T>;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      column[h] = mix_column<T>(p, tile * Shape::kChunks + h * Shape::kLanes + Shape::lane());
    }
  }
  __device__ __forceinline__ const MixColumn& operator[](int h) const { return column[h]; }
};

// From a window's first token to the one at a place.
__device__ __forceinline__ int64_t place_offset(const WindowMixProblem& p, int place) {
  const int y = p.window_width.quotient(place);
  return y * p.place_step[0] + (place - y * p.window_width.divisor) * p.place_step[1];
}

// ---- chunks ----

template <class T>
using Chunk = Vec<T, MixShape<T>::kVec>;

// `count` elements, zeros behind them. With `vectors` a chunk is whole and aligned, or empty.
template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* from, int count, bool vectors) {
  Chunk<T> chunk{};
  if (vectors) {
    if (count > 0) chunk = load_vec<MixShape<T>::kVec>(from);
  } else {
#pragma unroll
    for (int e = 0; e < MixShape<T>::kVec; ++e) {
      if (e < count) chunk[e] = load_global(from + e);
    }
  }
  return chunk;
}

template <class T, int kVec>
__device__ __forceinline__ void store_chunk(T* to, const float (&v)[kVec], int count, bool vectors) {
  if (vectors) {
    if (count > 0) store_floats(to, v);
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if (e < count) store_global(to + e, from_float<T>(v[e]));
    }
  }
}

// Elements of norm_weight or norm_bias for the channels of a column; `otherwise` where there is none, and behind the
// last channel.
template <class T, int kVec>
__device__ __forceinline__ void load_channels(float (&v)[kVec], const void* from, const WindowMixProblem& p,
                                              const MixColumn& column, float otherwise) {
  if (from != nullptr && p.vectors && column.count > 0) {
    load_parameter<T>(v, from, p.float_norm, column.channel);
    return;
  }
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    v[e] = otherwise;
    if (from == nullptr || e >= column.count) continue;
    const int at = column.channel + e;
    v[e] = p.float_norm ? load_global(static_cast<const float*>(from) + at)
                        : to_float(load_global(static_cast<const T*>(from) + at));
  }
}

// Rounds a chunk to T, in the tile.
template <class T, int kVec>
__device__ __forceinline__ void store_tile(const typename MixShape<T>::Tile& tile, int row, int chunk,
                                           const float (&v)[kVec]) {
  Vec<uint32_t, 4> words;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
  } else {
    __builtin_memcpy(&words, v, 16);
  }
  store_shared(tile.chunk(row, chunk), words);
}

// ---- LayerNorm of tokens that lie whole in a tile ----

// Sums of what the lanes of a row have, over the chunks of each of their two tokens; one where a token has more chunks
// than lanes share a row. A token has a power of two of chunks, at most a tile's.
template <class T>
__device__ __forceinline__ void token_sum(const WindowMixProblem& p, float (&v)[2]) {
  constexpr int kLanes = MixShape<T>::kLanes;
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float other = shuffle_xor(v[h], offset);
      if (offset < p.chunks.divisor) v[h] += other;
    }
  }
  if (p.chunks.divisor > kLanes) v[0] = v[1] = v[0] + v[1];
}

// 1 / sqrt(variance + eps) of n elements from the sums of their differences from the mean, which rounding moved, and of
// the squares of those. The first matters where the mean is large beside the deviation.
__device__ __forceinline__ float rstd_of(float differences, float squares, float n, float eps) {
  const float moved = differences / n;
  float variance = squares / n - moved * moved;
  if (variance < 0) variance = 0;  // and NaN stays NaN
  return rsqrt_approx(variance + eps);
}

// Mean and rstd of the lane's two tokens.
template <class T, int kVec>
__device__ __forceinline__ void token_statistics(const WindowMixProblem& p, const MixColumns<T>& columns,
                                                 const float (&v)[2][kVec], float (&mean)[2], float (&rstd)[2]) {
  const auto n = static_cast<float>(p.channels);
  float differences[2] = {}, squares[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    mean[h] = 0;
#pragma unroll
    for (int e = 0; e < kVec; ++e) mean[h] += v[h][e];
  }
  token_sum<T>(p, mean);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    mean[h] /= n;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const float difference = e < columns[h].count ? v[h][e] - mean[h] : 0.0f;
      differences[h] += difference;
      squares[h] += difference * difference;
    }
  }
  token_sum<T>(p, differences);
  token_sum<T>(p, squares);
#pragma unroll
  for (int h = 0; h < 2; ++h) rstd[h] = rstd_of(differences[h], squares[h], n, p.eps);
}

// ---- loads of 64 places ----

// Places from `first` on of x, normalised where there is a norm. With kMakes the statistics are made and written, else
// read.
template <class T, bool kMakes>
__device__ __forceinline__ void load_normalised(const typename MixShape<T>::Tile& tile, int tile_row,
                                                const WindowMixProblem& p, const MixColumns<T>& columns, int first) {
  using Shape = MixShape<T>;
  constexpr int kVec = Shape::kVec;
  const int first_row = Shape::load_row();
  const bool makes = kMakes && p.whole_tokens;
  Chunk<T> x[Shape::kPasses][2];
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int place = first + pass * Shape::kRowsAtOnce + first_row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t token = columns[h].token + place_offset(p, place);
      x[pass][h] = load_chunk(static_cast<const T*>(p.x) + token * p.x_stride + columns[h].channel,
                              place < p.tokens ? columns[h].count : 0, p.vectors);
    }
  }
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int row = pass * Shape::kRowsAtOnce + first_row;
    const bool exists = first + row < p.tokens;
    float v[2][kVec];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[h][e] = to_float(x[pass][h][e]);
    }
    if (p.norm_weight != nullptr) {
      float mean[2] = {}, rstd[2] = {};
      if (makes) token_statistics<T>(p, columns, v, mean, rstd);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool wanted = exists && columns[h].count > 0;
        const int64_t token = columns[h].token + place_offset(p, first + row);
        if (wanted && !makes) {
          mean[h] = load_global(p.mean + token);
          rstd[h] = load_global(p.rstd + token);
        }
        if (wanted && makes && columns[h].channel == 0) {
          store_global(p.mean + token, mean[h]);
          store_global(p.rstd + token, rstd[h]);
        }
        float weight[kVec], bias[kVec];
        load_channels<T>(weight, p.norm_weight, p, columns[h], 0.0f);
        load_channels<T>(bias, p.norm_bias, p, columns[h], 0.0f);
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          v[h][e] = exists && e < columns[h].count ? (v[h][e] - mean[h]) * rstd[h] * weight[e] + bias[e] : 0.0f;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) store_tile<T>(tile, tile_row + row, h * Shape::kLanes + Shape::lane(), v[h]);
  }
}

// Places from `first` on of the gradient of the product: dout, times the gate where there is one. Adds what a lane has
// of each row to `sums`.
template <class T>
__device__ __forceinline__ void load_gradient(const typename MixShape<T>::Tile& tile, int tile_row,
                                              const WindowMixBackwardParams& params, const MixColumns<T>& columns,
                                              int first, float (&sums)[MixShape<T>::kPasses]) {
  using Shape = MixShape<T>;
  constexpr int kVec = Shape::kVec;
  const int first_row = Shape::load_row();
  const WindowMixProblem& p = params.problem;
  Chunk<T> dout[Shape::kPasses][2], gate[Shape::kPasses][2];
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int place = first + pass * Shape::kRowsAtOnce + first_row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t token = columns[h].token + place_offset(p, place);
      const int count = place < p.tokens ? columns[h].count : 0;
      dout[pass][h] =
          load_chunk(static_cast<const T*>(params.dout) + token * p.channels + columns[h].channel, count, p.vectors);
      if (p.gate != nullptr) {
        gate[pass][h] =
            load_chunk(static_cast<const T*>(p.gate) + token * p.gate_stride + columns[h].channel, count, p.vectors);
      }
    }
  }
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int row = pass * Shape::kRowsAtOnce + first_row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        v[e] = to_float(dout[pass][h][e]);
        if (p.gate != nullptr) v[e] *= to_float(gate[pass][h][e]);
        sums[pass] += v[e];
      }
      store_tile<T>(tile, tile_row + row, h * Shape::kLanes + Shape::lane(), v);
    }
  }
}

// Copies the 64 x 64 elements of the weight from (row, col) on, zeros outside of it. Asynchronous where its rows are
// aligned: commit and wait are the caller's.
template <class T>
__device__ __forceinline__ void copy_weight_async(const typename MixShape<T>::Tile& tile, const WindowMixProblem& p,
                                                  int row, int col) {
  using Shape = MixShape<T>;
  constexpr int kStep = kMixThreads / Shape::kChunks;
  const int c = static_cast<int>(threadIdx.x) % Shape::kChunks, r = static_cast<int>(threadIdx.x) / Shape::kChunks;
  const int left = p.tokens - (col + c * Shape::kVec);
  const T* from = static_cast<const T*>(p.weight) + (row + r) * p.tokens + col + c * Shape::kVec;
#pragma unroll
  for (int i = 0; i < kMixRows; i += kStep) {
    const bool exists = row + r + i < p.tokens && left > 0;
    if (p.weight_vectors) {
      cp_async_16(tile.chunk(r + i, c), from, exists);
    } else {
      store_shared(tile.chunk(r + i, c), load_chunk(from, exists ? left : 0, false));
    }
    from += kStep * p.tokens;
  }
}

// ---- products ----

// The sums of a CTA's product [64, 64], and how it adds to them. `depth` of the 64 terms of a step are not zeros.
template <class T>
struct MixProduct {  // by mma.sync; a warp has 16 rows
  using Shape = MixShape<T>;
  using Tile = typename Shape::Tile;
  float sums[1][8][4];

  __device__ __forceinline__ void clear() {
    for_each_accumulator<1, 8>([&](int m, int n, int e) { sums[m][n][e] = 0; });
  }
  // += w x, x's rows from `row` on.
  __device__ __forceinline__ void add(Tile w, Tile x, int row, int depth) {
    const uint32_t lane = opaque(lane_offset_halves<kMixCols>());
    add(x, row, depth, [&](int k, uint32_t (&a)[4]) { load_a(a, w, lane, warp_id() * 16, k); });
  }
  // += w^T x
  __device__ __forceinline__ void add_transposed(Tile w, Tile x, int row, int depth) {
    const uint32_t lane = opaque(lane_offset_quarters<kMixCols>());
    add(x, row, depth, [&](int k, uint32_t (&a)[4]) { load_a_transposed(a, w, lane, k, warp_id() * 16); });
  }
  // += a b^T
  __device__ __forceinline__ void add_abt(Tile a, Tile b) {
    mma_abt<T, kMixCols>(sums, a, warp_id() * 16, b, 0, kMixCols);
  }

  // Calls f(row, v): v[h][e] is element e of chunk h * kLanes + lane. All lanes make every call.
  template <class F>
  __device__ __forceinline__ void visit(F&& f) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float v[2][Shape::kVec];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) __builtin_memcpy(&words[i], &sums[0][4 * h + i][2 * r + odd], 4);
          transpose_quad(words);
#pragma unroll
          for (int i = 0; i < 4; ++i) __builtin_memcpy(&v[h][2 * i + odd], &words[i], 4);
        }
      }
      f(warp_id() * 16 + 8 * r + lane_id() / 4, v);
    }
  }

 private:
  template <class Left>
  __device__ __forceinline__ void add(Tile x, int row, int depth, Left&& left) {
#pragma unroll
    for (int k = 0; k < kMixRows; k += 16) {
      if (k >= depth) continue;
      mma_ab<T, 1>(sums, [&](int, int, uint32_t (&a)[4]) { left(k, a); }, x, row + k, 0, kMixCols);
    }
  }
};

template <>
struct MixProduct<float> {  // by FMA; a thread has 4 rows, 16 apart, and two chunks of each
  using Shape = MixShape<float>;
  using Quad = Vec<float, 4>;
  static constexpr int kRows = 4, kRowStep = kMixRows / kRows;
  float sums[kRows][2][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][h][e] = 0;
      }
    }
  }
  __device__ __forceinline__ void add(FloatTile w, FloatTile x, int row, int depth) {
    for (int k = 0; k < depth; k += 4) {
      Quad left[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) left[i] = load_shared<Quad>(w.chunk(Shape::row() + kRowStep * i, k / 4));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        add_row(x, row + k + j, [&](int i) { return left[i][j]; });
      }
    }
  }
  __device__ __forceinline__ void add_transposed(FloatTile w, FloatTile x, int row, int depth) {
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
      float left[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) left[i] = load_shared<float>(w.element(k, Shape::row() + kRowStep * i));
      add_row(x, row + k, [&](int i) { return left[i]; });
    }
  }
  __device__ __forceinline__ void add_abt(FloatTile a, FloatTile b) {
    for (int k = 0; k < kMixCols; k += 4) {
      Quad left[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) left[i] = load_shared<Quad>(a.chunk(Shape::row() + kRowStep * i, k / 4));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const auto right = load_shared<Quad>(b.chunk(4 * (h * Shape::kLanes + Shape::lane()) + e, k / 4));
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][h][e] += left[i][j] * right[j];
          }
        }
      }
    }
  }
  template <class F>
  __device__ __forceinline__ void visit(F&& f) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float v[2][4];
      __builtin_memcpy(v, sums[i], sizeof(v));
      f(Shape::row() + kRowStep * i, v);
    }
  }

 private:
  template <class Left>
  __device__ __forceinline__ void add_row(FloatTile x, int row, Left&& left) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto right = load_shared<Quad>(x.chunk(row, h * Shape::kLanes + Shape::lane()));
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][h][e] += left(i) * right[e];
      }
    }
  }
};

}  // namespace warpform
