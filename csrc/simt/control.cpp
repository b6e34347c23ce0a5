#include "simt/control.h"

#include <map>
#include <string>
#include <string_view>

#include "simt/scheduler.h"

namespace warpform::simt {
namespace {

const std::map<std::string_view, DeviceCode> kCodes = {{"found", DeviceCode::kFound},
                                                       {"none", DeviceCode::kNone},
                                                       {"unreadable", DeviceCode::kUnreadable},
                                                       {"unknown", DeviceCode::kUnknown}};

const char* kept(std::string text) {
  static std::string last;
  last = std::move(text);
  return last.c_str();
}

const char* configure_checked(int64_t seed, int64_t sm_count, int64_t shared_memory_limit) {
  if (seed < 0) return kept("seed must not be negative, got " + std::to_string(seed));
  if (sm_count < 1 || sm_count > 1024) return kept("sm_count must be 1 to 1024, got " + std::to_string(sm_count));
  if (shared_memory_limit < 0 || shared_memory_limit > 227 * 1024) {
    return kept("shared_memory_limit must be 0 to 232448, got " + std::to_string(shared_memory_limit));
  }
  configure(static_cast<uint64_t>(seed), {static_cast<int>(sm_count), static_cast<int>(shared_memory_limit)});
  return nullptr;
}

const char* claim_checked(int64_t driver, int64_t capability, const char* code, bool tensor_maps) {
  const auto found = kCodes.find(code);
  if (found == kCodes.end()) {
    return kept(std::string("code must be found, none, unreadable or unknown, got ") + code);
  }
  claim({static_cast<int>(driver), static_cast<int>(capability), found->second}, tensor_maps);
  return nullptr;
}

std::string json(const Launched& launched) {
  const dim3& g = launched.grid;
  return "{\"op\": \"" + launched.op + "\", \"kernel\": \"" + launched.kernel + "\", \"grid\": [" +
         std::to_string(g.x) + ", " + std::to_string(g.y) + ", " + std::to_string(g.z) +
         "], \"threads\": " + std::to_string(launched.threads) +
         ", \"shared_bytes\": " + std::to_string(launched.shared_bytes) + "}";
}

const char* launches_as_json() {
  std::string text;
  for (const Launched& launched : launches()) text += (text.empty() ? "[" : ", ") + json(launched);
  return kept(text.empty() ? "[]" : text + "]");
}

}  // namespace
}  // namespace warpform::simt

extern "C" __attribute__((visibility("default"))) const warpform::simt::Control* warpform_simt_control_v1() {
  using namespace warpform::simt;
  static const Control control{configure_checked, claim_checked, launches_as_json};
  return &control;
}
