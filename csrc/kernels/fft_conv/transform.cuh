// The transforms of a pair of sequences, stage by stage (plan.h): products with DFT matrices on tensor cores, twiddle
// factors on their float32 accumulators, rounded to float16 once a stage.
//
// The outer stages go over the columns of a slot in shared memory, in place: a warp owns strips of 16 columns. They are
// products with real matrices, real and imaginary parts one below the other. The inner ones take a row of `inner`
// points into registers: accumulators become the next product's operand without another exchange, for its right side
// where the rows of the accumulators are to be kept and for its left side, transposed, where they are not.
#pragma once

#include "fft_conv/rows.cuh"

namespace warpform {

// Complex numbers are float32 pairs.
using Complex = Vec<float, 2>;

__device__ __forceinline__ Complex multiply(Complex a, Complex b) {
  return {{a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]}};
}
// a conj(b)
__device__ __forceinline__ Complex multiply_conjugate(Complex a, Complex b) {
  return {{a[0] * b[0] + a[1] * b[1], a[1] * b[0] - a[0] * b[1]}};
}

template <class V>
__device__ __forceinline__ V load_table(const void* tables, int offset, int index) {
  const uint32_t byte = opaque(static_cast<uint32_t>(offset + index * static_cast<int>(sizeof(V))));
  return load_global(reinterpret_cast<const V*>(static_cast<const unsigned char*>(tables) + byte));
}
__device__ __forceinline__ void load_operand(uint32_t (&a)[4], const void* tables, int offset, int tile) {
  const RowValues v = load_table<RowValues>(tables, offset, tile * kWarpSize + opaque_lane());
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = v[i];
}

// Both float16 of a pair with the other sign.
__device__ __forceinline__ uint32_t negated(uint32_t pair) { return pair ^ 0x80008000u; }

// B[16 kK x 16] of a strip, rows of the slot; rows past kRows meet zeros of the matrix, so any finite ones do.
template <int kK, int kRows, int kCols>
__device__ __forceinline__ void load_strip(uint32_t (&b)[kK][4], RowTile<kCols> tile, int col) {
  const int lane = opaque_lane();
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    const int row = (16 * k + lane % 16) % kRows;
    ldmatrix_x4_trans(b[k], tile.chunk(row, col / kRowChunk + lane / 16));
  }
}

// First stage: sequences, scaled, to the rows of a pass's digits.
template <class Plan>
__device__ __forceinline__ void transform_outer(RowTile<Plan::kPlan.inner> tile, const void* tables, int pass,
                                                float scale0, float scale1, bool bfloat16) {
  constexpr FftPlan p = Plan::kPlan;
  constexpr int kM = p.forward_m, kK = p.forward_k, kStrips = p.forward_strips;
  const int lane = opaque_lane(), g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int group = 0; group < p.groups; ++group) {
    const int first = group * kStrips * p.warps + warp_id();
    uint32_t b[kStrips][kK][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      load_strip<kK, 2 * p.outer>(b[s], tile, 16 * (first + s * p.warps));
#pragma unroll
      for (int k = 0; k < kK; ++k) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = 16 * k + 8 * (r % 2) + 2 * t;
          const float lo = row % (2 * p.outer) < p.outer ? scale0 : scale1;
          const float hi = (row + 1) % (2 * p.outer) < p.outer ? scale0 : scale1;
          const Vec<float, 2> x = unpack_pair(b[s][k][r], bfloat16);
          // A scale of 0 makes zeros of anything, also of what is not finite.
          b[s][k][r] = pack2<half_t>(lo == 0 ? 0.f : x[0] * lo, hi == 0 ? 0.f : x[1] * hi);
        }
      }
    }
    warp_sync();  // columns have been read by all lanes before any writes to them
