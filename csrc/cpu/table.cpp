// The table of the kernels of one instruction set.
#include "families.h"
#include "simd.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    .isa = kIsaName,
    .lanes = kLanes,
    .bias_gelu = bias_gelu,
    .bias_gelu_backward = bias_gelu_backward,
    .layer_norm = layer_norm,
    .layer_norm_backward = layer_norm_backward,
    .packing_plan = packing_plan,
    .gather_rows = gather_rows,
    .window_attention = window_attention,
    .window_attention_backward = window_attention_backward,
};

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
