// Every row of [rows, outer * inner], a matrix [outer, inner] of 16-bit elements, transposed: the permutation around
// the second factor of a Monarch matrix, where no product can do it by the way.
//
// Tile      One row a CTA, or a part of its outer index where a row is too long for shared memory.
// Loads     4 bytes a lane, into shared memory in rows of an odd number of 4-byte words, which are read across, so that
//           neither way has more than two-fold bank conflicts.
// Bounds    4 rows outer inner bytes.
// Measured  not yet.
#pragma once

#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "monarch/launch.h"

namespace warpform {

constexpr int kTransposeThreads = 256;
constexpr int kTransposeBytes = 32 * 1024;  // of shared memory, or a little more for rows of few, long lines

// 16-bit elements between lines of `inner` in shared memory.
__host__ __device__ constexpr int transpose_pitch(int inner) { return 2 * ((inner + 1) / 2 | 1); }

struct TransposeRowsWork {
  TransposeRowsParams p;
  int lines;      // outer indices of a CTA, even or all of them
  Divisor parts;  // of a row
  Divisor by_inner;
};

static __global__ void __launch_bounds__(kTransposeThreads) transpose_rows(
    const __grid_constant__ TransposeRowsWork work) {
  const TransposeRowsParams& p = work.p;
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int row = work.parts.quotient(block);
  const int first = (block - row * work.parts.divisor) * work.lines;
  const int lines = min(work.lines, p.outer - first);
  const int pitch = transpose_pitch(p.inner), count = lines * p.inner;
  const uint32_t shared = shared_base();
  using Pair = Vec<uint16_t, 2>;

  const auto* in = static_cast<const uint16_t*>(p.in) + row * p.in_stride + int64_t{first} * p.inner;
  for (int e = 2 * thread; e < count; e += 2 * kTransposeThreads) {
    const Pair pair = load_global(reinterpret_cast<const Pair*>(in + e));
    int i = work.by_inner.quotient(e);
    int j = e - i * p.inner;
    store_shared(shared + (i * pitch + j) * 2, pair.v[0]);
    if (++j == p.inner) ++i, j = 0;
    store_shared(shared + (i * pitch + j) * 2, pair.v[1]);
  }
  block_sync();

  auto* out = static_cast<uint16_t*>(p.out) + static_cast<int64_t>(row) * p.outer * p.inner + first;
  const int step = p.outer % 2 == 0 ? 2 : 1;  // elements of a store
  for (int e = step * thread; e < count; e += step * kTransposeThreads) {
    const int j = e / lines;
    const int i = e - j * lines;
    const uint32_t from = shared + (i * pitch + j) * 2;
    uint16_t* to = out + int64_t{j} * p.outer + i;
    if (step == 2) {
      store_global(reinterpret_cast<Pair*>(to),
                   Pair{{load_shared<uint16_t>(from), load_shared<uint16_t>(from + pitch * 2)}});
    } else {
      store_global(to, load_shared<uint16_t>(from));
    }
  }
}

}  // namespace warpform
