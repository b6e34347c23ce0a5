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
};

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
