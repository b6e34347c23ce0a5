// The emulator's own ops, for tests.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <map>
#include <string>

#include "simt/scheduler.h"
#include "torch/launch.h"

namespace warpform {
namespace {

const std::map<std::string, DeviceCode> kCodes = {{"found", DeviceCode::kFound},
                                                  {"none", DeviceCode::kNone},
                                                  {"unreadable", DeviceCode::kUnreadable},
                                                  {"unknown", DeviceCode::kUnknown}};

void configure(int64_t seed, int64_t sm_count, int64_t shared_memory_limit) {
  check(seed >= 0, "_configure: seed must not be negative, got ", seed);
  check(sm_count >= 1 && sm_count <= 1024, "_configure: sm_count must be 1 to 1024, got ", sm_count);
  check(shared_memory_limit >= 0 && shared_memory_limit <= 227 * 1024,
        "_configure: shared_memory_limit must be 0 to 232448, got ", shared_memory_limit);
  simt::configure(static_cast<uint64_t>(seed), {static_cast<int>(sm_count), static_cast<int>(shared_memory_limit)});
}

void claim(int64_t driver, int64_t capability, std::string code) {
  const auto found = kCodes.find(code);
  check(found != kCodes.end(), "_claim: code must be found, none, unreadable or unknown, got ", code);
  simt::claim({static_cast<int>(driver), static_cast<int>(capability), found->second});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(warpform_simt, m) {
  // Sets the order of threads and blocks that the next launches see (0: the plain one), the number of multiprocessors
  // that a kernel finds, and the bytes of shared memory that a block may have.
  m.def("_configure(int seed, int sm_count=4, int shared_memory_limit=232448) -> ()");
  // The machine's facts until the next _configure: versions of CUDA as 13000, a compute capability as
  // 90, and whether there is code for it ("found", "none", "unreadable", "unknown": DeviceCode).
  m.def("_claim(int driver=13000, int capability=90, str code=\"found\") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(warpform_simt, CompositeExplicitAutograd, m) {
  m.impl("_configure", TORCH_BOX(&configure));
  m.impl("_claim", TORCH_BOX(&claim));
}

}  // namespace warpform
