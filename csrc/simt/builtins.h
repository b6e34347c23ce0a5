// Names that a CUDA compiler declares by itself. The scheduler sets the variables whenever another thread goes on.
#pragma once

#include <vector_types.h>

// The headers leave it undefined for a host compiler.
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif

inline uint3 threadIdx{0, 0, 0};
inline uint3 blockIdx{0, 0, 0};
inline dim3 blockDim;
inline dim3 gridDim;
