// A row and its statistic: LayerNorm, RMSNorm and RMSNorm with GELU forward, and the backward of the last, which has no
// parameters. They are policies of one kernel: what is loaded beside x, whether a row is centred, what is made of the
// normalised row.
//
// Tile      a warp a row up to 1024 columns, a block a row beyond. A thread owns kElements columns, kVec neighbours at a
//           time and kRowThreads * kVec apart. A row is read once and stays in registers in float32.
// Loads     16 bytes a lane, of all of a row's tensors before the first is used. Parameters come from L1, a row at a time.
//           A warp a row needs no barrier: 768 columns are 3 loads a lane of each tensor. Wider rows pass one block-wide
//           barrier a sum.
// Bounds    bytes a row of n columns of 16 bits, and the floor at n = 768 and an H100's copy of 3009 GB/s:
//             LayerNorm(x + residual), RMSNorm(x + residual)   6 n, or 8 n with the sum    1.5 or 2.0 ns
//             RMSNorm with GELU                                4 n                         1.0 ns
//             its backward                                     6 n                         1.5 ns
//           An SM of an H100 needs some 20 KiB of loads in flight for 3 TB/s: at 768 columns there are 32 warps of 3 KiB
//           each (with GELU 1.5 KiB; its backward 24 warps of 3 KiB). Instructions a warp and row of 768 columns, and the
//           time that an H100 takes to issue them for 9531 rows: LayerNorm some 550, 6 us, where the bytes take 14.6;
//           RMSNorm with GELU by erf 880, 9 us, where they take 9.7, and by tanh 470, 5 us; backward 1160, 12 us, where
//           they take 14.6, and 870, 9 us. So erf leaves little to spare.
// Measured  on an H100, 9531 rows of 768 columns in bfloat16: LayerNorm 19.5 us, 2251 GB/s, 75 % of a copy's 3009 GB/s;
//           with half a row a warp it was 29.6 us. RMSNorm, with GELU and without: not yet.
#pragma once

#include "common/elements.cuh"
#include "common/gelu.cuh"
#include "device/reduce.cuh"
#include "norm/launch.h"

namespace warpform {

constexpr int kRowNormThreads = 128;  // a block, unless one row takes more

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

// 1 / sqrt(squares), and 0 for 0: a row of zeros stays one.
__device__ __forceinline__ float inverse_root(float squares) { return squares == 0 ? 0.0f : rsqrt_approx(squares); }

// ---- policies: Params, kOp for messages, and
//   kAdds     x + residual is normalised, and the sum and the statistics are results
//   kCentred  the mean is taken off, and there is a bias in front of the norm
//   kGradient dout is loaded with x, and the result is dx
// `apply` makes kVec elements of the result of elements of the normalised row, `col` the first one's column.

struct LayerNorm {
  using Params = LayerNormParams;
  static constexpr const char* kOp = "add_bias_residual_layer_norm";
  static constexpr bool kAdds = true, kCentred = true, kGradient = false;

  template <class T, int kVec>
  static __device__ __forceinline__ void apply(const Params& p, int col, float (&v)[kVec]) {
    float weight[kVec], bias[kVec];
    load_parameter<T>(weight, p.weight, p.float_parameters, col);
    load_parameter<T>(bias, p.ln_bias, p.float_parameters, col);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = v[j] * weight[j] + bias[j];
  }
};

struct RmsNorm {
  using Params = RmsNormParams;
  static constexpr const char* kOp = "add_residual_rms_norm";
  static constexpr bool kAdds = true, kCentred = false, kGradient = false;

  template <class T, int kVec>
  static __device__ __forceinline__ void apply(const Params& p, int col, float (&v)[kVec]) {
    float weight[kVec];
    load_parameter<T>(weight, p.weight, p.float_parameters, col);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] *= weight[j];
  }
};

template <class Gelu>
struct RmsNormGelu {
  using Params = RmsNormGeluParams;
  static constexpr const char* kOp = "rms_norm_gelu";
  static constexpr bool kAdds = false, kCentred = false, kGradient = false;

  template <class T, int kVec>
  static __device__ __forceinline__ void apply(const Params& p, int, float (&v)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = Gelu::value(p.gain * v[j]);
  }
};

template <class Gelu_>
struct RmsNormGeluBackward {
  using Params = RmsNormGeluBackwardParams;
  using Gelu = Gelu_;
  static constexpr const char* kOp = "rms_norm_gelu_backward";
  static constexpr bool kAdds = false, kCentred = false, kGradient = true;
};

