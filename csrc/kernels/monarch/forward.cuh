// A Monarch product in one pass, y[sigma l + lambda] = sum_rho w2[lambda, sigma, rho] h[rho l + lambda] with
// h[kappa q + theta] = sum_i w1[kappa, theta, i] x[kappa p + i] (Dao et al., arXiv 2204.00595): h never leaves the
// chip. In the code w1 is [blocks1, rows1, cols1] = [k, q, p] and w2 is [blocks2, rows2, cols2] = [l, s, r].
//
// Tile      64 rows (tokens) and a chunk of lambdas: all of them where their h, 64 rows of r columns each, fits into
//           shared memory, so that x is read once; else a multiple of 8, and CTAs of the other chunks read x again,
//           from L2. Four warps.
// First     For each kappa the copies gather the rows of w1 that meet the chunk, theta with (kappa q + theta) mod l in
//           it. The product goes to h as [lambda][rho], rounded to T: the left operand of the second product, so the
//           permutation costs nothing.
// Second    A warp has 32 rows and, of kLambdas neighbouring lambdas, 32 (16) sigmas: a lane then holds the same sigmas
//           of all of them, 4 lambdas of 2 sigmas or 8 of one, which are 16 bytes in a row of y. So y is stored from
//           registers although a product's columns lie l apart.
// Loads     All threads copy with 16-byte cp.async, x and w1 in two or four stages, w2 in two of 256 rows by 64. h is
//           written 4 bytes a lane where q / l is even, else 2: at q = l with four-fold bank conflicts, some 130 cycles
//           a row at 1024^2 nb 32, where an SM has 220 for the row's bytes.
// Bounds    Bytes 2 (k p + l s) a row, FLOP 2 k q p + 2 l s r. Floors on an H200 (4.3 TB/s; mma.sync at 490 TFLOP/s),
//           ns a row: 768 -> 3072 nb 4 3.0, 3072 -> 768 nb 4 3.0, 1024^2 nb 4 2.1 (FLOP); 1024^2 nb 32 0.95, 4096^2 nb
//           64 3.81 (bytes). Weights come from L2 once for 64 rows: 23, 23, 16, 2 and 16 KB a row, x 1, 1, 1, 1 and 4
//           times.
// Measured  H100 80GB HBM3, bfloat16, 16384 rows: 768 -> 3072 nb 4 247 us, 98 TFLOP/s, 17 % of the floor; 1024^2 nb 4
//           156 us, 110 TFLOP/s, 15 %; 1024^2 nb 32 138 us, 487 GB/s, 16 %. One CTA an SM, tensor pipe 16 %.
#pragma once

#include "device/block_tile.cuh"
#include "monarch/launch.h"

namespace warpform {

// kLambdas: that a warp has side by side, 4 or 8.
template <int kLambdas_>
struct MonarchTile {
  static constexpr int kLambdas = kLambdas_;
  static constexpr int kM = 64, kThreads = 128, kDepth = 64;
  using Tile = SharedTile<kDepth>;

  // The first product: few columns a kappa where there are many lambdas, so that the warps divide the rows.
  static constexpr int kStages1 = kLambdas == 4 ? 2 : 4;
  static constexpr int kWarpsN1 = kLambdas == 4 ? 2 : 1;
  static constexpr int kWarpM1 = kM / (4 / kWarpsN1), kWarpN1 = 64;
  static constexpr int kN1 = kWarpsN1 * kWarpN1;
  static constexpr int kStageBytes1 = Tile::bytes(kM + kN1);

  // The second product.
  static constexpr int kStages2 = 2;
  static constexpr int kWarpM2 = 32, kWarpN2 = 128 / kLambdas;
  static constexpr int kN2 = 2 * kWarpN2;
  static constexpr int kStageBytes2 = Tile::bytes(kLambdas * kN2);

  static constexpr int kStageBytes =
      kStages1 * kStageBytes1 > kStages2* kStageBytes2 ? kStages1 * kStageBytes1 : kStages2 * kStageBytes2;
  // Shared memory with h_cols columns of h, in tiles of 64 columns.
  static constexpr int bytes(int h_cols) { return kStageBytes + ceil_div(h_cols, kDepth) * Tile::bytes(kM); }
};

struct MonarchWork {
  MonarchParams p;
  Divisor chunks;  // of lambdas
  int chunk;       // lambdas in one, a multiple of the tile's or all
  int pitch;       // columns of h a lambda: r, to a multiple of 16
  Divisor run;     // rhos of one lambda that one kappa can meet
  bool pairs;      // rhos come in pairs that lie beside each other: run is even, and l divides q
};

// h: [64 rows][lambda of the chunk][pitch], in tiles of 64 columns.
struct MonarchMiddle {
  uint32_t base;

