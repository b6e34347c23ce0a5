// The configurations that CPU kernels exist for, as csrc/kernels/common/supported.h says it for GPUs.
#pragma once

#include "kernels/common/supported.h"

namespace warpform::cpu {

inline constexpr SupportedDTypes kFloats{{"float32", "float16", "bfloat16"},
                                         "the CPU kernels take float32, float16 and bfloat16"};

inline constexpr SizeLimit kWindowTokens{
    .name = "window_tokens", .max = 4096, .otherwise = "the window has more than 4096 tokens"};

inline constexpr SupportedConfig kConfigs[] = {
    {.op = "bias_gelu", .dtypes = kFloats, .float_parameters = true, .option = {"approximate", {"none", "tanh"}}},
    {.op = "bias_gelu_backward",
     .dtypes = kFloats,
     .float_parameters = true,
     .option = {"approximate", {"none", "tanh"}}},
    {.op = "add_bias_residual_layer_norm", .dtypes = kFloats, .float_parameters = true},
    {.op = "add_bias_residual_layer_norm_backward", .dtypes = kFloats, .float_parameters = true},
    {.op = "packing_plan", .dtypes = {{"any"}}},
    {.op = "pack", .dtypes = {{"any"}}},
    {.op = "unpack", .dtypes = {{"any"}}},
    {.op = "window_attention", .dtypes = kFloats, .limits = {kWindowTokens}},
    {.op = "window_attention_backward", .dtypes = kFloats, .limits = {kWindowTokens}},
};

}  // namespace warpform::cpu
