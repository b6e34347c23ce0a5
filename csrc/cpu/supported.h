// The configurations that CPU kernels exist for, as csrc/kernels/common/supported.h says it for GPUs.
#pragma once

#include "kernels/common/supported.h"

namespace warpform::cpu {

inline constexpr SupportedDTypes kFloats{{"float32", "float16", "bfloat16"},
                                         "the CPU kernels take float32, float16 and bfloat16"};

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
};

}  // namespace warpform::cpu
