// Tiles in shared memory and products of tiles by one warp, on mma.sync m16n8k16 with float32 accumulators.
//
// A SharedTile holds 16-bit elements row by row; 16-byte chunk c of row r is stored at chunk c ^ (r % 8), so that the
// eight rows which one ldmatrix reads at the same column lie in eight different groups of four banks.
#pragma once

#include "device/memory.cuh"
#include "device/ptx.cuh"

namespace warpform {

constexpr int kChunk = 8;  // 16-bit elements in 16 bytes

template <int kCols_>
struct SharedTile {
  static constexpr int kCols = kCols_;
  static constexpr int kRowBytes = kCols * 2;
  static_assert(kCols >= 64 && (kCols & (kCols - 1)) == 0, "columns are combined with the lane's offset by XOR");

  uint32_t base;

  __host__ __device__ static constexpr int bytes(int rows) { return rows * kRowBytes; }
  // Address of the eight elements from column 8 c on.
  __device__ __forceinline__ uint32_t chunk(int row, int c) const {
    return base + row * kRowBytes + ((c ^ (row & 7)) << 4);
  }
  // Address of two elements from an even column on.
  __device__ __forceinline__ uint32_t pair(int row, int col) const {
    return chunk(row, col / kChunk) + (col % kChunk) * 2;
  }
};

// The lane as a number that the compiler knows nothing about: addresses that follow from it are computed where
// they are used, in a few instructions, instead of being held in registers through loops around with none to spare.
__device__ __forceinline__ int opaque_lane() { return static_cast<int>(opaque(lane_id())); }

// Copies rows x cols of a matrix in global memory (rows `stride` elements apart, 16-byte aligned, cols a multiple of 8)
// to the first kRows rows of the tile and fills what lies outside with zeros. Asynchronous: commit and wait are the
// caller's.
template <int kRows, int kWidth, int kThreads, class T, int kCols>
__device__ __forceinline__ void copy_tile_async(SharedTile<kCols> tile, const T* src, int64_t stride, int rows,
                                                int cols) {
  constexpr int kRowChunks = kCols / kChunk;
  constexpr int kStep = kThreads / kRowChunks;  // rows that the threads cover at once; each stays in its column
  static_assert(kThreads % kRowChunks == 0 && kRows % kStep == 0, "every thread copies the same number of chunks");
  const int row = static_cast<int>(threadIdx.x) / kRowChunks;
  const int c = static_cast<int>(threadIdx.x) % kRowChunks;
  const T* from = src + row * stride + c * kChunk;
  if (c * kChunk >= kWidth) return;
  if (c * kChunk >= cols) rows = 0;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    cp_async_16(tile.chunk(row + i, c), from, row + i < rows);
    from += kStep * stride;
  }
}

// ---- operands ----

// `row` and `col` are the first of a 16 x 16 tile: row a multiple of 8, col of 16. What depends on the lane is computed
// once, `lane`, and combined with the column by XOR, so that rows become immediate offsets. The products below make it
// opaque: one XOR a load is cheaper than an address register for every column, held through loops with none to spare.

// Lane l gives row l % 16 of the left (l < 16) or right half, for A, or for B by transposing loads.
template <int kCols>
__device__ __forceinline__ uint32_t lane_offset_halves() {
  const int lane = lane_id();
  return (lane % 16) * (kCols * 2) + (((lane / 16) ^ (lane & 7)) << 4);
}

// Lane l gives row l % 8 of the upper (l < 16) or lower 8 rows, left or right half by turns, for transposed operands.
template <int kCols>
__device__ __forceinline__ uint32_t lane_offset_quarters() {
  const int lane = lane_id();
  return (lane / 16 * 8 + lane % 8) * (kCols * 2) + (((lane / 8 % 2) ^ (lane & 7)) << 4);
}

template <int kCols>
__device__ __forceinline__ uint32_t fragment_address(SharedTile<kCols> tile, uint32_t lane, int row, int col) {
  return tile.base + row * SharedTile<kCols>::kRowBytes + (lane ^ (col * 2));
}

// Loads A [16, 16] at (row, col). lane: lane_offset_halves.
template <int kCols>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], SharedTile<kCols> tile, uint32_t lane, int row, int col) {
  ldmatrix_x4(a, fragment_address(tile, lane, row, col));
}

