// Small products for kernels that keep their operands in L1 and L2: C [m, n] from A, read element by element at any two
// strides, and B, rows of whole vectors. A tile of C stays in registers while the inner dimension goes by: with AVX-512
// 6 rows of 4 vectors (24 of 32 registers), with AVX2 6 rows of 2. Rows that are left over are a smaller tile of their own,
// not padding.
//
// Sums start at 0 and what C held is added last: a chain that began at it would round at its size. Chains longer than
// kChain are for the caller to cut; with one of 256 products an attention of head_dim 256 was off by more than its bound.
#pragma once

#include "simd.h"
#include "threads.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {

// How a product goes into C.
enum class Into {
  kSet,     // C = A B
  kAdd,     // C = C + A B
  kScaled,  // C = C * scale[row] + A B
};

// gemm.cpp has what follows, once for each instruction set: its tiles are the better part of a kernel's compile time.

// C [m, vectors * kLanes]. A's element (row, k) is a[row * a_row + k * a_column], B's row k is b + k * b_stride. `scale`
// has m elements and is read for kScaled alone.
void gemm(Into into, int64_t m, int64_t vectors, float* c, int64_t c_stride, const float* a, int64_t a_row,
          int64_t a_column, const float* b, int64_t b_stride, int64_t inner, const float* scale);

// kLanes rows of `depth` elements, null for rows of zeros, become columns: to[d * kPanel + i] = rows[i][d]. Rows of `to`
// from depth on, up to the next multiple of kLanes, are zeros. What lies `ahead` elements after a row is fetched for later.
void pack_row_group(float* to, const float* const* rows, int64_t depth, int64_t ahead);
void pack_row_group(float* to, const Float16* const* rows, int64_t depth, int64_t ahead);
void pack_row_group(float* to, const BFloat16* const* rows, int64_t depth, int64_t ahead);

namespace {

constexpr int kChain = 64;

// The widest tile, in vectors, and the rows of tiles of each width.
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;
constexpr int tile_rows(int vectors) {
  if (kRegisters == 32) return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
  return vectors == 2 ? 6 : 8;
}
// Columns of a panel: B is packed into panels as wide as a tile, each contiguous. Rows of a wider matrix would lie 2 KiB
// apart and share 8 sets of the cache.
constexpr int kPanel = kTileVectors * kLanes;

template <Into kInto>
WARPFORM_INLINE void gemm(int64_t m, int64_t vectors, float* c, int64_t c_stride, const float* a, int64_t a_row,
                          int64_t a_column, const float* b, int64_t b_stride, int64_t inner,
                          const float* scale = nullptr) {
  gemm(kInto, m, vectors, c, c_stride, a, a_row, a_column, b, b_stride, inner, scale);
}

// `rows` rows of `depth` elements become the columns of panels [ceil(rows / kPanel)][depth rounded up to kLanes][kPanel]:
// B of a product with the transpose. Columns past the last row are zeros up to the next multiple of kLanes, and so are a
// panel's rows from depth on; further columns of the last panel are not set. row(i) gives the address of row i; what lies
// `ahead` elements after it is fetched for later.
template <class T, class Row>
WARPFORM_INLINE void pack_columns(float* panels, int64_t rows, int64_t depth, const Row& row, int64_t ahead = 0) {
  const int64_t panel_rows = round_up(depth, kLanes);
  for (int64_t i0 = 0; i0 < rows; i0 += kLanes) {
    float* const base = panels + i0 / kPanel * kPanel * panel_rows + i0 % kPanel;
    const T* group[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) group[i] = i0 + i < rows ? row(i0 + i) : nullptr;
    pack_row_group(base, group, depth, ahead);
  }
}
constexpr int64_t packed_columns(int64_t rows, int64_t depth) {
  return round_up(rows, kPanel) * round_up(depth, kLanes);
}

// C [m, n] = A [m, depth] times packed columns, or C + that. Rows of C have room for n rounded up to kLanes. Chains of the
// inner dimension are cut at kChain.
template <Into kInto = Into::kSet>
WARPFORM_INLINE void times_columns(int64_t m, int64_t n, int64_t depth, float* c, int64_t c_stride, const float* a,
                                   int64_t a_row, int64_t a_column, const float* panels) {
  const int64_t panel_rows = round_up(depth, kLanes);
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t vectors = ceil_div(smaller(n - j, kPanel), kLanes);
    for (int64_t d = 0; d < depth; d += kChain) {
      const float* const b = panels + j * panel_rows + d * kPanel;
      const int64_t inner = smaller(depth - d, kChain);
      if (d == 0) {
        gemm<kInto>(m, vectors, c + j, c_stride, a, a_row, a_column, b, kPanel, inner);
      } else {
        gemm<Into::kAdd>(m, vectors, c + j, c_stride, a + d * a_column, a_row, a_column, b, kPanel, inner);
      }
    }
  }
}

// C [m, n] (+)= A [m, depth] times rows of B as they lie, n a multiple of kLanes, chains cut at kChain.
template <Into kInto = Into::kSet>
WARPFORM_INLINE void times_rows(int64_t m, int64_t n, int64_t depth, float* c, int64_t c_stride, const float* a,
                                int64_t a_row, int64_t a_column, const float* b, int64_t b_stride,
                                const float* scale = nullptr) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t vectors = smaller(n - j, kPanel) / kLanes;
    // A chain's rows of B stay in L1 while all rows of A go by.
    for (int64_t d = 0; d < depth; d += kChain) {
      const int64_t inner = smaller(depth - d, kChain);
      const float* const rows = b + d * b_stride + j;
      if (d == 0) {
        gemm<kInto>(m, vectors, c + j, c_stride, a, a_row, a_column, rows, b_stride, inner, scale);
      } else {
        gemm<Into::kAdd>(m, vectors, c + j, c_stride, a + d * a_column, a_row, a_column, rows, b_stride, inner);
      }
    }
  }
}

}  // namespace
}  // namespace warpform::cpu::WARPFORM_CPU_ISA
