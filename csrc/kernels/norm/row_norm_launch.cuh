// How the kernels of norms are launched: the shapes that exist, and which of them a row takes.
#pragma once

#include <algorithm>
#include <climits>

#include "common/column_sum.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "norm/row_norm_backward.cuh"

namespace warpform {

template <class Params>
struct RowShape {
  int max_cols;       // the longest row that this shape can hold
  int rows;           // rows that a block works on at a time
  int blocks_per_sm;  // blocks that a backward pass with parameters fills the GPU with
  void (*run)(const Params&, int64_t blocks, void* stream);
};

// Elements of an access of up to kBytes bytes.
template <class T, int kBytes>
constexpr int kVec = kBytes > static_cast<int>(sizeof(T)) ? kBytes / static_cast<int>(sizeof(T)) : 1;

template <class Norm, int kRowThreads, int kElements, int kBytes>
constexpr RowShape<typename Norm::Params> row_shape() {
  using Params = typename Norm::Params;
  using Shape = RowNormShape<kRowThreads, kElements>;
  return {kRowThreads * kElements, Shape::kRows, 0, [](const Params& p, int64_t blocks, void* stream) {
            constexpr int64_t kMost = INT_MAX;
            const dim3 grid(static_cast<unsigned>(std::min(blocks, kMost)),
                            static_cast<unsigned>(ceil_div(blocks, kMost)));
            dispatch_dtype(p.dtype, [&]<class T>() {
              launch<row_norm_kernel<Norm, T, kVec<T, kBytes>, kRowThreads, kElements>>(
                  Norm::kOp, grid, Shape::kThreads, Shape::kSharedBytes, stream, p);
            });
          }};
}

template <class Norm, int kRowThreads, int kElements, int kBytes>
constexpr RowShape<typename Norm::Params> backward_shape() {
  using Params = typename Norm::Params;
  using Shape = RowNormBackwardShape<Norm, kRowThreads, kElements>;
  return {Shape::kCols, Shape::kRows, Shape::kBlocksPerSm, [](const Params& p, int64_t blocks, void* stream) {
            dispatch_dtype(p.dtype, [&]<class T>() {
              launch<row_norm_backward_kernel<Norm, T, kVec<T, kBytes>, kRowThreads, kElements>>(
                  Norm::kOp, static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, stream, p);
            });
          }};
}

// <threads a row, elements a thread, bytes an access>; the first shape that holds a row serves it. A warp has rows of
// up to 1024 columns to itself and needs no barrier.
template <class Norm>
constexpr RowShape<typename Norm::Params> kRowShapes[] = {
    row_shape<Norm, 32, 8, 16>(),     // 256
    row_shape<Norm, 32, 16, 16>(),    // 512
    row_shape<Norm, 32, 24, 16>(),    // 768
    row_shape<Norm, 32, 32, 16>(),    // 1024
    row_shape<Norm, 256, 16, 16>(),   // 4096
    row_shape<Norm, 1024, 16, 16>(),  // 16384
};
// Rows that are not a multiple of 16 bytes or do not begin at one.
template <class Norm>
constexpr RowShape<typename Norm::Params> kRowShapesUnaligned[] = {
    row_shape<Norm, 32, 16, 1>(),    // 512
    row_shape<Norm, 1024, 16, 1>(),  // 16384
};

// In LayerNorm a column takes 3 sums and, of 16-bit types, 2 registers of this row and the next.
template <class Norm>
constexpr RowShape<typename Norm::Params> kBackwardShapes[] = {
    backward_shape<Norm, 32, 8, 16>(),    // 256
    backward_shape<Norm, 32, 16, 16>(),   // 512
    backward_shape<Norm, 32, 24, 16>(),   // 768
    backward_shape<Norm, 32, 32, 16>(),   // 1024
    backward_shape<Norm, 256, 16, 16>(),  // 4096
    backward_shape<Norm, 512, 32, 16>(),  // 16384: of LayerNorm 64 sums in registers, 32 in shared memory
};
template <class Norm>
constexpr RowShape<typename Norm::Params> kBackwardShapesUnaligned[] = {
    backward_shape<Norm, 32, 16, 1>(),   // 512
    backward_shape<Norm, 512, 32, 1>(),  // 16384
};

template <class Params, size_t kCount>
const RowShape<Params>& first_that_holds(const char* op, const RowShape<Params> (&shapes)[kCount], int64_t cols) {
  for (const RowShape<Params>& shape : shapes) {
    if (cols <= shape.max_cols) return shape;
  }
  fail_for_size(op, "no kernel for rows of", cols, "elements");
}

// True if every row and pointer allows 16-byte accesses.
template <class... Pointers>
bool rows_aligned(DType dtype, int64_t cols, const Pointers*... pointers) {
  return cols % (dtype == DType::kFloat32 ? kWideVec<float> : kWideVec<half_t>) == 0 && all_aligned(pointers...);
}

template <class Norm>
void launch_rows(const typename Norm::Params& p, bool aligned, void* stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const auto& shape = aligned ? first_that_holds(Norm::kOp, kRowShapes<Norm>, p.cols)
                              : first_that_holds(Norm::kOp, kRowShapesUnaligned<Norm>, p.cols);
  shape.run(p, ceil_div(p.rows, int64_t{shape.rows}), stream);
}

// Of LayerNorm and RMSNorm.
template <class Norm>
const RowShape<typename Norm::Params>& backward_shape_of(const typename Norm::Params& p) {
  return rows_aligned(p.dtype, p.cols, p.dout, p.dsum, p.sum, p.weight, p.dx)
             ? first_that_holds(Norm::kOp, kBackwardShapes<Norm>, p.cols)
             : first_that_holds(Norm::kOp, kBackwardShapesUnaligned<Norm>, p.cols);
}

template <class Norm>
int64_t backward_groups(const typename Norm::Params& p) {
  if (p.rows == 0 || p.cols == 0) return 0;
  const auto& shape = backward_shape_of<Norm>(p);
  return std::min(ceil_div(p.rows, int64_t{shape.rows}), int64_t{shape.blocks_per_sm} * sm_count());
}

// `out`: the gradients of the parameters in the order of their partial sums.
template <class Norm>
void launch_backward(const typename Norm::Params& p, void* const (&out)[Norm::kSums], void* stream) {
  if (p.cols == 0) return;
  if (p.rows > 0) backward_shape_of<Norm>(p).run(p, p.groups, stream);
  ColumnSumParams sums{.partials = p.partials,
                       .out = {},
                       .sums = Norm::kSums,
                       .groups = p.groups,
                       .cols = p.cols,
                       .dtype = p.float_parameters ? DType::kFloat32 : p.dtype};
  std::copy_n(out, Norm::kSums, sums.out);
  launch_column_sum(Norm::kOp, sums, stream);
}

}  // namespace warpform