#pragma unroll 1
    for (int m = 0; m < kM; ++m) {
      uint32_t a[kK][4];
#pragma unroll
      for (int k = 0; k < kK; ++k) load_operand(a[k], tables, p.forward_matrix, (pass * kM + m) * kK + k);
      const int branch = 8 * m + g;
      const int k1 = min(branch, p.branches - 1) * p.passes + pass;
      const auto twiddle = [&](int offset, int i) { return load_table<Complex>(tables, offset, i * p.digits + k1); };
      const Complex w1 = twiddle(p.step_twiddles, 0), w8 = twiddle(p.step_twiddles, 1);
      const Complex step = twiddle(p.step_twiddles, 2);
      Complex w = multiply(twiddle(p.begin_twiddles, group * p.warps + warp_id()), twiddle(p.column_twiddles, t));
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        Complex now = w;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float acc[4] = {0, 0, 0, 0};
#pragma unroll
          for (int k = 0; k < kK; ++k) mma_m16n8k16<half_t>(acc, a[k], b[s][k][2 * h], b[s][k][2 * h + 1]);
          const Complex z0 = multiply({{acc[0], acc[2]}}, now);
          const Complex z1 = multiply({{acc[1], acc[3]}}, multiply(now, w1));
          const int col = 16 * (first + s * p.warps) + 8 * h + 2 * t;
          if (branch < p.branches) {
            store_shared(tile.pair(branch, col), pack2<half_t>(z0[0], z1[0]));
            store_shared(tile.pair(p.branches + branch, col), pack2<half_t>(z0[1], z1[1]));
          }
          if (h == 0) now = multiply(now, w8);
        }
        w = multiply(w, step);
      }
    }
  }
}

// Last stage of the inverse: rows of a pass's digits to sequences, where they came from.
template <class Plan>
__device__ __forceinline__ void inverse_outer(RowTile<Plan::kPlan.inner> tile, const void* tables, int pass) {
  constexpr FftPlan p = Plan::kPlan;
  constexpr int kM = p.inverse_m, kK = p.inverse_k, kStrips = p.inverse_strips;
  const int lane = opaque_lane(), g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int group = 0; group < p.strips() / kStrips; ++group) {
    const int first = group * kStrips * p.warps + warp_id();
    uint32_t b[kStrips][kK][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) load_strip<kK, p.rows>(b[s], tile, 16 * (first + s * p.warps));
    warp_sync();  // as above
#pragma unroll 1
    for (int m = 0; m < kM; ++m) {
      uint32_t a[kK][4];
#pragma unroll
      for (int k = 0; k < kK; ++k) load_operand(a[k], tables, p.inverse_matrix, (pass * kM + m) * kK + k);
      const int row = 8 * m + g;
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float acc[4] = {0, 0, 0, 0};
#pragma unroll
          for (int k = 0; k < kK; ++k) mma_m16n8k16<half_t>(acc, a[k], b[s][k][2 * h], b[s][k][2 * h + 1]);
          const int col = 16 * (first + s * p.warps) + 8 * h + 2 * t;
          if (row < p.outer) {
            store_shared(tile.pair(row, col), pack2<half_t>(acc[0], acc[1]));
            store_shared(tile.pair(p.outer + row, col), pack2<half_t>(acc[2], acc[3]));
          }
        }
      }
    }
  }
}

// ---- the inner transforms, radix x radix points in the registers of a warp ----

// A row of tiles of 16 x 16: register e of tile j holds row g + 8 (e % 2), columns 16 j + 8 (e / 2) + 2 t and the next.
template <int kTiles>
struct Strip {
  uint32_t re[kTiles][4];
  uint32_t im[kTiles][4];
};
// radix x radix, by rows of tiles.
template <int kTiles>
struct Square {
  Strip<kTiles> row[kTiles];
};

// Strips arrive one after the other as columns of tiles.
template <int kTiles>
__device__ __forceinline__ void mirror_tiles(Square<kTiles>& x) {
  const Square<kTiles> y = x;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x.row[i].re[j][e] = y.row[j].re[i][e], x.row[i].im[j][e] = y.row[j].im[i][e];
    }
  }
}
// The first strip leaves, the others move up, `last` follows.
template <int kTiles>
__device__ __forceinline__ void shift(Square<kTiles>& x, const Strip<kTiles>& last) {
#pragma unroll
  for (int i = 1; i < kTiles; ++i) x.row[i - 1] = x.row[i];
  x.row[kTiles - 1] = last;
}

