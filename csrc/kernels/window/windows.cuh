// The windows of a shifted, padded grid as index arithmetic: which token is where. Nothing is rolled, padded or
// partitioned in memory.
//
// The grid is padded at the end of each axis to whole windows and rolled by -shift, so place r of the rolled axis is
// place r + shift of the padded one, modulo its length. Only the last window of an axis holds tokens from both of its
// ends: its places before and from window - shift on belong to different regions, which do not see each other.
//
// A CTA keeps two facts about each token of its window in shared memory: where its row is, which changes from window to
// window, and its place in the bias table and its regions, which do not change.
#pragma once

#include "device/memory.cuh"
#include "device/mma.cuh"
#include "device/ptx.cuh"
#include "window/launch.h"

namespace warpform {

constexpr int kBlock = kWindowBlock;
constexpr int kTeamWarps = 4;  // 16 rows each: they work on one head, and are called a team
constexpr int kTeamThreads = kTeamWarps * 32;

// A head dimension runs in the smallest bucket of 32, 64 and 128 that holds it, over zeros past head_dim. A tile has 64
// columns, so that a token's row is at least 128 contiguous bytes in the bucket of 32 too: there two heads share it,
// and two teams the CTA.
__host__ __device__ constexpr int window_bucket(int head_dim) {
  return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : 128;
}
__host__ __device__ constexpr int window_teams(int bucket) { return bucket == 32 ? 2 : 1; }
__host__ __device__ constexpr int window_cols(int bucket) { return bucket == 128 ? 128 : 64; }
__host__ __device__ constexpr int window_threads(int bucket) { return window_teams(bucket) * kTeamThreads; }

// One window of one image.
struct Window {
  int image;
  int origin[3];  // in the rolled grid
  int cut;        // the axes, as bits, on which it is the last and so, if shifted, in two regions
};
__device__ __forceinline__ Window window_at(const WindowProblem& p, int index) {
  const int rest_x = p.count[2].quotient(index), x = index - rest_x * p.count[2].divisor;
  const int rest_y = p.count[1].quotient(rest_x), y = rest_x - rest_y * p.count[1].divisor;
  const int image = p.count[0].quotient(rest_y), z = rest_y - image * p.count[0].divisor;
  Window w;
  w.image = image;
  w.origin[0] = z * p.window[0];
  w.origin[1] = y * p.window[1];
  w.origin[2] = x * p.window[2];
  w.cut = (z == p.count[0].divisor - 1 && p.shift[0] > 0 ? 1 : 0) |
          (y == p.count[1].divisor - 1 && p.shift[1] > 0 ? 2 : 0) |
          (x == p.count[2].divisor - 1 && p.shift[2] > 0 ? 4 : 0);
  return w;
}

constexpr int kPlaceBits = 10;  // of a token's place on one axis
static_assert(kMaxWindow <= 1 << kPlaceBits, "three places fit one int");
constexpr int kPadded = -1;   // a position past the end of the grid: its q, k and v are qkv_bias
constexpr int kOutside = -2;  // past the window's last token: zeros

// The rows of a window's tokens, in shared memory: an int a token.
struct Rows {
  uint32_t base;

  // Number of the token in its image, or kPadded or kOutside.
  __device__ __forceinline__ int operator[](int token) const { return load_shared<int>(base + token * 4); }
};

// The facts about the tokens of a window that hold for every window, in shared memory: three arrays of `capacity` ints,
// whole blocks.
struct Tokens {
  uint32_t base;
  int capacity;

  __host__ __device__ static constexpr int bytes(int capacity) { return capacity * 12; }

  // Address of a token's place in the bias table: 4 sum of place x stride over the axes. The addresses of neighbours
  // follow each other.
  __device__ __forceinline__ uint32_t place(int token) const { return base + token * 4; }
  // Address of its regions, a bit an axis.
  __device__ __forceinline__ uint32_t regions(int token) const { return base + (capacity + token) * 4; }
  // Address of its place in the window, kPlaceBits an axis; negative past the window's last token.
  __device__ __forceinline__ uint32_t axes(int token) const { return base + (2 * capacity + token) * 4; }

  template <int kThreads>
  __device__ __forceinline__ void set(const WindowProblem& p) const {
    const int stride1 = 2 * p.window[2] - 1, stride0 = stride1 * (2 * p.window[1] - 1);
    for (int i = static_cast<int>(threadIdx.x); i < capacity; i += kThreads) {
      const int token = i < p.tokens ? i : 0;
      const int axis[3] = {token / p.window[2] / p.window[1], token / p.window[2] % p.window[1], token % p.window[2]};
      int bits = 0, packed = 0;
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        bits |= axis[k] >= p.window[k] - p.shift[k] ? 1 << k : 0;
        packed |= axis[k] << (k * kPlaceBits);
      }
      store_shared(place(i), 4 * (axis[0] * stride0 + axis[1] * stride1 + axis[2]));
      store_shared(regions(i), bits);
      store_shared(axes(i), i < p.tokens ? packed : -1);
    }
  }

  // Sets the rows of a window. Each thread reads only what it has set itself.
  template <int kThreads>
  __device__ __forceinline__ void set_rows(const Rows& rows, const WindowProblem& p, const Window& w) const {
    for (int i = static_cast<int>(threadIdx.x); i < capacity; i += kThreads) {
      const int packed = load_shared<int>(axes(i));
      int row = 0;
      bool in_grid = true;
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        int at = w.origin[k] + p.shift[k] + (packed >> (k * kPlaceBits) & ((1 << kPlaceBits) - 1));
        const int padded = p.count[k].divisor * p.window[k];
        if (at >= padded) at -= padded;
        in_grid = in_grid && at < p.size[k];
        row = row * p.size[k] + at;
      }
      if (!in_grid) row = kPadded;
      if (packed < 0) row = kOutside;
      store_shared(rows.base + i * 4, row);
    }
  }
};

