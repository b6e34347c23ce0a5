// Errors of launch functions, thrown from one file: <stdexcept> and <string> would cost every file of kernels a second.
#pragma once

#include <cstdint>

namespace warpform {

// Throws std::runtime_error "OP: WHAT", or "OP: WHAT: WHY".
[[noreturn]] void fail(const char* op, const char* what, const char* why = nullptr);
// Throws std::runtime_error "OP: WHAT SIZE UNIT".
[[noreturn]] void fail_for_size(const char* op, const char* what, int64_t size, const char* unit);

}  // namespace warpform
