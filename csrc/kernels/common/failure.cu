#include "common/failure.h"

#include <stdexcept>
#include <string>

namespace warpform {

void fail(const char* op, const char* what, const char* why) {
  std::string text = std::string(op) + ": " + what;
  if (why != nullptr) text += std::string(": ") + why;
  throw std::runtime_error(text);
}

void fail_for_size(const char* op, const char* what, int64_t size, const char* unit) {
  throw std::runtime_error(std::string(op) + ": " + what + " " + std::to_string(size) + " " + unit);
}

}  // namespace warpform
