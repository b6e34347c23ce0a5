// The configurations that CPU kernels exist for, as csrc/kernels/common/supported.h says it for GPUs.
#pragma once

#include "kernels/common/supported.h"

namespace warpform::cpu {

inline constexpr SupportedDTypes kFloats{{"float32", "float16", "bfloat16"},
                                         "the CPU kernels take float32, float16 and bfloat16"};

inline constexpr SizeLimit kAttentionHeadDim{.name = "head_dim", .max = 256, .otherwise = "head_dim is above 256"};

inline constexpr SupportedConfig kConfigs[] = {
    {.op = "varlen_attention", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "varlen_attention_backward", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "attention_step", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "attention_step_backward", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "disentangled_attention", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "disentangled_attention_backward", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "bias_gelu", .dtypes = kFloats, .float_parameters = true, .option = {"approximate", {"none", "tanh"}}},
    {.op = "bias_gelu_backward",
     .dtypes = kFloats,
     .float_parameters = true,
     .option = {"approximate", {"none", "tanh"}}},
};

}  // namespace warpform::cpu