// The DFT matrix, cos and sin of 2 pi row col / radix: its first row of tiles. In the second, of radix 32, the odd
// columns have the other sign: registers, which there are too few of, for an XOR. Symmetric: a tile's registers are
// also those of its mirror image as the right-hand operand.
template <int kTiles>
struct Dft {
  Strip<kTiles> first;

  __device__ __forceinline__ Strip<kTiles> row(int i) const {
    static_assert(kTiles <= 2, "radix 16 or 32");
    Strip<kTiles> s = first;
    if (i == 0) return s;
    const uint32_t odd = opaque(0x80000000u);
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s.re[k][e] ^= odd, s.im[k][e] ^= odd;
    }
    return s;
  }
};
template <class Plan>
__device__ __forceinline__ void load_dft(Dft<Plan::kPlan.tiles>& dft, const void* tables) {
#pragma unroll
  for (int k = 0; k < Plan::kPlan.tiles; ++k) {
    load_operand(dft.first.re[k], tables, Plan::kPlan.square, k);
    load_operand(dft.first.im[k], tables, Plan::kPlan.square, Plan::kPlan.tiles + k);
  }
}

// Twiddle factors of half a tile of accumulators: w(inner)^(row col) / radix, those of row g, then of row g + 8.
struct InnerTwiddles {
  Vec<float, 4> row[2];
};
template <class Plan>
__device__ __forceinline__ InnerTwiddles load_inner_twiddles(const void* tables, int i, int j, int h) {
  const int index = ((i * Plan::kPlan.tiles + j) * 2 + h) * 2 * kWarpSize + opaque_lane();
  return {{load_table<Vec<float, 4>>(tables, Plan::kPlan.inner_twiddles, index),
           load_table<Vec<float, 4>>(tables, Plan::kPlan.inner_twiddles, index + kWarpSize)}};
}

template <int kTiles>
__device__ __forceinline__ void keep(Strip<kTiles>& to, int j, int h, const float (&re)[4], const float (&im)[4]) {
  to.re[j][2 * h] = pack2<half_t>(re[0], re[1]);
  to.re[j][2 * h + 1] = pack2<half_t>(re[2], re[3]);
  to.im[j][2 * h] = pack2<half_t>(im[0], im[1]);
  to.im[j][2 * h + 1] = pack2<half_t>(im[2], im[3]);
}

// The loops over strips below stay loops, and strips move through the same registers: unrolled, they would be scheduled
// into each other until registers run out.

// x = F x^T, or conj(F) x^T: its rows become the transform of its columns. out(i, j, h, loaded, re, im) gets 16 rows
// from 16 i on, 8 columns from 16 j + 8 h on, and may change them; factors(i, j, h) is called before their products, so
// that what it loads is there after them. Without kKeep the results are for `out` alone.
template <bool kInverse, bool kKeep = true, int kTiles, class Factors, class Out>
__device__ __forceinline__ void transform_columns(const Dft<kTiles>& dft, Square<kTiles>& x, Factors&& factors,
                                                  Out&& out) {
#pragma unroll 1
  for (int j = 0; j < kTiles; ++j) {
    const Strip<kTiles>& from = x.row[0];
    Strip<kTiles> to;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t minus[kTiles][2];  // the operand that sin multiplies with a minus
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
#pragma unroll
        for (int r = 0; r < 2; ++r) minus[k][r] = negated(kInverse ? from.im[k][h + 2 * r] : from.re[k][h + 2 * r]);
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const auto loaded = factors(i, j, h);
        const Strip<kTiles> matrix = dft.row(i);
        float re[4] = {0, 0, 0, 0}, im[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          mma_m16n8k16<half_t>(re, matrix.re[k], from.re[k][h], from.re[k][h + 2]);
          mma_m16n8k16<half_t>(im, matrix.re[k], from.im[k][h], from.im[k][h + 2]);
          if constexpr (kInverse) {
            mma_m16n8k16<half_t>(re, matrix.im[k], minus[k][0], minus[k][1]);
            mma_m16n8k16<half_t>(im, matrix.im[k], from.re[k][h], from.re[k][h + 2]);
          } else {
            mma_m16n8k16<half_t>(re, matrix.im[k], from.im[k][h], from.im[k][h + 2]);
            mma_m16n8k16<half_t>(im, matrix.im[k], minus[k][0], minus[k][1]);
          }
        }
        out(i, j, h, loaded, re, im);
        if constexpr (kKeep) keep(to, i, h, re, im);
      }
    }
    if constexpr (kKeep) {
      shift(x, to);
    } else {
      shift(x, x.row[0]);
    }
  }
  if constexpr (kKeep) mirror_tiles(x);
}

