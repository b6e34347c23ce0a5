// Plans: what a call would launch, without launching it. While a thread has a plan, launch() adds to it and returns.
#pragma once

namespace warpform {

// The part of a product that a block of threads makes at a time: rows, columns, and depth of a step; how many steps'
// operands shared memory holds at once; and how many blocks share one result. 0 where a kernel has no such thing.
struct TileShape {
  int m = 0;
  int n = 0;
  int k = 0;
  int stages = 0;
  int splits = 0;
};

// The machine that a plan is for.
struct PlannedMachine {
  int sm_count;
  int shared_memory_limit;
  int capability;  // 10 * major + minor
};

struct PlannedLaunch {
  const char* op;
  const char* kernel;  // __PRETTY_FUNCTION__ of launch(), which names the kernel and its template arguments
  unsigned grid[3];
  int threads;
  int shared_bytes;
  int blocks_per_sm;  // as the GPU says; 0 where there is none
  TileShape tile;
};

class LaunchPlan;

// The plan of this thread, or null.
LaunchPlan* current_plan();
const PlannedMachine& machine_of(const LaunchPlan& plan);
void add_launch(LaunchPlan& plan, const PlannedLaunch& launch);

}  // namespace warpform
