// The CPU kernels: a table of functions for each instruction set that they were compiled for. They take the parameters
// of the CUDA kernels (csrc/kernels/*/launch.h) with pointers into ordinary memory, aligned to their elements alone, and
// need no workspace of them. They return when they are done.
#pragma once

#include "host.h"
#include "kernels/activation/launch.h"
#include "kernels/attention/launch.h"
#include "kernels/norm/launch.h"
#include "kernels/packing/launch.h"
#include "kernels/routing/launch.h"
#include "kernels/short_conv/launch.h"
#include "kernels/spatial/launch.h"
#include "kernels/window/launch.h"
#include "kernels/window_mix/launch.h"

namespace warpform::cpu {

template <class Params>
using Kernel = void (*)(const Params& params, const Host& host);

// The tables of disentangled attention; kernels for a GPU take products with them (RelativeTerms).
struct RelativeTables {
  HeadsView pos_key;    // [2 * span, heads, head_dim], or null data: no such term
  HeadsView pos_query;  // the same
  int64_t rows;         // 2 * span
  // [2 * reach + 1]: the tables' row of the distances from -reach to reach, not decreasing; farther ones have the last
  // row of their side.
  const int32_t* row_of_distance;
  int64_t reach;
  const int64_t* positions;  // [total], or null: a token's number in its sequence
};

struct DisentangledParams {
  AttentionForwardParams attention;  // without its problem's RelativeTerms
  RelativeTables tables;
};

struct DisentangledBackwardParams {
  AttentionBackwardParams attention;  // without workspaces, dc2p and dp2c
  RelativeTables tables;
  void* dpos_key;  // [2 * span, heads, head_dim], or null
  void* dpos_query;
};

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

// A product that touches a token's groups alone, or the gradient of its weight (csrc/kernels/routing/launch.h has the
// formulas). The routed dimension is num_groups * width wide, the dense one num_out * dense_width. `hidden_gather` reads
// groups, `hidden_scatter` writes them.
struct RoutedProductParams {
  const int64_t* group_mask;  // [tokens]
  const int32_t* perm;        // [tiles * tile], -1: no token; those of a tile come behind its tokens
  const int32_t* tile_class;  // [tiles]
  const int64_t* out_mask;    // [num_out], or null where num_out is 1
  int64_t tokens;
  int64_t tiles;
  int64_t tile;
  int64_t num_groups;
  int64_t num_classes;
  int64_t width;
  int64_t num_out;
  int64_t dense_width;

  const void* w;  // [num_classes, outputs, inputs]; one of the two strides is 1
  int64_t out_stride;
  int64_t in_stride;
  int64_t class_stride;

  const void* x;         // [tokens, inputs]; of the weight's gradient the dense side
  const void* dot_with;  // [tokens, groups], or null; of the weight's gradient the routed side
  const float* gates;    // [tokens, num_groups], or null
  const void* bias;      // [outputs] of each class, or null
  void* out;             // [tokens, outputs]; of the weight's gradient float32 [num_classes, outputs, inputs]
  void* ungated;         // of hidden_scatter, or null
  float* dots;           // [tokens, num_groups], the groups' products of `dot_with` with the routed side, or null
  int64_t x_stride;
  int64_t dot_stride;
  int64_t bias_stride;  // between classes; 0: one for all
  bool routed_out;      // of the weight's gradient: its outputs are the routed side
  DType dtype;
};

struct Kernels {
  const char* isa;  // "x86-64-v3", "x86-64-v4" or "aarch64"
  int lanes;        // float32 elements of a vector

  Kernel<AttentionForwardParams> varlen_attention;
  Kernel<AttentionBackwardParams> varlen_attention_backward;
  Kernel<AttentionStepParams> attention_step;
  Kernel<AttentionStepBackwardParams> attention_step_backward;

  Kernel<DisentangledParams> disentangled_attention;
  Kernel<DisentangledBackwardParams> disentangled_attention_backward;

  Kernel<BiasGeluParams> bias_gelu;
  Kernel<BiasGeluBackwardParams> bias_gelu_backward;
  Kernel<LayerNormParams> layer_norm;
  Kernel<LayerNormBackwardParams> layer_norm_backward;
  Kernel<RmsNormParams> rms_norm;
  Kernel<RmsNormBackwardParams> rms_norm_backward;
  Kernel<RmsNormGeluParams> rms_norm_gelu;
  Kernel<RmsNormGeluBackwardParams> rms_norm_gelu_backward;
  Kernel<PackingPlanParams> packing_plan;
  Kernel<GatherRowsParams> gather_rows;
  Kernel<WindowForwardParams> window_attention;
  Kernel<WindowBackwardParams> window_attention_backward;

  Kernel<BlockProductParams> blockdiag_multiply;
  Kernel<BlockProductParams> blockdiag_multiply_backward;
  Kernel<BlockProductParams> monarch_multiply;
  Kernel<BlockProductParams> monarch_multiply_backward;
  Kernel<BlockProductParams> blockdiag_glu;
  Kernel<BlockProductParams> blockdiag_glu_backward;

  Kernel<RoutingMaskParams> routing_mask;
  Kernel<RoutingPlanParams> routing_plan;
  Kernel<RoutedProductParams> hidden_gather;
  Kernel<RoutedProductParams> hidden_scatter;
  Kernel<RoutedProductParams> hidden_weight_grad;

  Kernel<ShortConvParams> short_conv_gate;
  Kernel<ShortConvBackwardParams> short_conv_gate_backward;

  Kernel<PoolMixerParams> pool_mixer;
  Kernel<PoolMixerBackwardParams> pool_mixer_backward;
  Kernel<DepthwiseConv2dParams> depthwise_conv2d;
  Kernel<DepthwiseConv2dBackwardParams> depthwise_conv2d_backward;

  Kernel<WindowMixParams> window_mix;
  Kernel<WindowMixBackwardParams> window_mix_backward;
};

// The kernels for this CPU: the widest instruction set that it has, or that WARPFORM_CPU_ISA names. Null where it has
// none of them. Asked once.
const Kernels* kernels();

// Why kernels() is null, or null.
const char* kernels_missing();

}  // namespace warpform::cpu
