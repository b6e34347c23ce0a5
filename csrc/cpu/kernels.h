// The CPU kernels: a table of functions for each instruction set that they were compiled for. They take the parameters
// of the CUDA kernels (csrc/kernels/*/launch.h) with pointers into ordinary memory, aligned to their elements alone, and
// need no workspace of them. They return when they are done. A null entry: this instruction set has no such kernel.
#pragma once

#include "host.h"
#include "kernels/activation/launch.h"
#include "kernels/attention/launch.h"

namespace warpform::cpu {

template <class Params>
using Kernel = void (*)(const Params& params, const Host& host);

struct Kernels {
  const char* isa;  // "x86-64-v3", "x86-64-v4" or "aarch64"
  int lanes;        // float32 elements of a vector

  Kernel<AttentionForwardParams> varlen_attention;
  Kernel<AttentionBackwardParams> varlen_attention_backward;

  Kernel<AttentionStepParams> attention_step;
  Kernel<AttentionStepBackwardParams> attention_step_backward;

  Kernel<BiasGeluParams> bias_gelu;
  Kernel<BiasGeluBackwardParams> bias_gelu_backward;
};

// The kernels for this CPU: the widest instruction set that it has, or that WARPFORM_CPU_ISA names. Null where it has
// none of them. Asked once.
const Kernels* kernels();

// Why kernels() is null, or null.
const char* kernels_missing();

}  // namespace warpform::cpu
