// First half of the gated MLP's backward: the gradient of z = x times w_up, and the gated product a, both recomputed
// from x and written once, for block_gemm (dx) and weight_gradient (dw_up, dw_down) to read. With z = [g, v] and da =
// dout times w_down: a = gelu(g) v, dg = da v gelu'(g), dv = da gelu(g).
//
// Tile      128 rows (tokens) or 64 of one output block (glu.cuh), whose two blocks of x and one of dout stay in shared
//           memory, while the CTA walks over `inner`, 64 columns at a time: three products, the gate's derivatives in
//           registers, three stores. Eight warps.
// Loads     As forward; w_down is read without a transposed copy, by transposing ldmatrix.
// Bounds    6 blocks in inner FLOP a row (out as wide as in), and 6 blocks inner bytes written: at d = 768, 4 blocks,
//           f = 3072, 7.2 ns of products at mma.sync's 490 TFLOP/s on an H200 and 4.3 ns of stores. As three kernels,
//           z, da and the gate would move 12 blocks inner bytes more, 8.6 ns.
// Measured  H100 80GB HBM3, bfloat16, 16384 rows, d = 768, 4 blocks, f = 3072: 344 us, tensor pipe 28 %; forward and
//           backward of blockdiag_glu together 1047 us, 203 TFLOP/s, 26 % of the floor.
#pragma once

#include "monarch/glu.cuh"

namespace warpform {

// Tiles of rows that a CTA needs behind its stages.
template <class G>
constexpr int glu_gradient_bytes(int in, int out) {
  return G::kStages * G::kStageBytes +
         G::Tile::bytes(G::kM) * (2 * ceil_div(in, G::Tile::kCols) + ceil_div(out, G::Tile::kCols));
}

template <class T, class G>
__global__ void __launch_bounds__(G::kThreads, 1) glu_gradient(const __grid_constant__ GluWork work) {
  constexpr int kM = G::kM / G::kWarpsM / 16, kN = G::kInner / G::kWarpsN / 8;
  const GluParams& p = work.p;
  const GluCta<T, G> cta(work);
  const int first_dout = 2 * ceil_div(p.in, G::Tile::kCols);
  cta.load_x(0);
  cta.load_rows(first_dout, static_cast<const T*>(p.dout) + cta.first_row * p.dout_stride + int64_t{cta.block} * p.out,
                p.dout_stride, p.out);

  const int warp_row = warp_id() / G::kWarpsN * (kM * 16), warp_col = warp_id() % G::kWarpsN * (kN * 8);
  float g[kM][kN][4] = {}, v[kM][kN][4] = {}, da[kM][kN][4] = {};
  typename GluCta<T, G>::Step now{0, 0}, ahead{0, 0};
  const auto load = [&](int /*step*/, int stage) {
    cta.load_weights(ahead, stage);
    ahead.advance(cta.steps);
  };
  pipeline<G::kStages>(ceil_div(p.inner, G::kInner) * cta.steps, load, [&](int stage) {
    if (now.step < cta.steps_half) {
      cta.multiply_up(g, now.step, stage, 0, warp_row, warp_col);
    } else if (now.step < cta.steps_up) {
      cta.multiply_up(v, now.step, stage, 0, warp_row, warp_col);
    } else {
      const uint32_t lane = opaque(lane_offset_halves<64>());
      const int first_panel = (now.step - cta.steps_up) * (G::kDown / 64);
#pragma unroll
      for (int i = 0; i < G::kDown / 64; ++i) {
        if ((first_panel + i) * 64 >= p.out) break;
        const auto dout = cta.tile_rows(first_dout + first_panel + i);
        mma_ab<T, 4>(
            da, [&](int m, int step, uint32_t (&a)[4]) { load_a(a, dout, lane, warp_row + 16 * m, 16 * step); },
            cta.tile_down(stage), 64 * i, warp_col, G::kInner);
      }
    }
    if (now.step == cta.steps - 1) {
      for_each_accumulator<kM, kN>([&](int m, int n, int e) {
        const float x = g[m][n][e], gelu = ErfGelu::value(x), gradient = da[m][n][e];
        da[m][n][e] = gelu * v[m][n][e];
        g[m][n][e] = gradient * v[m][n][e] * ErfGelu::derivative(x);
        v[m][n][e] = gradient * gelu;
      });
      const int64_t width = int64_t{p.blocks} * p.inner, row = cta.first_row + warp_row;
      const int first = now.inner + warp_col, rows = cta.rows - warp_row, cols = p.inner - first;
      const int64_t at = int64_t{cta.block} * p.inner + first;
      write_accumulators<T>(da, static_cast<T*>(p.a) + row * width + at, width, rows, cols);
      write_accumulators<T>(g, static_cast<T*>(p.dz) + row * 2 * width + at, 2 * width, rows, cols);
      write_accumulators<T>(v, static_cast<T*>(p.dz) + row * 2 * width + width + at, 2 * width, rows, cols);
      for_each_accumulator<kM, kN>([&](int m, int n, int e) { g[m][n][e] = v[m][n][e] = da[m][n][e] = 0.f; });
    }
    now.advance(cta.steps);
  });
}

}  // namespace warpform