// x = x F: rows stay, columns are transformed. factors, out and kKeep as above.
template <bool kKeep = true, int kTiles, class Factors, class Out>
__device__ __forceinline__ void transform_rows(const Dft<kTiles>& dft, Square<kTiles>& x, Factors&& factors,
                                               Out&& out) {
#pragma unroll 1
  for (int i = 0; i < kTiles; ++i) {
    const Strip<kTiles>& from = x.row[0];
    Strip<kTiles> to;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const Strip<kTiles> matrix = dft.row(j);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto loaded = factors(i, j, h);
        float re[4] = {0, 0, 0, 0}, im[4] = {0, 0, 0, 0}, minus[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          mma_m16n8k16<half_t>(re, from.re[k], matrix.re[k][h], matrix.re[k][h + 2]);
          mma_m16n8k16<half_t>(im, from.im[k], matrix.re[k][h], matrix.re[k][h + 2]);
          mma_m16n8k16<half_t>(re, from.im[k], matrix.im[k][h], matrix.im[k][h + 2]);
          mma_m16n8k16<half_t>(minus, from.re[k], matrix.im[k][h], matrix.im[k][h + 2]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) im[e] -= minus[e];
        out(i, j, h, loaded, re, im);
        if constexpr (kKeep) keep(to, j, h, re, im);
      }
    }
    if constexpr (kKeep) {
      shift(x, to);
    } else {
      shift(x, x.row[0]);
    }
  }
}

// Multiplies accumulators by twiddle factors or their conjugates.
template <bool kInverse>
__device__ __forceinline__ void twist(float (&re)[4], float (&im)[4], const InnerTwiddles& w) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const Complex f = {{w.row[e / 2][e % 2 * 2], w.row[e / 2][e % 2 * 2 + 1]}};
    const Complex z = kInverse ? multiply_conjugate({{re[e], im[e]}}, f) : multiply({{re[e], im[e]}}, f);
    re[e] = z[0], im[e] = z[1];
  }
}

// Addresses in a digit's row of shared memory, taken as radix x radix. What depends on the lane is computed once, and
// combined with the rest by XOR and addition: rows and chunks become immediate operands.
template <class Plan>
struct InnerAddress {
  static constexpr FftPlan p = Plan::kPlan;
  uint32_t first;

  // `row` less than 16, `chunk` 0 or 1, of 8 columns.
  __device__ __forceinline__ InnerAddress(RowTile<p.inner> tile, int branch, int row, int chunk)
      : first(tile.chunk(branch, row * (p.radix / kRowChunk) + chunk)) {}
  // `row` rows further, a multiple of 8 (of 16 for rows of 8 and more), and `chunk` chunks, if that carries no bit.
  __device__ __forceinline__ uint32_t re(int row, int chunk) const {
    return (first ^ (chunk ^ row % 16 * p.radix / 64) << 4) + row * p.radix * 2;
  }
  __device__ __forceinline__ uint32_t im(int row, int chunk) const {
    return (first ^ (chunk ^ row % 16 * p.radix / 64 ^ p.branches % 8) << 4) +
           (row * p.radix + p.branches * p.inner) * 2;
  }
};

