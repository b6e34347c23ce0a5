#include "activation/bias_gelu.cuh"

#include <algorithm>
#include <climits>

#include "common/column_sum.h"
#include "device/launch.cuh"

namespace warpform {
namespace {

template <class Params>
using Run = void (*)(const Tiled<Params>&, int64_t blocks, void* stream);

template <class T, int kVec, class Gelu>
void run(const Tiled<BiasGeluParams>& params, int64_t blocks, void* stream) {
  launch<bias_gelu_kernel<T, kVec, Gelu>>("bias_gelu", static_cast<unsigned>(blocks), kGeluThreads, 0, stream, params);
}

template <class T, int kVec, class Gelu>
void run(const Tiled<BiasGeluBackwardParams>& params, int64_t blocks, void* stream) {
  launch<bias_gelu_backward_kernel<T, kVec, Gelu>>("bias_gelu_backward", static_cast<unsigned>(blocks), kGeluThreads,
                                                   kGeluThreads * kVec * 4, stream, params);
}

// [tanh][dtype][16-byte accesses]
template <class Params>
constexpr Run<Params> kRuns[2][3][2] = {
    {{run<float, 1, ErfGelu>, run<float, 4, ErfGelu>},
     {run<half_t, 1, ErfGelu>, run<half_t, 8, ErfGelu>},
     {run<bf16_t, 1, ErfGelu>, run<bf16_t, 8, ErfGelu>}},
    {{run<float, 1, TanhGelu>, run<float, 4, TanhGelu>},
     {run<half_t, 1, TanhGelu>, run<half_t, 8, TanhGelu>},
     {run<bf16_t, 1, TanhGelu>, run<bf16_t, 8, TanhGelu>}},
};

// Without a bias rows mean nothing: then one long row, whose length is more often a multiple of 16 bytes.
template <class Params>
Params without_rows(Params p) {
  if (p.bias == nullptr) {
    p.cols *= p.rows;
    p.rows = 1;
  }
  return p;
}

// Elements of one access: 16 bytes of them where every row and pointer allows it.
template <class... Pointers>
int vector_of(DType dtype, int64_t cols, const Pointers*... pointers) {
  const int wide = dtype == DType::kFloat32 ? kWideVec<float> : kWideVec<half_t>;
  return cols % wide == 0 && all_aligned(pointers...) ? wide : 1;
}
int vector_of(const BiasGeluParams& p) { return vector_of(p.dtype, p.cols, p.x, p.bias, p.out); }
int vector_of(const BiasGeluBackwardParams& p) { return vector_of(p.dtype, p.cols, p.dout, p.x, p.bias, p.dx); }

// The widest tile that leaves the fewest threads beyond the last column; at least a warp wide where the row is.
int log2_tile_width(int64_t vectors) {
  int log2 = 0;
  while (log2 < 5 && (int64_t{1} << log2) < vectors) ++log2;
  if (log2 < 5) return log2;
  const auto threads = [&](int width) { return ceil_div(vectors, int64_t{1} << width) << width; };
  for (int wider = 6; wider <= 8; ++wider) {
    if (threads(wider) <= threads(log2)) log2 = wider;
  }
  return log2;
}

// `groups` groups of rows, or with 0 as many as leave a thread kGeluRows rows.
GeluTiles tiles_of(int64_t rows, int64_t cols, int vec, int64_t groups) {
  const int64_t vectors = ceil_div(cols, int64_t{vec});
  GeluTiles tiles;
  tiles.log2_width = log2_tile_width(vectors);
  const int64_t col_tiles = ceil_div(vectors, int64_t{1} << tiles.log2_width);
  if (col_tiles > INT_MAX) fail_for_size("bias_gelu", "a row of", cols, "elements is too long");
  tiles.col_tiles = static_cast<int>(col_tiles);
  const int64_t rows_a_tile = kGeluThreads >> tiles.log2_width;
  if (groups == 0) groups = std::min(ceil_div(rows, rows_a_tile * kGeluRows), INT_MAX / col_tiles);
  tiles.row_step = groups * rows_a_tile;
  return tiles;
}

template <class Params>
void run_tiles(const Params& p, int vec, const GeluTiles& tiles, void* stream) {
  const int64_t blocks = tiles.row_step / (kGeluThreads >> tiles.log2_width) * tiles.col_tiles;
  kRuns<Params>[p.tanh][static_cast<int>(p.dtype)][vec > 1]({p, tiles}, blocks, stream);
}

}  // namespace

void launch_bias_gelu(const BiasGeluParams& params, void* stream) {
  if (params.rows == 0 || params.cols == 0) return;
  const BiasGeluParams p = without_rows(params);
  const int vec = vector_of(p);
  run_tiles(p, vec, tiles_of(p.rows, p.cols, vec, 0), stream);
}

int64_t bias_gelu_backward_groups(const BiasGeluBackwardParams& p) {
  if (p.bias == nullptr || p.rows == 0 || p.cols == 0) return 0;
  // Enough blocks to fill the GPU once, each with as many rows as possible: few partial sums.
  const GeluTiles tile = tiles_of(p.rows, p.cols, vector_of(p), 1);
  return std::max<int64_t>(
      1, std::min(ceil_div(p.rows, tile.row_step), int64_t{kGeluBackwardBlocksPerSm} * sm_count() / tile.col_tiles));
}

void launch_bias_gelu_backward(const BiasGeluBackwardParams& params, void* stream) {
  if (params.rows > 0 && params.cols > 0) {
    const BiasGeluBackwardParams p = without_rows(params);
    const int vec = vector_of(p);
    run_tiles(p, vec, tiles_of(p.rows, p.cols, vec, p.groups), stream);
  }
  if (params.bias == nullptr || params.cols == 0) return;
  launch_column_sum("bias_gelu_backward",
                    {.partials = params.partials,
                     .out = {params.dbias},
                     .sums = 1,
                     .groups = params.groups,
                     .cols = params.cols,
                     .dtype = params.float_parameters ? DType::kFloat32 : params.dtype},
                    stream);
}

}  // namespace warpform
