// Host side of tile.cuh: how a launch cuts a tensor into tiles.
#pragma once

#include <algorithm>
#include <climits>

#include "common/failure.h"
#include "spatial/tile.cuh"

namespace warpform {

inline int64_t elements_of(const SpatialShape& shape) {
  return shape.batch * shape.height * shape.width * shape.channels;
}
inline int64_t channels_of_tile(DType dtype) {
  return dtype == DType::kFloat32 ? SpatialElements<float>::kChannels : SpatialElements<half_t>::kChannels;
}

// At least one tile a sample, also where the grid is empty. Throws std::runtime_error where 32 bits do not count what
// they have to.
template <class... Pointers>
SpatialTiles spatial_tiles(const char* op, DType dtype, const SpatialShape& shape, const Pointers*... tensors) {
  for (const int64_t size : {shape.batch, shape.height, shape.width, shape.channels}) {
    if (size > INT_MAX - 1024) fail_for_size(op, "no kernel takes a dimension of", size, "elements");
  }
  const auto tiles = [](int64_t size, int64_t tile) {
    return static_cast<int>(std::max<int64_t>(ceil_div(size, tile), 1));
  };
  const int channels = tiles(shape.channels, channels_of_tile(dtype));
  const int cols = tiles(shape.width, kTileCols), rows = tiles(shape.height, kTileRows);
  const int64_t most = INT_MAX / std::max<int64_t>(shape.batch, 1);
  if (int64_t{rows} * cols > most || int64_t{rows} * cols * channels > most) {
    fail_for_size(op, "no kernel takes a tensor of", elements_of(shape), "elements in this shape");
  }
  const int64_t vec = dtype == DType::kFloat32 ? kWideVec<float> : kWideVec<half_t>;
  return {divisor_of(channels), divisor_of(cols), divisor_of(rows),
          shape.channels % vec == 0 && all_aligned(tensors...)};
}

// Tiles of positions of all samples.
inline int64_t position_tiles(const SpatialTiles& tiles, const SpatialShape& shape) {
  return int64_t{tiles.cols.divisor} * tiles.rows.divisor * shape.batch;
}

// Calls f<kSize>() with the size of a stencil.
template <class F>
void dispatch_stencil(int size, F&& f) {
  switch (size) {
    case 3: return f.template operator()<3>();
    case 5: return f.template operator()<5>();
    default: return f.template operator()<7>();
  }
}

}  // namespace warpform
