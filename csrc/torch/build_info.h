// Facts about this binary, for doctor, tests and tools.
#pragma once

#include <cstdint>
#include <string>

namespace warpform {

std::string build_info();
// Why calls on GPU `device` take none of the kernels for compute capability 9.0 (common/hopper.h); empty where they do. A
// negative device is the current one. Throws std::exception where there is no such GPU.
std::string hopper_kernels_missing(int64_t device);
// The architectures that the kernels were built for, in CMake's notation, such as "80 90a-real".
std::string built_architectures();
// A version of CUDA, 1000 * major + 10 * minor, as "13.0".
std::string cuda_version(int number);
// Every configuration that has a kernel, as a JSON list.
std::string kernel_table();
// The same of the kernels for the CPU of this process; an empty list where none of them can run.
std::string cpu_kernel_table();
// As api::Table says.
const char* supported(const char* op, const char* dtype, int32_t device, int32_t count, const char* const* names,
                      const int64_t* sizes);

}  // namespace warpform