// The bins of one digit, from its row: bins(i, j, h, loaded, re, im) gets those of k2 from 16 i on, of k3 from 16 j + 8
// h on, and x holds them as it leaves them, if kKeep.
template <class Plan, bool kKeep, class Twiddles, class Factors, class Bins>
__device__ __forceinline__ void transform_inner(Square<Plan::kPlan.tiles>& x, RowTile<Plan::kPlan.inner> tile, int k1,
                                                const Dft<Plan::kPlan.tiles>& dft, Twiddles&& twiddles,
                                                Factors&& factors, Bins&& bins) {
  constexpr FftPlan p = Plan::kPlan;
  const int lane = opaque_lane();
  const InnerAddress<Plan> at(tile, k1 / p.passes, lane % 16, lane / 16);
#pragma unroll
  for (int j = 0; j < p.tiles; ++j) {
#pragma unroll
    for (int k = 0; k < p.tiles; ++k) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, at.re(16 * k, 2 * j));
      uint32_t (&re)[4] = x.row[j].re[k], (&im)[4] = x.row[j].im[k];
      re[0] = b[0], re[1] = b[2], re[2] = b[1], re[3] = b[3];
      ldmatrix_x4_trans(b, at.im(16 * k, 2 * j));
      im[0] = b[0], im[1] = b[2], im[2] = b[1], im[3] = b[3];
    }
  }
  transform_columns<false>(dft, x, twiddles,
                           [](int, int, int, const InnerTwiddles& w, auto& re, auto& im) { twist<false>(re, im, w); });
  transform_rows<kKeep>(dft, x, factors, bins);
}

// The way back: from bins in float16 to the digit's row, times the outer twiddle factors.
template <class Plan, class Twiddles>
__device__ __forceinline__ void inverse_inner(RowTile<Plan::kPlan.inner> tile, int k1,
                                              const Dft<Plan::kPlan.tiles>& dft, const void* tables,
                                              Twiddles&& twiddles, Square<Plan::kPlan.tiles>& x) {
  constexpr FftPlan p = Plan::kPlan;
  const int lane = opaque_lane(), g = lane / 4, t = lane % 4;
  transform_columns<true>(dft, x, twiddles,
                          [](int, int, int, const InnerTwiddles& w, auto& re, auto& im) { twist<true>(re, im, w); });
  const auto twiddle = [&](int offset, int i) { return load_table<Complex>(tables, offset, i * p.digits + k1); };
  const Complex w1 = twiddle(p.step_twiddles, 0), w8 = twiddle(p.step_twiddles, 1);
  const Complex w_row = twiddle(p.step_twiddles, 3);
  Complex w[2 * p.tiles];  // of rows g + 8 r, at the column pair at hand
  w[0] = multiply(twiddle(p.row_twiddles, g), twiddle(p.column_twiddles, t));
#pragma unroll
  for (int r = 1; r < 2 * p.tiles; ++r) w[r] = multiply(w[r - 1], w_row);
  const InnerAddress<Plan> at(tile, k1 / p.passes, g, 0);
  warp_sync();  // the row has been read by all lanes before any writes to it
  const auto nothing = [](int, int, int) { return 0; };
  transform_columns<true, false>(dft, x, nothing, [&](int i, int j, int h, int, auto& re, auto& im) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Complex& now = w[2 * i + r];
      const Complex z0 = multiply_conjugate({{re[2 * r], im[2 * r]}}, now);
      const Complex z1 = multiply_conjugate({{re[2 * r + 1], im[2 * r + 1]}}, multiply(now, w1));
      store_shared(at.re(16 * i + 8 * r, 2 * j + h) + 4 * t, pack2<half_t>(z0[0], z1[0]));
      store_shared(at.im(16 * i + 8 * r, 2 * j + h) + 4 * t, pack2<half_t>(z0[1], z1[1]));
      now = multiply(now, w8);
    }
  });
}

// Operands that every row's inner transforms need: kept in registers where they are few, else read again for each row.
template <class Plan>
struct InnerTables {
  static constexpr bool kKept = Plan::kPlan.tiles == 1;
  const void* tables;
  Dft<Plan::kPlan.tiles> dft;
  InnerTwiddles kept[kKept ? 2 : 1];

  __device__ __forceinline__ explicit InnerTables(const void* from) : tables(from) {
    load_dft<Plan>(dft, tables);
    if constexpr (kKept) {
      kept[0] = load_inner_twiddles<Plan>(tables, 0, 0, 0);
      kept[1] = load_inner_twiddles<Plan>(tables, 0, 0, 1);
    }
  }
  __device__ __forceinline__ InnerTwiddles operator()(int i, int j, int h) const {
    if constexpr (kKept) {
      return kept[h];
    } else {
      return load_inner_twiddles<Plan>(tables, i, j, h);
    }
  }
};

}  // namespace warpform