template <int kRowThreads, int kElements>
struct RowNormShape {
  static_assert(kRowThreads == kWarpSize || kRowThreads >= kRowNormThreads, "a row belongs to a warp or to a block");
  static constexpr int kThreads = kRowThreads > kRowNormThreads ? kRowThreads : kRowNormThreads;
  // 64 registers a thread, 80 or 96 where a warp has a long row.
  static constexpr int kBlocksPerSm = (kElements > 24 ? 640 : kElements > 16 ? 768 : 1024) / kThreads;
  static constexpr int kRows = kThreads / kRowThreads;  // of a block
  static constexpr int kSharedBytes = row_sum_bytes(kRowThreads);
};

template <class Norm, class T, int kVec, int kRowThreads, int kElements>
__global__ void __launch_bounds__(RowNormShape<kRowThreads, kElements>::kThreads,
                                  RowNormShape<kRowThreads, kElements>::kBlocksPerSm)
row_norm_kernel(const typename Norm::Params p) {
  using Shape = RowNormShape<kRowThreads, kElements>;
  constexpr int kItems = kElements / kVec;
  const int thread = static_cast<int>(threadIdx.x) % kRowThreads;
  const int cols = static_cast<int>(p.cols);
  const float inv_cols = 1.0f / static_cast<float>(cols);
  const uint32_t scratch = shared_base();
  const Columns<kVec, kRowThreads, kItems> columns(thread, cols);

  const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  const int64_t row = block * Shape::kRows + static_cast<int>(threadIdx.x) / kRowThreads;
  if (row >= p.rows) return;  // all threads of a row
  const int64_t at = row * p.cols + columns.first;

  // All rows are asked for before any is used; the parameters are near.
  Vec<T, kVec> x[kItems], other[kItems];
  columns([&](int i, int offset) { x[i] = load_vec<kVec>(static_cast<const T*>(p.x) + at + offset); });
  const void* second = nullptr;
  if constexpr (Norm::kAdds) second = p.residual;
  if constexpr (Norm::kGradient) second = p.dout;
  if (second != nullptr) {
    columns([&](int i, int offset) { other[i] = load_vec<kVec>(static_cast<const T*>(second) + at + offset); });
  }
  float v[kItems][kVec];
  columns([&](int i, int) {
    forget(x[i]);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      v[i][j] = to_float(x[i][j]);
      if constexpr (Norm::kAdds) v[i][j] += p.residual == nullptr ? 0.0f : to_float(other[i][j]);
    }
  });
  if constexpr (Norm::kCentred) {
    if (p.bias != nullptr) {
      columns([&](int i, int offset) {
        float bias[kVec];
        load_parameter<T>(bias, p.bias, p.float_parameters, columns.first + offset);
#pragma unroll
        for (int j = 0; j < kVec; ++j) v[i][j] += bias[j];
      });
    }
  }
  if constexpr (Norm::kAdds) {
    if (p.sum != nullptr) {
      columns([&](int i, int offset) { store_floats(static_cast<T*>(p.sum) + at + offset, v[i]); });
    }
  }

  float total[1] = {0};
  columns([&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) total[0] += Norm::kCentred ? v[i][j] : v[i][j] * v[i][j];
  });
  row_sum<kRowThreads>(total, scratch);

  float rstd;
  float correction = 0;
  if constexpr (Norm::kCentred) {
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
    correction = moments[0] * inv_cols;
    float variance = moments[1] * inv_cols - correction * correction;
    if (variance < 0) variance = 0;  // and NaN stays NaN
    rstd = rsqrt_approx(variance + p.eps);
    if (thread == 0) store_global(p.mean + row, near_mean + correction);
  } else {
    rstd = inverse_root(total[0] * inv_cols + p.eps);
  }
  if constexpr (Norm::kAdds) {
    if (thread == 0) store_global(p.rstd + row, rstd);
  }

  if constexpr (Norm::kGradient) {
    // With xhat = x * rstd, g = dout * GELU'(gain * xhat) and <.> the mean over a row:
    //   dx = gain * rstd * (g - xhat * <g * xhat>).
    float g[kItems][kVec];
    float along[1] = {0};
    columns([&](int i, int) {
      forget(other[i]);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        v[i][j] *= rstd;
        g[i][j] = to_float(other[i][j]) * Norm::Gelu::derivative(p.gain * v[i][j]);
        along[0] += g[i][j] * v[i][j];
      }
    });
    row_sum<kRowThreads>(along, scratch + row_sum_area(kRowThreads));
    const float mean = along[0] * inv_cols, gain = p.gain * rstd;
    columns([&](int i, int offset) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] = gain * (g[i][j] - v[i][j] * mean);
      store_floats(static_cast<T*>(p.dx) + at + offset, v[i]);
    });
  } else {
    columns([&](int i, int offset) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] = (Norm::kCentred ? v[i][j] - correction : v[i][j]) * rstd;
      Norm::template apply<T>(p, columns.first + offset, v[i]);
      store_floats(static_cast<T*>(p.out) + at + offset, v[i]);
    });
  }
}

}  // namespace warpform
