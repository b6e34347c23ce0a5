#include "simt/report.h"

#include <cstring>
#include <stdexcept>

#include "simt/scheduler.h"

namespace warpform::simt {

std::string text_of(const Where& where) {
  std::string file = where.file_name();
  const size_t root = file.rfind("csrc/");
  if (root != std::string::npos) file = file.substr(root + 5);
  return file + ":" + std::to_string(where.line());
}

std::string thread_text(int warp, int lane) { return "thread " + std::to_string(warp * kLanes + lane); }

std::string report_header(int thread) {
  const GridState& g = grid();
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  std::string text = g.op + ": kernel " + g.kernel + ", block " + triple(blockIdx.x, blockIdx.y, blockIdx.z);
  if (thread >= 0) text += ", thread " + triple(static_cast<unsigned>(thread), 0, 0);
  return text + ": ";
}

void fail(const std::string& reason, const Where& where) {
  throw std::runtime_error(report_header(static_cast<int>(threadIdx.x)) + reason + " at " + text_of(where));
}

void fail(const std::string& reason) {
  throw std::runtime_error(report_header(static_cast<int>(threadIdx.x)) + reason);
}

bool same_site_slow(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

}  // namespace warpform::simt
