// Torch's threads for CPU kernels, and whether kernels may run on a CPU.
#pragma once

#include "cpu/kernels.h"

namespace warpform {

// Torch's own threads, as many as torch.set_num_threads says; inside of a parallel region of torch, the calling thread
// alone. Memory stays with its thread between calls.
const cpu::Host& torch_host();

// Why no CPU kernel may run, whatever the arguments, or null: WARPFORM_BACKEND=reference, WARPFORM_CPU_ISA=0, a CPU that
// the kernels were not built for. The text lives as long as the process.
const char* cpu_kernels_unusable();

}  // namespace warpform
