// LayerNorm(x + bias + residual) over the last dimension, forward and backward.
//
// Tile      forward: a warp a row up to 1024 columns, a block a row beyond. A thread owns kElements columns, kVec
//           neighbours at a time and kRowThreads * kVec apart. A row is read once and stays in registers in float32:
//           sum, mean, squared differences.
//           backward: the same ownership, so a thread adds up the parameter gradients of its columns in registers while
//           its warp or block walks over rows. A block adds its warps' sums and leaves one float32 partial sum a
//           column, which column_sum.cuh adds up. Which rows a block takes follows from the sizes and the number of
//           SMs: on one model of GPU the bits repeat.
// Loads     16 bytes a lane, of all of a row's tensors before the first is used; in the backward a warp's next row is
//           loaded before this one is reduced, in 16-bit types. Parameters come from L1, a row at a time.
//           A warp a row needs no barrier: 768 columns are 3 loads a lane of each tensor. Wider rows pass one
//           block-wide barrier a sum.
// Bounds    bytes. Forward: x + out (+ residual) (+ sum), 2 to 4 times cols * sizeof(T) a row; backward: dout + sum +
//           dx (+ dsum), plus 24 * cols * groups once, in L2. An SM of an H100 needs some 20 KiB of loads in flight for
//           3 TB/s: the forward has 32 warps of 3 KiB each at 768 columns, the backward 12 of them, each with its next
//           row on the way. Instructions: some 550 (forward) and 450 (backward) a warp and row, 6 and 5 us at 9531 rows
//           of 768 columns where the bytes take 14.6 us.
// Measured  on an H100, 9531 rows of 768 columns in bfloat16: forward 19.5 us, 2251 GB/s, 75 % of a copy's 3009 GB/s;
//           backward 37.4 us, 1174 GB/s, 39 %. Nsight Compute gives the backward's kernels 19.1 and 3.6 us, so a third
//           of its time is between and around them. With half a row a warp it was 29.6 and 42.1 us.
#pragma once

#include "common/elements.cuh"
#include "device/reduce.cuh"
#include "norm/launch.h"

namespace warpform {

constexpr int kLayerNormThreads = 128;  // forward, unless one row takes more

// The columns of a row that one of its kRowThreads threads owns: `items` groups of kVec neighbours, the first at
// `first`, kStep from group to group.
template <int kVec, int kRowThreads, int kItems>
struct Columns {
  static constexpr int kStep = kRowThreads * kVec;
  int first;
  int items;

  __device__ Columns(int thread, int cols) : first(thread * kVec), items((cols - first + kStep - 1) / kStep) {}

  // Calls f(i, offset), offset in elements from `first`; both are constants once unrolled.
  template <class F>
  __device__ __forceinline__ void operator()(F f) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i < items) f(i, i * kStep);
    }
  }
};

// Sums over the threads that share a row, a warp or the block, the same in each of them. For a block `scratch` is the
// shared address of kSums * kRowThreads / 32 floats, and its threads pass one barrier: alternating between two such
// areas makes the next call safe.
template <int kRowThreads, int kSums>
__device__ __forceinline__ void row_sum(float (&v)[kSums], uint32_t scratch) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) v[k] = warp_reduce(v[k], Sum());
  if constexpr (kRowThreads > kWarpSize) {
    constexpr int kWarps = kRowThreads / kWarpSize;
    using Sums = Vec<float, kSums>;
    if (lane_id() == 0) {
      Sums mine;
#pragma unroll
      for (int k = 0; k < kSums; ++k) mine[k] = v[k];
      store_shared(scratch + warp_id() * static_cast<int>(sizeof(Sums)), mine);
    }
    block_sync();
#pragma unroll
    for (int k = 0; k < kSums; ++k) v[k] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const Sums other = load_shared<Sums>(scratch + w * static_cast<int>(sizeof(Sums)));
#pragma unroll
      for (int k = 0; k < kSums; ++k) v[k] += other[k];
    }
  }
}

// Shared memory of row_sum: two areas of two floats a warp, none where a warp has a row.
__host__ __device__ constexpr int row_sum_area(int row_threads) {
  return row_threads > kWarpSize ? row_threads / kWarpSize * 8 : 0;
}
__host__ __device__ constexpr int row_sum_bytes(int row_threads) { return 2 * row_sum_area(row_threads); }

// The same elements, as values that the compiler knows nothing about: it would keep their conversions to float32 from
// one use to the next, in twice the registers.
template <class T, int kN>
__device__ __forceinline__ void forget(Vec<T, kN>& v) {
  if constexpr (sizeof(T) == 2 && kN % 2 == 0) {
    Vec<uint32_t, sizeof(v) / 4> words;
    __builtin_memcpy(&words, &v, sizeof(v));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(v) / 4); ++i) words[i] = opaque(words[i]);
    __builtin_memcpy(&v, &words, sizeof(v));
  }
}

