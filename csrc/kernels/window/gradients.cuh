// Shared by the backward kernels: the sums that a CTA keeps over its windows, and the epilogue that turns products into
// gradients of q and k.
#pragma once

#include "device/reduce.cuh"
#include "window/scores.cuh"

namespace warpform {

// Sets the rows of a window, once all warps are done with the previous one. Its buffers may be refilled then.
template <int kBucket>
__device__ __forceinline__ void begin_window(const WindowShared& shared, const WindowProblem& p, const Window& window) {
  block_sync();
  shared.tokens.set_rows<window_threads(kBucket)>(shared.rows(), p, window);
  block_sync();
}

// Adds over the rows of a warp's accumulators, the same order always; lanes of one column have the same t.
__device__ __forceinline__ float sum_over_rows(float v) {
#pragma unroll
  for (int offset = 4; offset < kWarpSize; offset *= 2) v += shuffle_xor(v, offset);
  return v;
}

// Gradient of qkv_bias: sums over padded tokens of dk and dv, kept in shared memory, each warp its own. A CTA leaves
// one row of [3, heads, head_dim] in global memory, dq's part 0: the queries of padded positions have no output.
template <int kBucket>
struct PaddingSums {
  static constexpr int kTeams = window_teams(kBucket);
  uint32_t base;  // [kTeams][kTeamWarps][2][kBucket] floats

  static constexpr int kBytes = kTeams * kTeamWarps * 2 * kBucket * 4;

  __device__ __forceinline__ void clear() const {
    for (int i = static_cast<int>(threadIdx.x) * 4; i < kBytes; i += window_threads(kBucket) * 4) {
      store_shared(base + i, 0.f);
    }
  }
  // 16 rows of dk (which 0) or dv (1), tokens from `first` on; `factor` is what the accumulators lack.
  template <int kN>
  __device__ __forceinline__ void add(const float (&acc)[kN][4], int which, const Rows& rows, int first,
                                      float factor) const {
    const int lane = opaque_lane(), g = lane / 4, t = lane % 4;
    const bool upper = rows[first + g] == kPadded, lower = rows[first + g + 8] == kPadded;
    if (ballot(upper || lower) == 0) return;
    const uint32_t mine = base + (WindowTile<kBucket>::thread() / kWarpSize * 2 + which) * kBucket * 4 + 2 * t * 4;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      Vec<float, 2> sum;
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[e] = sum_over_rows((upper ? acc[n][e] : 0.f) + (lower ? acc[n][2 + e] : 0.f));
      if (g == 0) {
        const auto before = load_shared<Vec<float, 2>>(mine + 8 * n * 4);
        store_shared(mine + 8 * n * 4, Vec<float, 2>{{before[0] + factor * sum[0], before[1] + factor * sum[1]}});
      }
    }
  }
  // After a barrier.
  __device__ __forceinline__ void write(const WindowProblem& p, float* sums, int share) const {
    constexpr int kThreads = window_threads(kBucket);
    for (int i = static_cast<int>(threadIdx.x); i < kTeams * 3 * kBucket; i += kThreads) {
      const int col = i % kBucket, which = i / kBucket % 3, team = i / kBucket / 3;
      const int head = WindowTile<kBucket>::first_head() + team;
      if (head >= p.heads || col >= p.head_dim) continue;
      float sum = 0.f;
      if (which > 0) {
#pragma unroll
        for (int w = 0; w < kTeamWarps; ++w) {
          sum += load_shared<float>(base + (((team * kTeamWarps + w) * 2 + which - 1) * kBucket + col) * 4);
        }
      }
      const int64_t at = (static_cast<int64_t>(share) * 3 + which) * p.width + head * p.head_dim + col;
      store_global(sums + at, sum);
    }
  }
};

// Gradients of scores, summed over the windows of a CTA: 16 rows x 64 columns a warp, in shared memory as the
// accumulators have them, one 16-byte access a tile and lane.
template <int kBucket>
struct ScoreSums {
  static constexpr int kThreads = window_threads(kBucket);
  uint32_t base;

  static constexpr int kBytes = kThreads * (kBlock / 8) * 16;

  __device__ __forceinline__ uint32_t at(int n) const {
    return base + n * kThreads * 16 + WindowTile<kBucket>::thread() * 16;
  }
  __device__ __forceinline__ void clear() const {
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) store_shared(at(n), Vec<float, 4>{});
  }
  __device__ __forceinline__ void add(const float (&ds)[kBlock / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
      auto sum = load_shared<Vec<float, 4>>(at(n));
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += ds[n][e];
      store_shared(at(n), sum);
    }
  }
  // Writes to the [tokens, tokens] of one share and head, rows and columns from `row` and `col` on.
  __device__ __forceinline__ void write(float* sums, int tokens, int row, int col) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
      const auto sum = load_shared<Vec<float, 4>>(at(n));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row + g + 8 * (e / 2), j = col + 8 * n + 2 * t + e % 2;
        if (i < tokens && j < tokens) store_global(sums + static_cast<int64_t>(i) * tokens + j, sum[e]);
      }
    }
  }
};

