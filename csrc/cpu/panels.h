// Rows of activations and weights on their way into small products and back: they are widened to float32 where they are
// copied and rounded once where they are stored.
#pragma once

#include "gemm.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Elements between rows of n elements in scratch: whole vectors. Rows that are a multiple of 1 KiB apart would share few
// sets of the cache.
constexpr int64_t row_room(int64_t n) {
  const int64_t whole = round_up(n, kLanes);
  return whole % 256 == 0 ? whole + kLanes : whole;
}

// to[r] = from[r], n elements each. Columns from n on, up to the next multiple of kLanes, are zeros.
template <class T>
WARPFORM_INLINE void load_rows(float* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t rows,
                               int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = to + r * to_stride;
    const T* const source = from + r * from_stride;
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) store(row + c, load(source + c));
    if (c < n) store(row + c, load_first(source + c, n - c));
  }
}

// to[r] = from[r] + bias, n elements each; `bias` may be null.
template <class T>
WARPFORM_INLINE void store_rows(T* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                                int64_t n, const T* bias = nullptr) {
  for (int64_t r = 0; r < rows; ++r) {
    T* const row = to + r * to_stride;
    const float* const source = from + r * from_stride;
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) store(row + c, bias ? load(source + c) + load(bias + c) : load(source + c));
    if (c < n) {
      const Vec v = load(source + c);
      store_first(row + c, bias ? v + load_first(bias + c, n - c) : v, n - c);
    }
  }
}

// sum[c] += the sum of from[r][c] over the rows. `sum` and the rows have room for whole vectors.
WARPFORM_INLINE void add_rows(float* sum, const float* from, int64_t stride, int64_t rows, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) {
    // Four sums side by side: each is short, and none waits for another.
    Vec total[4] = {};
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) total[i] += load(from + (r + i) * stride + c);
    }
    for (; r < rows; ++r) total[0] += load(from + r * stride + c);
    store(sum + c, load(sum + c) + ((total[0] + total[1]) + (total[2] + total[3])));
  }
}

// `depth` rows of n elements become panels of the layout of pack_columns: B of a product with the rows as they are.
template <class T, class Row>
WARPFORM_INLINE void pack_rows(float* panels, int64_t depth, int64_t n, const Row& row) {
  const int64_t panel_rows = round_up(depth, kLanes);
  for (int64_t j = 0; j < n; j += kPanel) {
    float* const panel = panels + j * panel_rows;
    for (int64_t d = 0; d < depth; ++d) {
      const T* const from = row(d) + j;
      for (int64_t c = 0; c < kPanel; c += kLanes) {
        const int64_t left = n - j - c;
        store(panel + d * kPanel + c, left > 0 ? load_first(from + c, left) : Vec{});
      }
    }
  }
}

// C [m, n] = A [m, depth] times panels; zeros where depth is 0.
WARPFORM_INLINE void product(int64_t m, int64_t n, int64_t depth, float* c, int64_t c_stride, const float* a,
                             int64_t a_row, const float* panels) {
  if (depth == 0) {
    for (int64_t r = 0; r < m; ++r) std::memset(c + r * c_stride, 0, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  times_columns(m, n, depth, c, c_stride, a, a_row, 1, panels);
}

// C [m, n] = or += the transpose of A [tokens, m] times B [tokens, n]. Rows of B and C have room for whole vectors.
WARPFORM_INLINE void transposed_product(bool add, int64_t m, int64_t n, int64_t tokens, float* c, int64_t c_stride,
                                        const float* a, int64_t a_stride, const float* b, int64_t b_stride) {
  const int64_t columns = round_up(n, kLanes);
  if (add) {
    times_rows<Into::kAdd>(m, columns, tokens, c, c_stride, a, 1, a_stride, b, b_stride);
  } else {
    times_rows<Into::kSet>(m, columns, tokens, c, c_stride, a, 1, a_stride, b, b_stride);
  }
}

}  // namespace
}  // namespace warpform::cpu::WARPFORM_CPU_ISA