  using Tile = SharedTile<64>;
  __device__ __forceinline__ Tile tile(int col) const { return {base + col / 64 * Tile::bytes(64)}; }
  __device__ __forceinline__ uint32_t address(int row, int col) const {
    return tile(col).chunk(row, col % 64 / kChunk) + col % kChunk * 2;
  }
};

// Rows of a matrix, `stride` apart, 64 columns of which the first `cols` exist, to a tile of kCount rows. row(i) gives
// the row in memory of the tile's row i, or one of these.
constexpr int kZeros = -1, kUnused = -2;

template <int kCount, int kThreads, class T, class Row>
__device__ __forceinline__ void copy_gathered_async(SharedTile<64> tile, const T* src, int64_t stride, int cols,
                                                    Row&& row) {
  const int c = static_cast<int>(threadIdx.x) % 8;
  const bool inside = c * kChunk < cols;
#pragma unroll
  for (int i = 0; i < kCount; i += kThreads / 8) {
    const int at = i + static_cast<int>(threadIdx.x) / 8;
    const int from = row(at);
    if (from == kUnused) continue;
    cp_async_16(tile.chunk(at, c), src + (from < 0 ? 0 : from) * stride + c * kChunk, inside && from >= 0);
  }
}

// The first product: h of the CTA's chunk of lambdas.
template <class T, class Tile>
__device__ __forceinline__ void monarch_first(const MonarchWork& work, MonarchMiddle h, int64_t first_row, int rows,
                                              int first_lambda, int lambdas) {
  constexpr int kM = Tile::kWarpM1 / 16, kN = Tile::kWarpN1 / 8, kDepth = Tile::kDepth;
  const MonarchParams& p = work.p;
  const int run = work.run.divisor, cols = lambdas * run;

  struct Step {
    int kappa, col, depth;
    __device__ __forceinline__ void advance(const MonarchParams& p, int cols) {
      depth += kDepth;
      if (depth < p.cols1) return;
      depth = 0;
      col += Tile::kN1;
      if (col < cols) return;
      col = 0, ++kappa;
    }
  };
  const int steps = p.blocks1 * ceil_div(cols, Tile::kN1) * max(1, ceil_div(p.cols1, kDepth));  // nothing deep: zeros
  Step now{0, 0, 0}, ahead{0, 0, 0};

  // Column n of kappa's product: lambda n / run of the chunk, rho n % run past the first that kappa meets. The index
  // into h, kappa q + theta, is that of a row of w1, too.
  struct Place {
    int lambda, rho, index;
    bool inside;
  };
  const auto place = [&](int kappa, int first_rho, int n) {
    const int first = kappa * p.rows1, lambda = work.run.quotient(n), rho = first_rho + n - lambda * run;
    const int index = rho * p.blocks2 + first_lambda + lambda;
    return Place{lambda, rho, index, lambda < lambdas && index >= first && index < first + p.rows1};
  };
  const auto tile_x = [](int stage) { return SharedTile<64>{shared_base() + stage * Tile::kStageBytes1}; };
  const auto tile_w = [](int stage) {
    return SharedTile<64>{shared_base() + stage * Tile::kStageBytes1 + SharedTile<64>::bytes(Tile::kM)};
  };
  // Columns that the product runs over: of up to 32 those of whole steps, else all of the tile.
  const auto used_columns = [](int left) { return left > 32 ? Tile::kN1 : ceil_div(left, 16) * 16; };
  const auto load = [&](int /*step*/, int stage) {
    const T* x = static_cast<const T*>(p.x) + first_row * p.x_stride + int64_t{ahead.kappa} * p.cols1 + ahead.depth;
    copy_tile_async<Tile::kM, kDepth, Tile::kThreads>(tile_x(stage), x, p.x_stride, rows, p.cols1 - ahead.depth);
    const int first_rho = ahead.kappa * p.rows1 / p.blocks2, used = used_columns(cols - ahead.col);
    copy_gathered_async<Tile::kN1, Tile::kThreads>(tile_w(stage), static_cast<const T*>(p.w1) + ahead.depth, p.cols1,
                                                   p.cols1 - ahead.depth, [&](int n) {
                                                     const Place at = place(ahead.kappa, first_rho, ahead.col + n);
                                                     return n >= used ? kUnused : at.inside ? at.index : kZeros;
                                                   });
    ahead.advance(p, cols);
  };

  const int warp_row = warp_id() / Tile::kWarpsN1 * Tile::kWarpM1,
            warp_col = warp_id() % Tile::kWarpsN1 * Tile::kWarpN1;
  float acc[kM][kN][4] = {};
  pipeline<Tile::kStages1>(steps, load, [&](int stage) {
    const int cols_left = cols - now.col - warp_col;
    if (cols_left > 32) {
      mma_abt<T, kDepth>(acc, tile_x(stage), warp_row, tile_w(stage), warp_col, kDepth);
    } else if (cols_left > 0) {
      // Few columns: what is past them, and past the depth of small blocks, is skipped.
      const uint32_t lane_a = lane_offset_halves<64>(), lane_b = lane_offset_quarters<64>();
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        if (k >= p.cols1 - now.depth) break;
        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) load_a(a[m], tile_x(stage), lane_a, warp_row + 16 * m, k);
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          if (8 * n >= cols_left) break;
          uint32_t b[4];
          load_b_transposed(b, tile_w(stage), lane_b, warp_col + 8 * n, k);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            mma_m16n8k16<T>(acc[m][n], a[m], b[0], b[1]);
            mma_m16n8k16<T>(acc[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
    if (now.depth + kDepth >= p.cols1) {
      const int lane = opaque_lane(), g = lane / 4, t = lane % 4, first_rho = now.kappa * p.rows1 / p.blocks2;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int col = now.col + warp_col + 8 * n + 2 * t;
        if (col >= cols) continue;
        const auto column = [&](int n) {  // of h, or -1
          const Place at = place(now.kappa, first_rho, n);
          return at.inside ? at.lambda * work.pitch + at.rho : -1;
        };
        const int to0 = column(col);
        if (work.pairs) {
          if (to0 < 0) continue;
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              store_shared(h.address(warp_row + 16 * m + 8 * r + g, to0),
                           pack2<T>(acc[m][n][2 * r], acc[m][n][2 * r + 1]));
            }
          }
        } else {
          const int to1 = column(col + 1);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int row = warp_row + 16 * m + 8 * r + g;
              if (to0 >= 0) store_shared(h.address(row, to0), from_float<T>(acc[m][n][2 * r]));
              if (to1 >= 0) store_shared(h.address(row, to1), from_float<T>(acc[m][n][2 * r + 1]));
            }
          }
        }
      }
      for_each_accumulator<kM, kN>([&](int m, int n, int e) { acc[m][n][e] = 0.f; });
    }
    now.advance(p, cols);
  });
}