// Gradient of logit_scale: a sum in each thread, in shared memory, and then one a team.
template <int kBucket>
struct ScaleSums {
  uint32_t base;  // a float a thread

  static constexpr int kBytes = window_threads(kBucket) * 4;

  __host__ __device__ static constexpr int bytes(const WindowProblem& p) {
    return p.logit_scale == nullptr ? 0 : kBytes;
  }
  __device__ __forceinline__ uint32_t mine() const { return base + WindowTile<kBucket>::thread() * 4; }
  __device__ __forceinline__ void clear() const { store_shared(mine(), 0.f); }
  __device__ __forceinline__ void add(float part) const { store_shared(mine(), load_shared<float>(mine()) + part); }

  // After a barrier.
  __device__ __forceinline__ void write(const WindowProblem& p, float* sums, int share) const {
    if (warp_id() % kTeamWarps != 0 || WindowTile<kBucket>::head() >= p.heads) return;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kTeamWarps; ++w) sum += load_shared<float>(mine() + w * kWarpSize * 4);
    sum = warp_reduce(sum, Sum{});
    // Past the clamp the logit scale is a constant.
    if (load_scalar(p.logit_scale, p.logit_scale_dtype, WindowTile<kBucket>::head()) > kMaxLogitScale) sum = 0.f;
    if (lane_id() == 0) store_global(sums + static_cast<int64_t>(share) * p.heads + WindowTile<kBucket>::head(), sum);
  }
};

// Epilogue of cosine attention for 16 rows of dq or dk, the gradient through the normalisation of q or k: the
// accumulators hold y = sum ds k / |k| (or with q), and the gradient of x / |x| is (y - x (x.y) / |x|^2) / |x|. `of` is
// the tile of x, `norms` the address of the inverse norm of its row `row`, `original` that of the unscaled x, if the
// tile's rows were lengthened. Returns the lane's part of sum (x.y) / |x|, from which the gradient of logit_scale is
// made; rows of no length have none, whatever y.
template <class T, int kN, int kCols>
__device__ __forceinline__ float finish_cosine(float (&acc)[kN][4], SharedTile<kCols> of, int row, int col,
                                               uint32_t norms, uint32_t original) {
  const int lane = opaque_lane(), g = lane / 4, t = lane % 4;
  float total = 0.f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float inverse = load_shared<float>(norms + (g + 8 * r) * 4);
    float dot = 0.f;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const auto x = unpack2<T>(load_shared<uint32_t>(of.pair(row + g + 8 * r, col + 8 * n + 2 * t)));
      dot += x[0] * acc[n][2 * r] + x[1] * acc[n][2 * r + 1];
    }
    if (inverse != 0.f) total += dot * inverse;
    const float along = warp_reduce<4>(dot, Sum{}) * inverse * inverse;
    const float last = load_shared<float>(original + (g + 8 * r) * 4);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const auto x = unpack2<T>(load_shared<uint32_t>(of.pair(row + g + 8 * r, col + 8 * n + 2 * t)));
#pragma unroll
      for (int e = 0; e < 2; ++e) acc[n][2 * r + e] = (acc[n][2 * r + e] - along * x[e]) * last;
    }
  }
  return total;
}

// Multiplies the columns by the inverse norms from the address on.
template <int kN>
__device__ __forceinline__ void scale_columns(float (&s)[kN][4], uint32_t norms) {
  norms += opaque_lane() % 4 * 8;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const auto norm = load_shared<Vec<float, 2>>(norms + 8 * n * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] *= norm[e % 2];
  }
}

// Multiplies the rows by the inverse norms from the address on.
template <int kN>
__device__ __forceinline__ void scale_rows(float (&s)[kN][4], uint32_t norms) {
  norms += opaque_lane() / 4 * 4;
  const float upper = load_shared<float>(norms), lower = load_shared<float>(norms + 8 * 4);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] *= e < 2 ? upper : lower;
  }
}

// Rounds a warp's 16 rows of a gradient to T and writes those of tokens that exist, through the rows of a tile that
// no other warp reads. `data` is the tensor at the image and at the team's head.
template <int kBucket, class T, int kCols>
__device__ __forceinline__ void write_gradient(const float (&acc)[kBucket / 8][4], float factor, SharedTile<kCols> tile,
                                               int row, int col, T* data, int64_t stride, const Rows& rows, int first,
                                               int head_dim) {
  warp_sync();
  store_accumulators<T>(tile, row, col, acc, factor, factor, opaque_lane());
  warp_sync();
  write_token_rows<kBucket>(tile, row, col, data, stride, rows, first, head_dim);
}

}  // namespace warpform