// Loads A [16, 16] from its transpose at (row, col), with transposing ldmatrix. lane: lane_offset_quarters.
template <int kCols>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], SharedTile<kCols> tile, uint32_t lane, int row,
                                                  int col) {
  ldmatrix_x4_trans(a, fragment_address(tile, lane, row, col));
}

// Loads B [16, 16] from its transpose at (row, col): b[0], b[1] are its left 8 columns, b[2], b[3] the right ones.
// lane: lane_offset_quarters.
template <int kCols>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], SharedTile<kCols> tile, uint32_t lane, int row,
                                                  int col) {
  ldmatrix_x4(b, fragment_address(tile, lane, row, col));
}

// Loads B [16, 16] at (row, col), its columns as above. lane: lane_offset_halves.
template <int kCols>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], SharedTile<kCols> tile, uint32_t lane, int row, int col) {
  ldmatrix_x4_trans(b, fragment_address(tile, lane, row, col));
}

// The two elements of T that a register holds.
template <class T>
__device__ __forceinline__ Vec<float, 2> unpack2(uint32_t pair) {
  Vec<T, 2> v;
  __builtin_memcpy(&v, &pair, 4);
  return {{to_float(v[0]), to_float(v[1])}};
}

// The A operand of k-step `step` from the accumulators of another product, rounded to T, without shared memory.
template <class T, int kTiles>
__device__ __forceinline__ void pack_a(uint32_t (&a)[4], const float (&acc)[kTiles][4], int step) {
  a[0] = pack2<T>(acc[2 * step][0], acc[2 * step][1]);
  a[1] = pack2<T>(acc[2 * step][2], acc[2 * step][3]);
  a[2] = pack2<T>(acc[2 * step + 1][0], acc[2 * step + 1][1]);
  a[3] = pack2<T>(acc[2 * step + 1][2], acc[2 * step + 1][3]);
}

// ---- products ----

// Products over more columns than this go by panels and skip those that lie wholly past `valid_cols`. The branch also
// keeps the compiler from loading operands so far ahead that it runs out of registers.
constexpr int kPanel = 64;

// acc[16 kM x 8 kN] += A B^T over kDepth columns of both, from `col` on (a multiple of a power of two >= kDepth): 16 kM
// rows from `row_a` on of tile a, 8 kN from `row_b` on of tile b.
template <class T, int kDepth, int kM, int kN, int kCols>
__device__ __forceinline__ void mma_abt(float (&acc)[kM][kN][4], SharedTile<kCols> a, int row_a, SharedTile<kCols> b,
                                        int row_b, int valid_cols, int col = 0) {
  static_assert(kDepth % 16 == 0 && kDepth <= kCols, "whole steps within the tile");
  static_assert(kN % 2 == 0, "B comes in pairs of 8 columns");
  const uint32_t lane_a = opaque(lane_offset_halves<kCols>() ^ (col * 2));
  const uint32_t lane_b = opaque(lane_offset_quarters<kCols>() ^ (col * 2));
#pragma unroll
  for (int panel = 0; panel < kDepth; panel += kPanel) {
    if (kDepth <= kPanel || panel < valid_cols) {
#pragma unroll
      for (int k = panel; k < panel + kPanel && k < kDepth; k += 16) {
        uint32_t fa[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) load_a(fa[m], a, lane_a, row_a + 16 * m, k);
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
          uint32_t fb[4];
          load_b_transposed(fb, b, lane_b, row_b + 8 * n, k);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            mma_m16n8k16<T>(acc[m][n], fa[m], fb[0], fb[1]);
            mma_m16n8k16<T>(acc[m][n + 1], fa[m], fb[2], fb[3]);
          }
        }
      }
    }
  }
}