// Writes what a lane has of one row: of each of kLambdas lambdas the sigmas 2 t and 2 t + 1 of kN tiles, t its number
// in the quad. y points at the first lambda and the warp's first sigma.
template <class T, int kLambdas, int kM, int kN>
__device__ __forceinline__ void write_lambdas(const float (&acc)[kLambdas][kM][kN][4], int m, int r, T* y, int l,
                                              int lambdas, int sigmas, int t) {
  const auto two = [&](int lambda, int n, int e) {  // neighbouring lambdas of one sigma
    return pack2<T>(acc[lambda][m][n][2 * r + e], acc[lambda + 1][m][n][2 * r + e]);
  };
  using Chunk = Vec<uint32_t, 4>;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int sigma = 8 * n + 2 * t;
    T* to = y + int64_t{sigma} * l;
    if (kLambdas == 4 && l == 4) {
      if (sigma >= sigmas) continue;  // sigmas come in pairs, as rows of y are whole 16 bytes
      store_global(reinterpret_cast<Chunk*>(to), Chunk{{two(0, n, 0), two(2, n, 0), two(0, n, 1), two(2, n, 1)}});
    } else if (kLambdas == 8 && l % 8 == 0) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (sigma + e >= sigmas) continue;
        store_global(reinterpret_cast<Chunk*>(to + e * l),
                     Chunk{{two(0, n, e), two(2, n, e), two(4 % kLambdas, n, e), two(6 % kLambdas, n, e)}});
      }
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int lambda = 0; lambda < kLambdas; ++lambda) {
          if (sigma + e < sigmas && lambda < lambdas)
            store_global(to + e * l + lambda, from_float<T>(acc[lambda][m][n][2 * r + e]));
        }
      }
    }
  }
}