// True if the next row is loaded while a row is worked on. Two elements share a register, so that it costs few.
template <class T, int kVec>
constexpr bool kLoadsAhead = sizeof(T) == 2 && kVec > 1;

template <class T, int kVec, int kRowThreads, int kElements>
struct LayerNormForward {
  static_assert(kRowThreads == kWarpSize || kRowThreads >= kLayerNormThreads, "a row belongs to a warp or to a block");
  static constexpr int kThreads = kRowThreads > kLayerNormThreads ? kRowThreads : kLayerNormThreads;
  // 64 registers a thread, 80 or 96 where a warp has a long row.
  static constexpr int kBlocksPerSm = (kElements > 24 ? 640 : kElements > 16 ? 768 : 1024) / kThreads;
  static constexpr int kRows = kThreads / kRowThreads;  // of a block
  static constexpr int kItems = kElements / kVec;
  static constexpr int kSharedBytes = row_sum_bytes(kRowThreads);
};

template <class T, int kVec, int kRowThreads, int kElements>
__global__ void __launch_bounds__(LayerNormForward<T, kVec, kRowThreads, kElements>::kThreads,
                                  LayerNormForward<T, kVec, kRowThreads, kElements>::kBlocksPerSm)
layer_norm_kernel(const LayerNormParams p) {
  using Shape = LayerNormForward<T, kVec, kRowThreads, kElements>;
  constexpr int kItems = Shape::kItems;
  const int thread = static_cast<int>(threadIdx.x) % kRowThreads;
  const int cols = static_cast<int>(p.cols);
  const float inv_cols = 1.0f / static_cast<float>(cols);
  const uint32_t scratch = shared_base();
  const Columns<kVec, kRowThreads, kItems> columns(thread, cols);

  const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  const int64_t row = block * Shape::kRows + static_cast<int>(threadIdx.x) / kRowThreads;
  if (row >= p.rows) return;  // all threads of a row
  const int64_t at = row * p.cols + columns.first;

  // Both rows are asked for before either is used; the parameters are near.
  Vec<T, kVec> x[kItems], residual[kItems];
  columns([&](int i, int offset) { x[i] = load_vec<kVec>(static_cast<const T*>(p.x) + at + offset); });
  if (p.residual != nullptr) {
    columns([&](int i, int offset) { residual[i] = load_vec<kVec>(static_cast<const T*>(p.residual) + at + offset); });
  }
  float v[kItems][kVec];
  columns([&](int i, int) {
    forget(x[i]);
#pragma unroll
    for (int j = 0; j < kVec; ++j)
      v[i][j] = to_float(x[i][j]) + (p.residual == nullptr ? 0.0f : to_float(residual[i][j]));
  });
  if (p.bias != nullptr) {
    columns([&](int i, int offset) {
      float bias[kVec];
      load_parameter<T>(bias, p.bias, p.float_parameters, columns.first + offset);
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] += bias[j];
    });
  }
  if (p.sum != nullptr) {
    columns([&](int i, int offset) { store_floats(static_cast<T*>(p.sum) + at + offset, v[i]); });
  }

  float total[1] = {0};
  columns([&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) total[0] += v[i][j];
  });
  row_sum<kRowThreads>(total, scratch);
  const float near_mean = total[0] / static_cast<float>(cols);

  // The sum of the differences is what rounding left in near_mean: it corrects the mean and the variance, which
  // matters where the mean is large beside the deviation.
  float moments[2] = {0, 0};
  columns([&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      v[i][j] -= near_mean;
      moments[0] += v[i][j];
      moments[1] += v[i][j] * v[i][j];
    }
  });
  row_sum<kRowThreads>(moments, scratch + row_sum_area(kRowThreads));
  const float correction = moments[0] * inv_cols;
  float variance = moments[1] * inv_cols - correction * correction;
  if (variance < 0) variance = 0;  // and NaN stays NaN
  const float rstd = rsqrt_approx(variance + p.eps);
  if (thread == 0) {
    store_global(p.mean + row, near_mean + correction);
    store_global(p.rstd + row, rstd);
  }

  columns([&](int i, int offset) {
    float weight[kVec], bias[kVec];
    load_parameter<T>(weight, p.weight, p.float_parameters, columns.first + offset);
    load_parameter<T>(bias, p.ln_bias, p.float_parameters, columns.first + offset);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[i][j] = (v[i][j] - correction) * rstd * weight[j] + bias[j];
    store_floats(static_cast<T*>(p.out) + at + offset, v[i]);
  });
}

