// The configurations that CPU kernels exist for, as csrc/kernels/common/supported.h says it for GPUs.
#pragma once

#include "kernels/common/supported.h"
#include "kernels/routing/launch.h"
#include "kernels/short_conv/launch.h"
#include "kernels/spatial/launch.h"
#include "kernels/window_mix/launch.h"

namespace warpform::cpu {

inline constexpr SupportedDTypes kFloats{{"float32", "float16", "bfloat16"},
                                         "the CPU kernels take float32, float16 and bfloat16"};

inline constexpr SizeLimit kWindowTokens{
    .name = "window_tokens", .max = 4096, .otherwise = "the window has more than 4096 tokens"};
inline constexpr SizeLimit kAttentionHeadDim{.name = "head_dim", .max = 256, .otherwise = "head_dim is above 256"};

inline constexpr SupportedConfig kConfigs[] = {
    {.op = "varlen_attention", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "varlen_attention_backward", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "attention_step", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "attention_step_backward", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "disentangled_attention", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "disentangled_attention_backward", .dtypes = kFloats, .limits = {kAttentionHeadDim}},
    {.op = "bias_gelu", .dtypes = kFloats, .float_parameters = true, .option = kGeluForms},
    {.op = "bias_gelu_backward", .dtypes = kFloats, .float_parameters = true, .option = kGeluForms},
    {.op = "add_bias_residual_layer_norm", .dtypes = kFloats, .float_parameters = true},
    {.op = "add_bias_residual_layer_norm_backward", .dtypes = kFloats, .float_parameters = true},
    {.op = "add_residual_rms_norm", .dtypes = kFloats, .float_parameters = true},
    {.op = "add_residual_rms_norm_backward", .dtypes = kFloats, .float_parameters = true},
    {.op = "rms_norm_gelu", .dtypes = kFloats, .option = kGeluForms},
    {.op = "rms_norm_gelu_backward", .dtypes = kFloats, .option = kGeluForms},
    {.op = "packing_plan"},
    {.op = "pack", .dtypes = {{"any"}}},
    {.op = "unpack", .dtypes = {{"any"}}},
    {.op = "window_attention", .dtypes = kFloats, .limits = {kWindowTokens}},
    {.op = "window_attention_backward", .dtypes = kFloats, .limits = {kWindowTokens}},
    {.op = "blockdiag_multiply", .dtypes = kFloats},
    {.op = "blockdiag_multiply_backward", .dtypes = kFloats},
    {.op = "monarch_multiply", .dtypes = kFloats},
    {.op = "monarch_multiply_backward", .dtypes = kFloats},
    {.op = "blockdiag_glu", .dtypes = kFloats},
    {.op = "blockdiag_glu_backward", .dtypes = kFloats},
    {.op = "routing_mask", .limits = {kRoutingGroups}},
    {.op = "routing_plan", .limits = {kRoutingGroups}},
    {.op = "hidden_gather_linear", .dtypes = kFloats},
    {.op = "hidden_gather_linear_backward", .dtypes = kFloats},
    {.op = "hidden_scatter_linear", .dtypes = kFloats},
    {.op = "hidden_scatter_linear_backward", .dtypes = kFloats},
    {.op = "hidden_weight_grad", .dtypes = kFloats},
    {.op = "short_conv_gate", .dtypes = kFloats, .limits = {kShortConvTaps}},
    {.op = "short_conv_gate_backward", .dtypes = kFloats, .limits = {kShortConvTaps}},
    {.op = "pool_mixer", .dtypes = kFloats, .limits = {kPoolSizes}, .float_parameters = true},
    {.op = "pool_mixer_backward", .dtypes = kFloats, .limits = {kPoolSizes}, .float_parameters = true},
    {.op = "depthwise_conv2d", .dtypes = kFloats, .limits = {kDepthwiseSizes}},
    {.op = "depthwise_conv2d_backward", .dtypes = kFloats, .limits = {kDepthwiseSizes}},
    {.op = "window_mix", .dtypes = kFloats, .limits = {kWindowMixTokens}, .float_parameters = true},
    {.op = "window_mix_backward", .dtypes = kFloats, .limits = {kWindowMixTokens}, .float_parameters = true},
};

}  // namespace warpform::cpu