// The columns of a CTA's heads in a tensor whose rows are tokens.
template <class T>
struct TokenRows {
  const T* data;     // row 0 of the image, first of the columns
  int64_t stride;    // from token to token
  const T* padding;  // the row of padded positions, or null for zeros
};

// Number of the image's first token, a product that is made again wherever it is needed (see WindowTile).
__device__ __forceinline__ int64_t image_begin(const WindowProblem& p, int image) {
  return static_cast<int>(opaque(image)) * p.image_tokens;
}

// q, k or v (`which`: 0, 1, 2) of an image from head `first_head` on.
template <class T>
__device__ __forceinline__ TokenRows<T> qkv_rows(const WindowProblem& p, int which, int image, int first_head) {
  const int64_t at = which * p.width + first_head * p.head_dim;
  const T* padding = p.qkv_bias == nullptr ? nullptr : static_cast<const T*>(p.qkv_bias) + at;
  return {static_cast<const T*>(p.qkv) + image_begin(p, image) * 3 * p.width + at, 3 * p.width, padding};
}

// The same of a tensor shaped as the output; zeros at padded positions, which no kernel reads.
template <class T>
__device__ __forceinline__ TokenRows<T> out_rows(const WindowProblem& p, const void* data, int image, int first_head) {
  return {static_cast<const T*>(data) + image_begin(p, image) * p.width + first_head * p.head_dim, p.width, nullptr};
}

// The part of a tile that the calling thread works on. Numbers that follow from the thread's own are computed at each
// call, as opaque_lane() is: held through the loops, they would be spilled.
template <int kBucket>
struct WindowTile {
  static constexpr int kTeams = window_teams(kBucket);

  __device__ static __forceinline__ int thread() { return static_cast<int>(opaque(threadIdx.x)); }
  __device__ static __forceinline__ int team() { return kTeams == 1 ? 0 : thread() / kTeamThreads; }
  // Heads of the CTA: the first, and how many there are.
  __device__ static __forceinline__ int first_head() { return static_cast<int>(blockIdx.y) * kTeams; }
  __device__ static __forceinline__ int heads(const WindowProblem& p) { return min(kTeams, p.heads - first_head()); }
  // The team's head. It may be past the last one: then the team only helps to load.
  __device__ static __forceinline__ int head() { return first_head() + team(); }
  // The column of the tiles at which the head begins.
  __device__ static __forceinline__ int col() { return team() * kBucket; }
  // First of the warp's 16 rows.
  __device__ static __forceinline__ int row() { return thread() / kWarpSize % kTeamWarps * 16; }
};

// Copies the rows of kBlock tokens from `first` on to a tile: of each head of the CTA head_dim columns into its
// kBucket. Zeros past head_dim, past the last head, and for tokens that are not there. Asynchronous: commit and wait
// are the caller's.
template <int kBucket, class T, int kCols>
__device__ __forceinline__ void copy_rows_async(SharedTile<kCols> tile, const TokenRows<T>& from, const Rows& rows,
                                                int first, const WindowProblem& p) {
  constexpr int kRowChunks = kCols / kChunk, kHeadChunks = kBucket / kChunk;
  constexpr int kStep = window_threads(kBucket) / kRowChunks;
  const int thread = WindowTile<kBucket>::thread();
  const int c = thread % kRowChunks;
  const int head = c / kHeadChunks, col = c % kHeadChunks * kChunk;
  const bool wanted = head < WindowTile<kBucket>::heads(p) && col < p.head_dim;
  const int at = head * p.head_dim + col;
#pragma unroll
  for (int i = 0; i < kBlock; i += kStep) {
    const int r = i + thread / kRowChunks;
    const int row = rows[first + r];
    const T* data = row >= 0 ? from.data + row * from.stride : from.padding;
    cp_async_16(tile.chunk(r, c), data + at, wanted && (row >= 0 || (row == kPadded && from.padding != nullptr)));
  }
}

// One warp writes 16 rows of a tile, its team's columns from `col` on, to the rows of the tokens from `first` on that
// exist. `data` as in TokenRows, at the team's head.
template <int kBucket, class T, int kCols>
__device__ __forceinline__ void write_token_rows(SharedTile<kCols> tile, int row, int col, T* data, int64_t stride,
                                                 const Rows& rows, int first, int head_dim) {
  constexpr int kHeadChunks = kBucket / kChunk;
  const int lane = opaque_lane();
#pragma unroll
  for (int i = 0; i < 16 * kHeadChunks / kWarpSize; ++i) {
    const int index = lane + i * kWarpSize;
    const int r = index / kHeadChunks, c = index % kHeadChunks;
    const int to = rows[first + r];
    if (to >= 0 && c * kChunk < head_dim) {
      store_global(reinterpret_cast<uint4*>(data + to * stride + c * kChunk),
                   load_shared<uint4>(tile.chunk(row + r, col / kChunk + c)));
    }
  }
}

// A scalar parameter as float32.
__device__ __forceinline__ float load_scalar(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat16: return to_float(load_global(static_cast<const half_t*>(data) + at));
    case DType::kBFloat16: return to_float(load_global(static_cast<const bf16_t*>(data) + at));
    default: return load_global(static_cast<const float*>(data) + at);
  }
}

}  // namespace warpform
