// The table of the kernels of one instruction set.
#include "families.h"
#include "simd.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    .isa = kIsaName,
    .lanes = kLanes,
    .varlen_attention = varlen_attention,
    .varlen_attention_backward = varlen_attention_backward,
    .attention_step = attention_step,
    .attention_step_backward = attention_step_backward,
    .disentangled_attention = disentangled_attention,
    .disentangled_attention_backward = disentangled_attention_backward,
    .bias_gelu = bias_gelu,
    .bias_gelu_backward = bias_gelu_backward,
    .layer_norm = layer_norm,
    .layer_norm_backward = layer_norm_backward,
    .rms_norm = rms_norm,
    .rms_norm_backward = rms_norm_backward,
    .rms_norm_gelu = rms_norm_gelu,
    .rms_norm_gelu_backward = rms_norm_gelu_backward,
    .packing_plan = packing_plan,
    .gather_rows = gather_rows,
    .window_attention = window_attention,
    .window_attention_backward = window_attention_backward,
    .blockdiag_multiply = blockdiag_multiply,
    .blockdiag_multiply_backward = blockdiag_multiply_backward,
    .monarch_multiply = monarch_multiply,
    .monarch_multiply_backward = monarch_multiply_backward,
    .blockdiag_glu = blockdiag_glu,
    .blockdiag_glu_backward = blockdiag_glu_backward,
    .routing_mask = routing_mask,
    .routing_plan = routing_plan,
    .hidden_gather = hidden_gather,
    .hidden_scatter = hidden_scatter,
    .hidden_weight_grad = hidden_weight_grad,
    .short_conv_gate = short_conv_gate,
    .short_conv_gate_backward = short_conv_gate_backward,
    .pool_mixer = pool_mixer,
    .pool_mixer_backward = pool_mixer_backward,
    .depthwise_conv2d = depthwise_conv2d,
    .depthwise_conv2d_backward = depthwise_conv2d_backward,
    .window_mix = window_mix,
    .window_mix_backward = window_mix_backward,
};

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
