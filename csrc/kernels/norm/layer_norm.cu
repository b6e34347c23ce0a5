#include "norm/layer_norm.cuh"

#include <algorithm>
#include <climits>

#include "common/column_sum.h"
#include "device/dispatch.cuh"
#include "device/launch.cuh"

namespace warpform {
namespace {

template <class Params>
struct Shape {
  int max_cols;       // the longest row that this shape can hold
  int rows;           // rows that a block works on at a time
  int blocks_per_sm;  // blocks that the backward pass fills the GPU with
  void (*run)(const Params&, int64_t blocks, void* stream);
};

// Elements of an access of up to kBytes bytes.
template <class T, int kBytes>
constexpr int kVec = kBytes > static_cast<int>(sizeof(T)) ? kBytes / static_cast<int>(sizeof(T)) : 1;

template <int kRowThreads, int kElements, int kBytes>
void run_forward(const LayerNormParams& p, int64_t blocks, void* stream) {
  constexpr int64_t kMost = INT_MAX;
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kMost)), static_cast<unsigned>(ceil_div(blocks, kMost)));
  dispatch_dtype(p.dtype, [&]<class T>() {
    using Kernel = LayerNormForward<T, kVec<T, kBytes>, kRowThreads, kElements>;
    launch<layer_norm_kernel<T, kVec<T, kBytes>, kRowThreads, kElements>>(
        "add_bias_residual_layer_norm", grid, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
  });
}

template <int kRowThreads, int kElements, int kBytes>
void run_backward(const LayerNormBackwardParams& p, int64_t blocks, void* stream) {
  dispatch_dtype(p.dtype, [&]<class T>() {
    using Kernel = LayerNormBackward<T, kVec<T, kBytes>, kRowThreads, kElements>;
    launch<layer_norm_backward_kernel<T, kVec<T, kBytes>, kRowThreads, kElements>>(
        "add_bias_residual_layer_norm_backward", static_cast<unsigned>(blocks), Kernel::kThreads, Kernel::kSharedBytes,
        stream, p);
  });
}

template <int kRowThreads, int kElements, int kBytes>
constexpr Shape<LayerNormParams> forward() {
  return {kRowThreads * kElements, LayerNormForward<float, 1, kRowThreads, kElements>::kRows, 0,
          run_forward<kRowThreads, kElements, kBytes>};
}

template <int kRowThreads, int kElements, int kBytes>
constexpr Shape<LayerNormBackwardParams> backward() {
  using Kernel = LayerNormBackward<float, 1, kRowThreads, kElements>;
  return {Kernel::kCols, Kernel::kRows, Kernel::kBlocksPerSm, run_backward<kRowThreads, kElements, kBytes>};
}

// <threads a row, elements a thread, bytes an access>; the first shape that holds a row serves it. A warp has rows of
// up to 1024 columns to itself and needs no barrier.
constexpr Shape<LayerNormParams> kForward[] = {
    forward<32, 8, 16>(),     // 256
    forward<32, 16, 16>(),    // 512
    forward<32, 24, 16>(),    // 768
    forward<32, 32, 16>(),    // 1024
    forward<256, 16, 16>(),   // 4096
    forward<1024, 16, 16>(),  // 16384
};
// Rows that are not a multiple of 16 bytes or do not begin at one.
constexpr Shape<LayerNormParams> kForwardUnaligned[] = {
    forward<32, 16, 1>(),    // 512
    forward<1024, 16, 1>(),  // 16384
};

// A column takes 3 sums and, of 16-bit types, 2 registers of this row and the next.
constexpr Shape<LayerNormBackwardParams> kBackward[] = {
    backward<32, 8, 16>(),    // 256
    backward<32, 16, 16>(),   // 512
    backward<32, 24, 16>(),   // 768
    backward<32, 32, 16>(),   // 1024
    backward<256, 16, 16>(),  // 4096
    backward<512, 32, 16>(),  // 16384: 64 sums in registers, 32 in shared memory, the values read twice
};
constexpr Shape<LayerNormBackwardParams> kBackwardUnaligned[] = {
    backward<32, 16, 1>(),   // 512
    backward<512, 32, 1>(),  // 16384
};

template <class Params, size_t kCount>
const Shape<Params>& first_that_holds(const Shape<Params> (&shapes)[kCount], int64_t cols) {
  for (const Shape<Params>& shape : shapes) {
    if (cols <= shape.max_cols) return shape;
  }
  fail_for_size("add_bias_residual_layer_norm", "no kernel for rows of", cols, "elements");
}

// True if every row and pointer allows 16-byte accesses.
template <class... Pointers>
bool aligned(DType dtype, int64_t cols, const Pointers*... pointers) {
  return cols % (dtype == DType::kFloat32 ? kWideVec<float> : kWideVec<half_t>) == 0 && all_aligned(pointers...);
}

const Shape<LayerNormParams>& shape_of(const LayerNormParams& p) {
  return aligned(p.dtype, p.cols, p.x, p.residual, p.bias, p.weight, p.ln_bias, p.out, p.sum)
             ? first_that_holds(kForward, p.cols)
             : first_that_holds(kForwardUnaligned, p.cols);
}

const Shape<LayerNormBackwardParams>& shape_of(const LayerNormBackwardParams& p) {
  return aligned(p.dtype, p.cols, p.dout, p.dsum, p.sum, p.weight, p.dx) ? first_that_holds(kBackward, p.cols)
                                                                         : first_that_holds(kBackwardUnaligned, p.cols);
}

}  // namespace

void launch_layer_norm(const LayerNormParams& p, void* stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const Shape<LayerNormParams>& shape = shape_of(p);
  shape.run(p, ceil_div(p.rows, int64_t{shape.rows}), stream);
}

int64_t layer_norm_backward_groups(const LayerNormBackwardParams& p) {
  if (p.rows == 0 || p.cols == 0) return 0;
  const Shape<LayerNormBackwardParams>& shape = shape_of(p);
  return std::min(ceil_div(p.rows, int64_t{shape.rows}), int64_t{shape.blocks_per_sm} * sm_count());
}

void launch_layer_norm_backward(const LayerNormBackwardParams& p, void* stream) {
  if (p.cols == 0) return;
  if (p.rows > 0) shape_of(p).run(p, p.groups, stream);
  launch_column_sum("add_bias_residual_layer_norm_backward",
                    {.partials = p.partials,
                     .out = {p.dbias, p.dweight, p.dln_bias},
                     .sums = 3,
                     .groups = p.groups,
                     .cols = p.cols,
                     .dtype = p.float_parameters ? DType::kFloat32 : p.dtype},
                    stream);
}

}  // namespace warpform