// Backward, with xhat = (sum - mean) * rstd, g = dout * weight and <.> the mean over a row:
//   dx = rstd * (g - <g> - xhat * <g * xhat>) + dsum;  dbias, dweight, dln_bias = column sums of dx, dout * xhat, dout.
// Up to 4096 columns everything fits in registers. Wider shapes read dout and sum a second time instead (the block has
// just read them: from L1 or L2), and keep dbias in shared memory, each thread its own columns.
template <class T, int kVec, int kRowThreads, int kElements>
struct LayerNormBackward {
  // Where a warp has rows of its own, as many warps as have registers: 3 sums a column, the row, the next row.
  static constexpr int kThreads = kRowThreads > kWarpSize ? kRowThreads
                                  : kElements <= 16       ? 512
                                  : kElements <= 24       ? 384
                                                          : 256;
  static constexpr int kRows = kThreads / kRowThreads;
  static constexpr int kItems = kElements / kVec;
  static constexpr int kCols = kRowThreads * kElements;
  static constexpr bool kWide = kCols > 4096;
  static constexpr int kBlocksPerSm = kRowThreads > kWarpSize && !kWide ? 2 : 1;
  // Rows of one block are added up in shared memory, one parameter after the other.
  static constexpr int kSumBytes = kWide || kRows > 1 ? kRows * kCols * 4 : 0;
  static constexpr int kSharedBytes = kSumBytes + row_sum_bytes(kRowThreads);
};

template <class T, int kVec, int kRowThreads, int kElements>
__global__ void __launch_bounds__(LayerNormBackward<T, kVec, kRowThreads, kElements>::kThreads,
                                  LayerNormBackward<T, kVec, kRowThreads, kElements>::kBlocksPerSm)
