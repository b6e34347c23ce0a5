// The kernels of one instruction set by their names; table.cpp makes a table of them.
#pragma once

#include "kernels.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {

// activation.cpp
void bias_gelu(const BiasGeluParams& params, const Host& host);
void bias_gelu_backward(const BiasGeluBackwardParams& params, const Host& host);

// norm.cpp
void layer_norm(const LayerNormParams& params, const Host& host);
void layer_norm_backward(const LayerNormBackwardParams& params, const Host& host);

// packing.cpp
void packing_plan(const PackingPlanParams& params, const Host& host);
void gather_rows(const GatherRowsParams& params, const Host& host);
// window_forward.cpp, window_backward.cpp
void window_attention(const WindowForwardParams& params, const Host& host);
void window_attention_backward(const WindowBackwardParams& params, const Host& host);

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
