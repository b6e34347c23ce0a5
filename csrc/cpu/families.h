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

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
