// The CPU kernels: a table of functions for each instruction set that they were compiled for. They take the parameters
// of the CUDA kernels (csrc/kernels/*/launch.h) with pointers into ordinary memory, aligned to their elements alone, and
// need no workspace of them. They return when they are done. A null entry: this instruction set has no such kernel.
#pragma once

#include "host.h"
#include "kernels/activation/launch.h"

namespace warpform::cpu {

template <class Params>
using Kernel = void (*)(const Params& params, const Host& host);

// Blocks of a structured matrix, contiguous, and where its gradient goes.
struct BlockFactor {
  const void* w;  // [count, rows, cols]
  void* dw;       // the same; of the backward alone
  int64_t count;
  int64_t rows;
  int64_t cols;
};

// A product with one block-diagonal factor, with a Monarch matrix of two, or the gated MLP, w_up and w_down, and its
// gradients (csrc/kernels/monarch/launch.h has the formulas). Results are contiguous.
struct BlockProductParams {
  BlockFactor first;
  BlockFactor second;  // unused by block-diagonal products
  const void* x;       // [rows, first.count * first.cols], rows x_stride elements apart
  const void* bias;    // of the last factor's outputs, or null; of the forward alone
  const void* dout;    // [rows, outputs], rows dout_stride elements apart; of the backward alone
  void* out;           // [rows, outputs]; of the forward alone
  void* dx;            // [rows, first.count * first.cols]; of the backward alone
  void* dbias;         // as the bias, or null; of the backward alone
  int64_t rows;
  int64_t x_stride;
  int64_t dout_stride;
  DType dtype;
};

struct Kernels {
  const char* isa;  // "x86-64-v3", "x86-64-v4" or "aarch64"
  int lanes;        // float32 elements of a vector

  Kernel<BiasGeluParams> bias_gelu;
  Kernel<BiasGeluBackwardParams> bias_gelu_backward;

  Kernel<BlockProductParams> blockdiag_multiply;
  Kernel<BlockProductParams> blockdiag_multiply_backward;
  Kernel<BlockProductParams> monarch_multiply;
  Kernel<BlockProductParams> monarch_multiply_backward;
  Kernel<BlockProductParams> blockdiag_glu;
  Kernel<BlockProductParams> blockdiag_glu_backward;
};

// The kernels for this CPU: the widest instruction set that it has, or that WARPFORM_CPU_ISA names. Null where it has
// none of them. Asked once.
const Kernels* kernels();

// Why kernels() is null, or null.
const char* kernels_missing();

}  // namespace warpform::cpu
