// The backward of a norm with parameters: LayerNorm and RMSNorm, policies of one kernel.
//
// Tile      row_norm.cuh's ownership of columns: a thread adds up the parameter gradients of its columns in registers
//           while its warp or block walks over rows. A block adds its warps' sums and leaves one float32 partial sum a
//           column, which column_sum.cuh adds up. Which rows a block takes follows from the sizes and the number of SMs:
//           on one model of GPU the bits repeat.
// Loads     16 bytes a lane; a warp's next row is loaded before this one is reduced, in 16-bit types. The weight comes
//           from L1, a row at a time.
// Bounds    bytes: dout + sum + dx (+ dsum), 6 (8) n a row of n columns of 16 bits, 1.5 (2.0) ns at 768 columns and an H100's
//           copy of 3009 GB/s, plus 24 (LayerNorm) or 8 (RMSNorm) * cols * groups once, in L2. LayerNorm has 12 warps
//           of 3 KiB an SM at 768 columns, each with its next row on the way, and RMSNorm, with one sum a column for
//           three, 16. Instructions: some 450 a warp and row in LayerNorm, 5 us at 9531 rows of 768 columns.
// Measured  on an H100, 9531 rows of 768 columns in bfloat16: LayerNorm 37.4 us, 1174 GB/s, 39 %. Nsight Compute gives its
//           kernels 19.1 and 3.6 us, so a third of the time is between and around them. With half a row a warp it was
//           42.1 us. RMSNorm: not yet.
#pragma once

#include "norm/row_norm.cuh"

namespace warpform {

// True if the next row is loaded while a row is worked on. Two elements share a register, so that it costs few.
template <class T, int kVec>
constexpr bool kLoadsAhead = sizeof(T) == 2 && kVec > 1;

// Policies: Params, kOp for messages, and kCentred: with xhat = (sum - mean) * rstd, g = dout * weight and <.> the mean
// over a row,
//   dx = rstd * (g - <g> - xhat * <g * xhat>) + dsum;  dbias, dweight, dln_bias = column sums of dx, dout * xhat, dout.
// An RMSNorm is that without mean and <g>, and has dweight alone.
struct LayerNormBackward {
  using Params = LayerNormBackwardParams;
  static constexpr const char* kOp = "add_bias_residual_layer_norm_backward";
  static constexpr bool kCentred = true;
  static constexpr int kSums = 3;
  // Where a warp has rows of its own, as many warps as have registers: the sums of its columns, the row, the next row.
  static constexpr int threads(int elements) { return elements <= 16 ? 512 : elements <= 24 ? 384 : 256; }
};
struct RmsNormBackward {
  using Params = RmsNormBackwardParams;
  static constexpr const char* kOp = "add_residual_rms_norm_backward";
  static constexpr bool kCentred = false;
  static constexpr int kSums = 1;
  static constexpr int threads(int elements) { return elements <= 24 ? 512 : 384; }
};

// Up to 4096 columns everything fits in registers. Wider shapes read dout and sum a second time instead (the block has
// just read them: from L1 or L2), and keep dbias in shared memory, each thread its own columns.
template <class Norm, int kRowThreads, int kElements>
struct RowNormBackwardShape {
  static constexpr int kThreads = kRowThreads > kWarpSize ? kRowThreads : Norm::threads(kElements);
  static constexpr int kRows = kThreads / kRowThreads;
  static constexpr int kCols = kRowThreads * kElements;
  static constexpr bool kWide = kCols > 4096;
  static constexpr bool kSharedDbias = kWide && Norm::kCentred;
  static constexpr int kBlocksPerSm = kRowThreads > kWarpSize && !kWide ? 2 : 1;
  // Rows of one block are added up in shared memory, one parameter after the other.
  static constexpr int kSumBytes = kSharedDbias || kRows > 1 ? kRows * kCols * 4 : 0;
  static constexpr int kSharedBytes = kSumBytes + row_sum_bytes(kRowThreads);
};

template <class Norm, class T, int kVec, int kRowThreads, int kElements>
__global__ void __launch_bounds__(RowNormBackwardShape<Norm, kRowThreads, kElements>::kThreads,
                                  RowNormBackwardShape<Norm, kRowThreads, kElements>::kBlocksPerSm)
row_norm_backward_kernel(const typename Norm::Params p) {
  using Shape = RowNormBackwardShape<Norm, kRowThreads, kElements>;
  constexpr int kItems = kElements / kVec;
  constexpr bool kWide = Shape::kWide;
  constexpr int kHeld = kWide ? 1 : kItems;
  constexpr int kSums = Norm::kSums - Shape::kSharedDbias;
  constexpr int kDweight = Norm::kCentred ? 1 : 0, kAlong = kDweight;
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

  float acc[kSums][kItems][kVec];  // dln_bias, dweight, dbias, or dweight alone
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) acc[k][i][j] = 0;
    }
  }
  if constexpr (Shape::kSharedDbias) {
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
    if constexpr (Norm::kCentred) held.mean = load_global(p.mean + of);
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
    const float rstd = held.rstd;
    const auto xhat_of = [&](T sum) { return (Norm::kCentred ? to_float(sum) - held.mean : to_float(sum)) * rstd; };

    float means[kAlong + 1] = {};  // of g and of g * xhat, or of that alone
    columns([&](int i, int offset) {
      const int place = kWide ? 0 : i;
      if constexpr (kWide) read(held, 0, at + offset);
      const Elements douts = elements_of(held.dout[place]), row_sums = elements_of(held.sum[place]);
      float weight[kVec];
      load_parameter<T>(weight, p.weight, p.float_parameters, columns.first + offset);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float dout = to_float(douts[j]);
        const float xhat = xhat_of(row_sums[j]);
        if constexpr (Norm::kCentred) {
          means[0] += dout * weight[j];
          acc[0][i][j] += dout;
        }
        means[kAlong] += dout * weight[j] * xhat;
        acc[kDweight][i][j] += dout * xhat;
      }
    });
    row_sum<kRowThreads>(means, scratch);
    scratch ^= kArea;
#pragma unroll
    for (float& mean : means) mean *= inv_cols;

    columns([&](int i, int offset) {
      const int place = kWide ? 0 : i;
      if constexpr (kWide) read(held, 0, at + offset);
      const Elements douts = elements_of(held.dout[place]), row_sums = elements_of(held.sum[place]);
      float dx[kVec];
      load_parameter<T>(dx, p.weight, p.float_parameters, columns.first + offset);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float g = to_float(douts[j]) * dx[j];
        dx[j] = rstd * ((Norm::kCentred ? g - means[0] : g) - xhat_of(row_sums[j]) * means[kAlong]);
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
        if constexpr (Shape::kSharedDbias) {
          Piece sum = load_shared<Piece>(dbias_at(i, j));
#pragma unroll
          for (int l = 0; l < kPiece; ++l) sum[l] += dx[j + l];
          store_shared(dbias_at(i, j), sum);
        } else if constexpr (Norm::kCentred) {
#pragma unroll
          for (int l = 0; l < kPiece; ++l) acc[kSums - 1][i][j + l] += dx[j + l];
        }
      }
    });
  }

  // partials: [dbias, dweight, dln_bias][group][col], or [group][col]
  const auto partial = [&](int k) { return p.partials + ((Norm::kSums - 1 - k) * p.groups + blockIdx.x) * p.cols; };
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
  if constexpr (Shape::kSharedDbias) {
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
