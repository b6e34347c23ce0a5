// Plans of launches, as the table in api.h gives them: JSON, a launch each.
#include "plan.h"

#include <algorithm>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/common/plan.h"

namespace warpform {

class LaunchPlan {
 public:
  PlannedMachine machine{};
  std::vector<PlannedLaunch> launches;
};

namespace {

thread_local LaunchPlan plan_of_thread;
thread_local LaunchPlan* active = nullptr;

// "forward<float, 8>" of "void launch(...) [with auto kKernel = warpform::forward<float, 8>; Params = ...]". What nvcc
// calls an unnamed namespace has the file's name in it.
std::string kernel_name(std::string_view text) {
  constexpr std::string_view kBegin = "kKernel = ";
  const size_t begin = text.find(kBegin);
  if (begin == std::string_view::npos) return std::string(text);
  std::string name(text.substr(begin + kBegin.size()));
  name.resize(std::min(name.find("; Params"), name.size()));
  for (const std::string_view noise : {"warpform::", "{anonymous}::", "<unnamed>::", "(anonymous namespace)::"}) {
    for (size_t at = name.find(noise); at != std::string::npos; at = name.find(noise)) name.erase(at, noise.size());
  }
  for (size_t at = name.find("_GLOBAL__N__"); at != std::string::npos; at = name.find("_GLOBAL__N__")) {
    const size_t end = name.find("::", at);
    name.erase(at, end == std::string::npos ? end : end + 2 - at);
  }
  return name;
}

// Blocks that a multiprocessor of compute capability 8.0 or 9.0 has room for by their threads and shared memory. Where
// there is no GPU, registers are not known.
int room_for_blocks(const PlannedLaunch& launch, const PlannedMachine& machine) {
  constexpr int kThreads = 2048, kBlocks = 32, kReserved = 1024;
  const int by_memory = (machine.shared_memory_limit + kReserved) / (launch.shared_bytes + kReserved);
  return std::min({kBlocks, kThreads / launch.threads, by_memory});
}

void append(std::ostream& os, const PlannedLaunch& launch, const PlannedMachine& machine) {
  const auto& [x, y, z] = launch.grid;
  const bool measured = launch.blocks_per_sm > 0;
  const int blocks_per_sm = measured ? launch.blocks_per_sm : std::max(1, room_for_blocks(launch, machine));
  const double blocks = static_cast<double>(x) * y * z;
  os << "{\"op\": \"" << launch.op << "\", \"kernel\": \"" << kernel_name(launch.kernel) << "\", \"grid\": [" << x
     << ", " << y << ", " << z << "], \"threads\": " << launch.threads << ", \"shared_bytes\": " << launch.shared_bytes
     << ", \"blocks_per_sm\": " << blocks_per_sm << ", \"registers_counted\": " << (measured ? "true" : "false")
     << ", \"waves\": " << blocks / (static_cast<double>(blocks_per_sm) * machine.sm_count);
  const TileShape& tile = launch.tile;
  if (tile.m > 0) {
    os << ", \"tile\": [" << tile.m << ", " << tile.n << ", " << tile.k << "], \"stages\": " << tile.stages
       << ", \"splits\": " << tile.splits;
  } else {
    os << ", \"tile\": null, \"stages\": null, \"splits\": null";
  }
  os << "}";
}

}  // namespace

LaunchPlan* current_plan() { return active; }
const PlannedMachine& machine_of(const LaunchPlan& plan) { return plan.machine; }
void add_launch(LaunchPlan& plan, const PlannedLaunch& launch) { plan.launches.push_back(launch); }

void begin_plan(const api::Machine* machine) {
  plan_of_thread.machine = {machine->sm_count, machine->shared_memory_limit, machine->capability};
  plan_of_thread.launches.clear();
  active = &plan_of_thread;
}

const char* end_plan() {
  active = nullptr;
  thread_local std::string text;
  std::ostringstream os;
  os << "[";
  for (const PlannedLaunch& launch : plan_of_thread.launches) {
    if (&launch != plan_of_thread.launches.data()) os << ", ";
    append(os, launch, plan_of_thread.machine);
  }
  os << "]";
  text = os.str();
  return text.c_str();
}

}  // namespace warpform