// The second product: y of the chunk, from h.
template <class T, class Tile>
__device__ __forceinline__ void monarch_second(const MonarchWork& work, MonarchMiddle h, int64_t first_row, int rows,
                                               int first_lambda, int lambdas) {
  constexpr int kLambdas = Tile::kLambdas, kM = Tile::kWarpM2 / 16, kN = Tile::kWarpN2 / 8, kDepth = Tile::kDepth;
  const MonarchParams& p = work.p;

  struct Step {
    int lambda, sigma, depth;
    __device__ __forceinline__ void advance(const MonarchParams& p) {
      depth += kDepth;
      if (depth < p.cols2) return;
      depth = 0;
      sigma += Tile::kN2;
      if (sigma < p.rows2) return;
      sigma = 0, lambda += kLambdas;
    }
  };
  const int steps = ceil_div(lambdas, kLambdas) * ceil_div(p.rows2, Tile::kN2) * ceil_div(p.cols2, kDepth);
  Step now{0, 0, 0}, ahead{0, 0, 0};
  const auto tile_w = [](int stage) { return SharedTile<64>{shared_base() + stage * Tile::kStageBytes2}; };
  const auto load = [&](int /*step*/, int stage) {
    const T* w = static_cast<const T*>(p.w2) + int64_t{first_lambda + ahead.lambda} * p.rows2 * p.cols2 +
                 int64_t{ahead.sigma} * p.cols2 + ahead.depth;
    copy_gathered_async<kLambdas * Tile::kN2, Tile::kThreads>(
        tile_w(stage), w, p.cols2, p.cols2 - ahead.depth, [&](int n) {
          const int lambda = n / Tile::kN2, sigma = n % Tile::kN2;
          return ahead.lambda + lambda < lambdas && ahead.sigma + sigma < p.rows2 ? lambda * p.rows2 + sigma : kZeros;
        });
    ahead.advance(p);
  };

  const int warp_row = warp_id() / 2 * Tile::kWarpM2, warp_col = warp_id() % 2 * Tile::kWarpN2;
  float acc[kLambdas][kM][kN][4] = {};
  pipeline<Tile::kStages2>(steps, load, [&](int stage) {
    if (now.sigma + warp_col < p.rows2) {
      const uint32_t lane_a = opaque(lane_offset_halves<64>()), lane_b = opaque(lane_offset_quarters<64>());
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        if (now.depth + k >= work.pitch) break;  // there the next lambda's h begins
#pragma unroll
        for (int lambda = 0; lambda < kLambdas; ++lambda) {
          if (now.lambda + lambda >= lambdas) break;
          const int col = (now.lambda + lambda) * work.pitch + now.depth + k;
          uint32_t a[kM][4];
#pragma unroll
          for (int m = 0; m < kM; ++m) load_a(a[m], h.tile(col), lane_a, warp_row + 16 * m, col % 64);
#pragma unroll
          for (int n = 0; n < kN; n += 2) {
            uint32_t b[4];
            load_b_transposed(b, tile_w(stage), lane_b, lambda * Tile::kN2 + warp_col + 8 * n, k);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
              mma_m16n8k16<T>(acc[lambda][m][n], a[m], b[0], b[1]);
              mma_m16n8k16<T>(acc[lambda][m][n + 1], a[m], b[2], b[3]);
            }
          }
        }
      }
    }
    if (now.depth + kDepth >= p.cols2) {
      const int64_t stride = int64_t{p.blocks2} * p.rows2;
      T* y = static_cast<T*>(p.y) + (first_row + warp_row) * stride + int64_t{now.sigma + warp_col} * p.blocks2 +
             first_lambda + now.lambda;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int lane = opaque_lane();  // one row's address at a time: there are no registers for all
          const int row = 16 * m + 8 * r + lane / 4;
          if (warp_row + row < rows) {
            write_lambdas<T>(acc, m, r, y + row * stride, p.blocks2, lambdas - now.lambda,
                             p.rows2 - now.sigma - warp_col, lane % 4);
          }
        }
      }
#pragma unroll
      for (int lambda = 0; lambda < kLambdas; ++lambda) {
        for_each_accumulator<kM, kN>([&](int m, int n, int e) { acc[lambda][m][n][e] = 0.f; });
      }
    }
    now.advance(p);
  });
}

// Grid: chunks of lambdas, then tiles of rows.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) monarch_forward(const __grid_constant__ MonarchWork work) {
  const MonarchParams& p = work.p;
  const int block = static_cast<int>(blockIdx.x);
  const int row_tile = work.chunks.quotient(block);
  const int64_t first_row = static_cast<int64_t>(row_tile) * Tile::kM;
  const int rows = static_cast<int>(min(p.rows - first_row, static_cast<int64_t>(Tile::kM)));
  const int first_lambda = (block - row_tile * work.chunks.divisor) * work.chunk;
  const int lambdas = min(work.chunk, p.blocks2 - first_lambda);
  const MonarchMiddle h{shared_base() + Tile::kStageBytes};

  if (work.pitch > p.cols2) {  // the 8 columns that no rho has
    for (int i = static_cast<int>(threadIdx.x); i < lambdas * Tile::kM; i += Tile::kThreads) {
      store_shared(h.address(i % Tile::kM, i / Tile::kM * work.pitch + p.cols2), Vec<uint32_t, 4>{});
    }
  }
  monarch_first<T, Tile>(work, h, first_row, rows, first_lambda, lambdas);
  block_sync();  // h is complete; all warps are done with the first product's stages, so they may be refilled
  monarch_second<T, Tile>(work, h, first_row, rows, first_lambda, lambdas);
}

}  // namespace warpform
