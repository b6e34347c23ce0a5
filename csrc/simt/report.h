// Errors of the emulator. Each names the op, the kernel, the block, the thread, what went wrong and the line of the
// kernel.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>

namespace warpform::simt {

using Where = std::source_location;

// "kernels/packing/pack.cuh:42"
std::string text_of(const Where& where);

// Throws std::runtime_error for the thread that is running.
[[noreturn]] void fail(const std::string& reason, const Where& where);
[[noreturn]] void fail(const std::string& reason);

// "thread 37"; in races and deadlocks, where a second thread is named.
std::string thread_text(int warp, int lane);

// The beginning of every report: op, kernel, block and (if not negative) thread.
std::string report_header(int thread);

bool same_site_slow(const Where& a, const Where& b);
// The compiler makes one constant of a line, mostly; where it made two, they are compared by what they say.
inline bool same_site(const Where& a, const Where& b) {
  return std::memcmp(&a, &b, sizeof(Where)) == 0 || same_site_slow(a, b);
}

}  // namespace warpform::simt