layer_norm_backward_kernel(const LayerNormBackwardParams p) {
  using Shape = LayerNormBackward<T, kVec, kRowThreads, kElements>;
  constexpr int kItems = Shape::kItems;
  constexpr bool kWide = Shape::kWide;
  constexpr int kHeld = kWide ? 1 : kItems;
  constexpr int kSums = kWide ? 2 : 3;
  constexpr int kPiece = kVec < 4 ? kVec : 4;  // floats of one access
  using Piece = Vec<float, kPiece>;

  const int thread = static_cast<int>(threadIdx.x) % kRowThreads;
  const int row_in_block = static_cast<int>(threadIdx.x) / kRowThreads;
  const int cols = static_cast<int>(p.cols);
  const float inv_cols = 1.0f / static_cast<float>(cols);
  const uint32_t sums = shared_base();
  const Columns<kVec, kRowThreads, kItems> columns(thread, cols);
  // Wide: where this thread keeps the sum of its columns' dx; neighbouring threads are neighbours there.
  const auto dbias_at = [&](int i, int j) {
    return sums + ((i * (kVec / kPiece) + j / kPiece) * kRowThreads + thread) * static_cast<int>(sizeof(Piece));
  };

  float acc[kSums][kItems][kVec];  // dln_bias, dweight, dbias
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) acc[k][i][j] = 0;
    }
  }
  if constexpr (kWide) {
    columns([&](int i, int) {
#pragma unroll
      for (int j = 0; j < kVec; j += kPiece) store_shared(dbias_at(i, j), Piece{});
    });
  }

  constexpr int kArea = row_sum_area(kRowThreads);
  static_assert((Shape::kSumBytes & kArea) == 0, "the two areas must differ in one bit");
  uint32_t scratch = sums + Shape::kSumBytes;
  const int64_t step = int64_t{gridDim.x} * Shape::kRows;
  int64_t row = int64_t{blockIdx.x} * Shape::kRows + row_in_block;

  // A row as it came: half the registers in 16-bit types. As words: the compiler would carry elements from turn to turn
  // in a register each.
  using Elements = Vec<T, kVec>;
  using Words = std::conditional_t<kLoadsAhead<T, kVec>, Vec<uint32_t, (kVec + 1) / 2>, Elements>;
  struct Held {
    Words dout[kHeld], sum[kHeld];
    float mean, rstd;
  };
  const auto read = [&](Held& held, int i, int64_t at) {
    held.dout[i] = load_global(reinterpret_cast<const Words*>(static_cast<const T*>(p.dout) + at));
    held.sum[i] = load_global(reinterpret_cast<const Words*>(static_cast<const T*>(p.sum) + at));
  };
  const auto elements_of = [](const Words& words) {
    Elements elements;
    __builtin_memcpy(&elements, &words, sizeof(elements));
    forget(elements);
    return elements;
  };
  const auto read_row = [&](Held& held, int64_t of) {
    held.mean = load_global(p.mean + of);
    held.rstd = load_global(p.rstd + of);
    if constexpr (!kWide) {
      columns([&](int i, int offset) { read(held, i, of * p.cols + columns.first + offset); });
    }
  };
  constexpr bool kAhead = kLoadsAhead<T, kVec> && !kWide;
  Held next;
  if (kAhead && row < p.rows) read_row(next, row);
  for (; row < p.rows; row += step) {
    const int64_t at = row * p.cols + columns.first;
    Held held;
    if constexpr (kAhead) {
      held = next;
      read_row(next, min(row + step, p.rows - 1));  // past the last the last again, from L2: no branch
    } else {
      read_row(held, row);
    }
    const float mean = held.mean, rstd = held.rstd;

    float means[2] = {0, 0};  // of g and of g * xhat
    columns([&](int i, int offset) {
      const int place = kWide ? 0 : i;
      if constexpr (kWide) read(held, 0, at + offset);
      const Elements douts = elements_of(held.dout[place]), row_sums = elements_of(held.sum[place]);
      float weight[kVec];
      load_parameter<T>(weight, p.weight, p.float_parameters, columns.first + offset);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float dout = to_float(douts[j]);
        const float xhat = (to_float(row_sums[j]) - mean) * rstd;
        means[0] += dout * weight[j];
        means[1] += dout * weight[j] * xhat;
        acc[0][i][j] += dout;
        acc[1][i][j] += dout * xhat;
      }
    });
    row_sum<kRowThreads>(means, scratch);
    scratch ^= kArea;
    means[0] *= inv_cols;
    means[1] *= inv_cols;

    columns([&](int i, int offset) {
      const int place = kWide ? 0 : i;
      if constexpr (kWide) read(held, 0, at + offset);
      const Elements douts = elements_of(held.dout[place]), row_sums = elements_of(held.sum[place]);
      float dx[kVec];
      load_parameter<T>(dx, p.weight, p.float_parameters, columns.first + offset);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float xhat = (to_float(row_sums[j]) - mean) * rstd;
        dx[j] = rstd * (to_float(douts[j]) * dx[j] - means[0] - xhat * means[1]);
      }
      if (p.dsum != nullptr) {
        float dsum[kVec];
        load_floats(dsum, static_cast<const T*>(p.dsum) + at + offset);
#pragma unroll
        for (int j = 0; j < kVec; ++j) dx[j] += dsum[j];
      }
      store_floats(static_cast<T*>(p.dx) + at + offset, dx);
#pragma unroll
      for (int j = 0; j < kVec; j += kPiece) {
        if constexpr (kWide) {
          Piece sum = load_shared<Piece>(dbias_at(i, j));
#pragma unroll
          for (int l = 0; l < kPiece; ++l) sum[l] += dx[j + l];
          store_shared(dbias_at(i, j), sum);
        } else {
#pragma unroll
          for (int l = 0; l < kPiece; ++l) acc[kSums - 1][i][j + l] += dx[j + l];
        }
      }
    });
  }

  // partials: [dbias, dweight, dln_bias][group][col]
  const auto partial = [&](int k) { return p.partials + ((2 - k) * p.groups + blockIdx.x) * p.cols; };
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    if constexpr (Shape::kRows == 1) {
      columns([&](int i, int offset) { store_floats(partial(k) + columns.first + offset, acc[k][i]); });
    } else {
      const uint32_t mine = sums + (row_in_block * Shape::kCols + columns.first) * 4;
      if (k > 0) block_sync();
      columns([&](int i, int offset) {
#pragma unroll
        for (int j = 0; j < kVec; j += kPiece) {
          Piece sum;
#pragma unroll
          for (int l = 0; l < kPiece; ++l) sum[l] = acc[k][i][j + l];
          store_shared(mine + (offset + j) * 4, sum);
        }
      });
      block_sync();
      for (int col = static_cast<int>(threadIdx.x); col < cols; col += Shape::kThreads) {
        float sum = 0;
#pragma unroll
        for (int r = 0; r < Shape::kRows; ++r) sum += load_shared<float>(sums + (r * Shape::kCols + col) * 4);
        store_global(partial(k) + col, sum);
      }
    }
  }
  if constexpr (kWide) {
    columns([&](int i, int offset) {
      float dbias[kVec];
#pragma unroll
      for (int j = 0; j < kVec; j += kPiece) {
        const Piece sum = load_shared<Piece>(dbias_at(i, j));
#pragma unroll
        for (int l = 0; l < kPiece; ++l) dbias[j + l] = sum[l];
      }
      store_floats(partial(2) + columns.first + offset, dbias);
    });
  }
}

}  // namespace warpform
