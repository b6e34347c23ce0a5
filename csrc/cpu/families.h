// The kernels of one instruction set by their names; table.cpp makes a table of them.
#pragma once

#include "kernels.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {

// attention.cpp
void varlen_attention(const AttentionForwardParams& params, const Host& host);
void varlen_attention_backward(const AttentionBackwardParams& params, const Host& host);

// attention_step.cpp
void attention_step(const AttentionStepParams& params, const Host& host);
void attention_step_backward(const AttentionStepBackwardParams& params, const Host& host);

// disentangled.cpp
void disentangled_attention(const DisentangledParams& params, const Host& host);
void disentangled_attention_backward(const DisentangledBackwardParams& params, const Host& host);

// activation.cpp
void bias_gelu(const BiasGeluParams& params, const Host& host);
void bias_gelu_backward(const BiasGeluBackwardParams& params, const Host& host);

// norm.cpp
void layer_norm(const LayerNormParams& params, const Host& host);
void layer_norm_backward(const LayerNormBackwardParams& params, const Host& host);
void rms_norm(const RmsNormParams& params, const Host& host);
void rms_norm_backward(const RmsNormBackwardParams& params, const Host& host);

// norm_gelu.cpp
void rms_norm_gelu(const RmsNormGeluParams& params, const Host& host);
void rms_norm_gelu_backward(const RmsNormGeluBackwardParams& params, const Host& host);

// packing.cpp
void packing_plan(const PackingPlanParams& params, const Host& host);
void gather_rows(const GatherRowsParams& params, const Host& host);

// window_forward.cpp, window_backward.cpp
void window_attention(const WindowForwardParams& params, const Host& host);
void window_attention_backward(const WindowBackwardParams& params, const Host& host);

// window_mix.cpp
void window_mix(const WindowMixParams& params, const Host& host);
void window_mix_backward(const WindowMixBackwardParams& params, const Host& host);

// monarch.cpp
void blockdiag_multiply(const BlockProductParams& params, const Host& host);
void blockdiag_multiply_backward(const BlockProductParams& params, const Host& host);
void monarch_multiply(const BlockProductParams& params, const Host& host);
void monarch_multiply_backward(const BlockProductParams& params, const Host& host);
void blockdiag_glu(const BlockProductParams& params, const Host& host);
void blockdiag_glu_backward(const BlockProductParams& params, const Host& host);

// routing.cpp
void routing_mask(const RoutingMaskParams& params, const Host& host);
void routing_plan(const RoutingPlanParams& params, const Host& host);
void hidden_gather(const RoutedProductParams& params, const Host& host);
void hidden_scatter(const RoutedProductParams& params, const Host& host);
void hidden_weight_grad(const RoutedProductParams& params, const Host& host);

// short_conv.cpp
void short_conv_gate(const ShortConvParams& params, const Host& host);
void short_conv_gate_backward(const ShortConvBackwardParams& params, const Host& host);

// pool_mixer.cpp
void pool_mixer(const PoolMixerParams& params, const Host& host);
void pool_mixer_backward(const PoolMixerBackwardParams& params, const Host& host);

// depthwise_conv2d.cpp
void depthwise_conv2d(const DepthwiseConv2dParams& params, const Host& host);
void depthwise_conv2d_backward(const DepthwiseConv2dBackwardParams& params, const Host& host);

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
