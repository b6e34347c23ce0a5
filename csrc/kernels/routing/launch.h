// Launch functions of hidden routing: pointers into device memory, sizes, an opaque stream. They launch and return; a
// launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "common/dtype.h"
#include "common/supported.h"

namespace warpform {

inline constexpr int kMaxGroups = 64;    // bits of a mask
inline constexpr int kMaxClasses = 256;  // one digit of the sort
inline constexpr int kHiddenTile = 128;  // tokens of a tile, for the products
inline constexpr int kHiddenBlock = 64;  // hidden dimensions that are worked on at a time: narrower groups cost as much
inline constexpr int kGemvTokens = 4;    // up to this many tokens take the GEMV kernels, which need no tiles

// ---- plan ----

struct RoutingMaskParams {
  const void* idx;      // [tokens, choices] of int64 or int32, contiguous
  int64_t* group_mask;  // [tokens]
  int64_t tokens;
  int choices;
  int num_groups;
  int num_shared;
  bool wide;  // int64
};
void launch_routing_mask(const RoutingMaskParams& params, void* stream);

struct RoutingPlanParams {
  const int64_t* group_mask;   // [tokens]
  const int64_t* token_class;  // [tokens] or null
  int32_t* perm;               // [tiles * tile]
  int32_t* inverse;            // [tokens]
  int64_t* tile_mask;          // [tiles]
  int32_t* tile_class;         // [tiles]
  int32_t* workspace;          // [routing_plan_workspace(tokens)]
  int tokens;
  int tiles;
  int tile;
  int num_groups;
  int num_classes;
};
// int32 elements.
int64_t routing_plan_workspace(int64_t tokens);
void launch_routing_plan(const RoutingPlanParams& params, void* stream);

// ---- products ----

// A plan as kernels read it.
struct Routes {
  const int64_t* group_mask;  // [tokens]
  const int32_t* perm;        // [tiles * kHiddenTile], -1: no token
  const int64_t* tile_mask;   // [tiles]
  const int32_t* tile_class;  // [tiles]
  const int64_t* out_mask;    // [num_out], or null where num_out is 1
  int tokens;
  int tiles;
  int num_groups;
  int num_classes;
  int width;        // of a group, a multiple of 8
  int num_out;      // parts of the dense dimension, the one that is not routed
  int dense_width;  // of one part, a multiple of 8
};

// A weight [num_classes, outputs, inputs]: either its inputs are contiguous, or, transposed, its outputs.
struct RoutedWeight {
  const void* data;
  int64_t stride;        // elements between what is not contiguous
  int64_t class_stride;  // elements between classes
  bool transposed;
};

// out[t] = sum over groups g of t of gates[t, g] w[:, g] x[t, g] + bias
struct HiddenGatherParams {
  Routes routes;
  RoutedWeight w;      // [num_out * dense_width, num_groups * width]
  const void* x;       // [tokens, num_groups * width], rows x_stride elements apart
  const float* gates;  // [tokens, num_groups], or null
  const void* bias;    // [num_out * dense_width] of each class, or null
  void* out;           // [tokens, num_out * dense_width]
  int64_t x_stride;
  int64_t bias_stride;  // between classes; 0: one for all
  DType dtype;
};
void launch_hidden_gather(const char* op, const HiddenGatherParams& params, void* stream);
// Why this GPU has no room for the kernels, or null: the gates of a tile's tokens are in shared memory.
const char* hidden_gather_unsupported(const Routes& routes, const RoutedWeight& w, bool has_gates);

// z[t, g] = w[g] x[t] + bias[g] and out[t, g] = gates[t, g] z[t, g] for groups g of t, 0 for others; dots[t, g] = the
// product of z[t, g] and dot_with[t, g]
struct HiddenScatterParams {
  Routes routes;
  RoutedWeight w;        // [num_groups * width, num_out * dense_width]
  const void* x;         // [tokens, num_out * dense_width], rows x_stride elements apart
  const float* gates;    // [tokens, num_groups], or null
  const void* bias;      // [num_groups * width] of each class, or null
  const void* dot_with;  // [tokens, num_groups * width], rows dot_stride elements apart, or null
  void* out;             // [tokens, num_groups * width]
  void* ungated;         // z, as out, or null
  float* dots;           // [tokens, num_groups], or null
  float* dot_partials;   // [ceil(width / kHiddenBlock), tokens, num_groups], workspace; unused where that is 1
  int64_t x_stride;
  int64_t dot_stride;
  int64_t bias_stride;
  DType dtype;
};
void launch_hidden_scatter(const char* op, const HiddenScatterParams& params, void* stream);

// dw = the sum over tokens of dense[t] (gates[t, g] routed[t, g])^T; `routed` has its groups along the rows of dw
// (routed_out), or along its columns.
struct HiddenWeightGradParams {
  Routes routes;
  const void* dense;   // [tokens, num_out * dense_width]
  const void* routed;  // [tokens, num_groups * width]
  const float* gates;  // [tokens, num_groups], or null
  float* dw;           // [num_classes, num_out * dense_width, num_groups * width], transposed if routed_out
  float* partials;     // [splits, the shape of dw], workspace; unused by one split
  int64_t dense_stride;
  int64_t routed_stride;
  int splits;  // of the tiles: hidden_weight_grad_splits
  bool routed_out;
  DType dtype;
};
// A function of the sizes and the GPU's number of SMs.
int hidden_weight_grad_splits(const Routes& routes);
// Why this GPU has no room for the kernel, or null.
const char* hidden_weight_grad_unsupported();
void launch_hidden_weight_grad(const HiddenWeightGradParams& params, void* stream);

// dots[t, g] = the product of a[t, g] and b[t, g] for groups g of t, 0 for others; rows of both contiguous.
struct GroupDotsParams {
  const void* a;  // [tokens, num_groups * width]
  const void* b;
  const int64_t* group_mask;  // [tokens]
  float* dots;                // [tokens, num_groups]
  int64_t tokens;
  int num_groups;
  int width;  // a multiple of 8
  DType dtype;
};
void launch_group_dots(const char* op, const GroupDotsParams& params, void* stream);

// ---- supported configurations ----

inline constexpr const char* kRoutingNoRoom = "these routed products need more shared memory a block than this GPU has";
inline constexpr SizeLimit kRoutingGroups{.name = "num_groups", .max = kMaxGroups};
inline constexpr SizeLimit kRoutingClasses{
    .name = "num_classes", .max = kMaxClasses, .otherwise = "the kernels sort up to 256 classes"};
inline constexpr SizeLimit kGroupWidth{
    .name = "widths", .multiple_of = 8, .otherwise = "the width of a group is not a multiple of 8"};
inline constexpr SizeLimit kDenseWidth{
    .name = "widths",
    .multiple_of = 8,
    .otherwise = "the width of the other dimension, or a part of it, is not a multiple of 8"};
inline constexpr SizeLimit kRoutingTile{
    .name = "tile", .max = kHiddenTile, .otherwise = "the plan's tile is not 128 tokens", .as_number = true};

inline constexpr SupportedConfig kRoutingConfigs[] = {
    {.op = "routing_mask", .limits = {kRoutingGroups}},
    {.op = "routing_plan", .limits = {kRoutingGroups}},
    {.op = "hidden_gather_linear", .dtypes = kHalfTypes, .limits = {kGroupWidth, kRoutingTile}},
    {.op = "hidden_gather_linear_backward", .dtypes = kHalfTypes, .limits = {kGroupWidth, kRoutingTile}},
    {.op = "hidden_scatter_linear", .dtypes = kHalfTypes, .limits = {kGroupWidth, kRoutingTile}},
    {.op = "hidden_scatter_linear_backward", .dtypes = kHalfTypes, .limits = {kGroupWidth, kRoutingTile}},
    {.op = "hidden_weight_grad", .dtypes = kHalfTypes, .limits = {kGroupWidth, kRoutingTile}},
};

}  // namespace warpform
