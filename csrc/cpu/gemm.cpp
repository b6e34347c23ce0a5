// The tiles of gemm.h and the packing of columns.
#include "gemm.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

template <int kRows, int kVectors, Into kInto>
WARPFORM_INLINE void gemm_tile(float* c, int64_t c_stride, const float* a, int64_t a_row, int64_t a_column,
                               const float* b, int64_t b_stride, int64_t inner, const float* scale) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec{};
#pragma GCC unroll 1
  for (int64_t k = 0; k < inner; ++k) {
    Vec row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(a[r * a_row + k * a_column]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* const at = c + r * c_stride + v * kLanes;
      if constexpr (kInto == Into::kSet) store(at, sum[r][v]);
      if constexpr (kInto == Into::kAdd) store(at, load(at) + sum[r][v]);
      if constexpr (kInto == Into::kScaled) store(at, load(at) * scale[r] + sum[r][v]);
    }
}

// kVectors vectors of columns and any number of rows. A tile of one row waits for its own sums, so what is left after full
// tiles is two that are nearly even: 7 rows are 4 and 3, not 6 and 1.
template <int kRows, int kVectors, Into kInto>
__attribute__((noinline)) void gemm_rows(int64_t m, float* c, int64_t c_stride, const float* a, int64_t a_row,
                                         int64_t a_column, const float* b, int64_t b_stride, int64_t inner,
                                         const float* scale) {
  int64_t i = 0;
  const auto scale_at = [&](int64_t row) { return kInto == Into::kScaled ? scale + row : nullptr; };
  for (; m - i == kRows || m - i >= 2 * kRows - 1; i += kRows) {
    gemm_tile<kRows, kVectors, kInto>(c + i * c_stride, c_stride, a + i * a_row, a_row, a_column, b, b_stride, inner,
                                      scale_at(i));
  }
  if constexpr (kRows > 1) {
    if (i < m) {
      gemm_rows<kRows - 1, kVectors, kInto>(m - i, c + i * c_stride, c_stride, a + i * a_row, a_row, a_column, b,
                                            b_stride, inner, scale_at(i));
    }
  }
}

template <Into kInto>
void gemm_columns(int64_t m, int64_t vectors, float* c, int64_t c_stride, const float* a, int64_t a_row,
                  int64_t a_column, const float* b, int64_t b_stride, int64_t inner, const float* scale) {
  int64_t v = 0;
  const auto columns = [&]<int kVectors>() {
    gemm_rows<tile_rows(kVectors), kVectors, kInto>(m, c + v * kLanes, c_stride, a, a_row, a_column, b + v * kLanes,
                                                    b_stride, inner, scale);
  };
  for (; v + kTileVectors <= vectors; v += kTileVectors) columns.template operator()<kTileVectors>();
  if constexpr (kTileVectors > 2) {
    if (vectors - v == 3) columns.template operator()<3>();
    if (vectors - v == 2) columns.template operator()<2>();
  }
  if (vectors - v == 1) columns.template operator()<1>();
}

template <class T>
void pack(float* to, const T* const* rows, int64_t depth, int64_t ahead) {
  for (int64_t d = 0; d < depth; d += kLanes) {
    const bool whole = d + kLanes <= depth;
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const T* const from = rows[i];
      if (from == nullptr) {
        block[i] = Vec{};
        continue;
      }
      if (ahead != 0) __builtin_prefetch(from + d + ahead);
      block[i] = whole ? load(from + d) : load_first(from + d, depth - d);
    }
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(to + (d + i) * kPanel, block[i]);
  }
}

}  // namespace

void gemm(Into into, int64_t m, int64_t vectors, float* c, int64_t c_stride, const float* a, int64_t a_row,
          int64_t a_column, const float* b, int64_t b_stride, int64_t inner, const float* scale) {
  const auto call = [&]<Into kInto>() {
    gemm_columns<kInto>(m, vectors, c, c_stride, a, a_row, a_column, b, b_stride, inner, scale);
  };
  switch (into) {
    case Into::kSet: call.template operator()<Into::kSet>(); break;
    case Into::kAdd: call.template operator()<Into::kAdd>(); break;
    case Into::kScaled: call.template operator()<Into::kScaled>(); break;
  }
}

void pack_row_group(float* to, const float* const* rows, int64_t depth, int64_t ahead) { pack(to, rows, depth, ahead); }
void pack_row_group(float* to, const Float16* const* rows, int64_t depth, int64_t ahead) {
  pack(to, rows, depth, ahead);
}
void pack_row_group(float* to, const BFloat16* const* rows, int64_t depth, int64_t ahead) {
  pack(to, rows, depth, ahead);
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