// acc[16 kM x 8 kN] += A[16 kM x 16 kSteps] B, B's rows from `row` on of the tile, its columns from `col` on;
// left(m, step, a) gives A's fragments.
template <class T, int kSteps, int kM, int kN, int kCols, class Left>
__device__ __forceinline__ void mma_ab(float (&acc)[kM][kN][4], Left&& left, SharedTile<kCols> b, int row, int col,
                                       int valid_cols) {
  static_assert(kN % 2 == 0, "B comes in pairs of 8 columns");
  constexpr int kPanelTiles = kPanel / 8;
  const uint32_t lane = opaque(lane_offset_halves<kCols>());
#pragma unroll
  for (int panel = 0; panel < kN; panel += kPanelTiles) {
    if (kN <= kPanelTiles || col + 8 * panel < valid_cols) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t fa[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) left(m, step, fa[m]);
#pragma unroll
        for (int n = panel; n < panel + kPanelTiles && n < kN; n += 2) {
          uint32_t fb[4];
          load_b(fb, b, lane, row + 16 * step, col + 8 * n);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            mma_m16n8k16<T>(acc[m][n], fa[m], fb[0], fb[1]);
            mma_m16n8k16<T>(acc[m][n + 1], fa[m], fb[2], fb[3]);
          }
        }
      }
    }
  }
}

// Rounds accumulators to T, as left operands: half the registers, and no shared memory between two products.
template <class T, int kM, int kTiles>
__device__ __forceinline__ void pack_accumulators(uint32_t (&a)[kM][kTiles / 2][4], const float (&acc)[kM][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int step = 0; step < kTiles / 2; ++step) pack_a<T>(a[m][step], acc[m], step);
  }
}

// acc += A B as above, A from pack_accumulators, B's rows from 0 on.
template <class T, int kM, int kN, int kSteps, int kCols>
__device__ __forceinline__ void mma_packed_b(float (&acc)[kM][kN][4], const uint32_t (&a)[kM][kSteps][4],
                                             SharedTile<kCols> b, int col, int valid_cols) {
  mma_ab<T, kSteps>(
      acc,
      [&](int m, int step, uint32_t (&fragment)[4]) {
#pragma unroll
        for (int r = 0; r < 4; ++r) fragment[r] = a[m][step][r];
      },
      b, 0, col, valid_cols);
}

// Writes 16 rows from `row` on, from packed accumulators.
template <int kSteps, int kCols>
__device__ __forceinline__ void store_packed(SharedTile<kCols> tile, int row, const uint32_t (&a)[kSteps][4]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) store_shared(tile.pair(row + g + r % 2 * 8, 16 * step + r / 2 * 8 + 2 * t), a[step][r]);
  }
}

// Visits the accumulators of kM x kN tiles of 16 x 8; element e of lane 4 g + t is in row g + 8 (e / 2), column 2 t + e
// % 2.
template <int kM, int kN, class F>
__device__ __forceinline__ void for_each_accumulator(F&& f) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(m, n, e);
    }
  }
}

// Rounds the accumulators of one warp, times `factor`, to T, into the tile at (row, col). In a loop, with
// opaque_lane().
template <class T, int kN, int kCols>
__device__ __forceinline__ void store_accumulators(SharedTile<kCols> tile, int row, int col, const float (&acc)[kN][4],
                                                   float factor0, float factor1, int lane = lane_id()) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    store_shared(tile.pair(row + g, col + 8 * n + 2 * t), pack2<T>(acc[n][0] * factor0, acc[n][1] * factor0));
    store_shared(tile.pair(row + g + 8, col + 8 * n + 2 * t), pack2<T>(acc[n][2] * factor1, acc[n][3] * factor1));
  }
}

// One warp writes 16 rows of the tile, columns [col, col + width), to global memory, as far as `rows` and `cols` reach.
// dst is where the tile's row `row`, column 0 goes; rows are `stride` elements apart there.
template <class T, int kWidth, int kCols>
__device__ __forceinline__ void write_rows(SharedTile<kCols> tile, int row, int col, T* dst, int64_t stride, int rows,
                                           int cols) {
  constexpr int kRowChunks = kWidth / kChunk;
#pragma unroll
  for (int i = 0; i < 16 * kRowChunks / kWarpSize; ++i) {
    const int index = lane_id() + i * kWarpSize;
    const int r = index / kRowChunks;
    const int c = col / kChunk + index % kRowChunks;
    if (r < rows && c * kChunk < cols) {
      store_global(reinterpret_cast<uint4*>(dst + r * stride + c * kChunk), load_shared<uint4>(tile.chunk(row + r, c)));
    }
  }
}

}  // namespace warpform
