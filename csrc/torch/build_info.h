// Facts about this binary, for doctor, tests and tools.
#pragma once

#include <string>

namespace warpform {

std::string build_info();
std::string kernel_table();

}  // namespace warpform
