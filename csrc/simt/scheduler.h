// The machine: a grid's blocks one after another, in each block one fibre per CUDA thread, one of them running at a
// time.
//
// A seed draws the fibre that goes on when one has to wait, so that tests see many orders: the lanes of a warp in
// any order, mostly one warp for a while, now and then another. Seed 0 is the plain order. Barriers and warp
// collectives are `meet`: all lanes of the warp come to the same line of the kernel, then the warp as a whole goes on
// or waits for others.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/common/device_facts.h"
#include "simt/builtins.h"
#include "simt/copies.h"
#include "simt/fibre.h"
#include "simt/report.h"

namespace warpform::simt {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 32;
constexpr int kMaxThreads = kLanes * kMaxWarps;
constexpr int kWarpgroupWarps = 4;
constexpr int kMaxWarpgroups = kMaxWarps / kWarpgroupWarps;
constexpr int kNamedBarriers = 16;  // 0 is the block's
constexpr int kMaxMbarriers = 64;

// Collectives of the lanes of a warp. The first three are barriers: exited lanes count as come. The others need all 32.
enum class Meeting : uint8_t {
  kBlockSync,
  kNamedSync,
  kNamedArrive,
  kWarpSync,
  kShuffleXor,
  kShuffleUp,
  kShuffleDown,
  kShuffle,
  kBallot,
  kLdmatrix,
  kLdmatrixTrans,
  kMmaHalf,
  kMmaBfloat16,
  kMmaTf32,
  kStmatrix,
  kStmatrixTrans,
  kElect,
  kGiveRegisters,
  kTakeRegisters,
  kWgmmaFence,
  kWgmma,
  kWgmmaCommit,
  kWgmmaWait,
};
const char* name_of(Meeting meeting);

// What touches shared memory in an order of its own: the warps; the tensor cores of each warpgroup, whose products are
// asynchronous; and for each mbarrier the bulk copies that complete on it.
constexpr int kFirstTensorCore = kMaxWarps;
constexpr int kFirstMbarrier = kFirstTensorCore + kMaxWarpgroups;
constexpr int kAgents = kFirstMbarrier + kMaxMbarriers;

// Logical time: it steps at every synchronisation. A warp knows a time of each other agent: all that the other did
// before that time is ordered before what the warp does now.
using Time = uint32_t;
struct Knowledge {
  Time before[kAgents];
  void join(const Knowledge& other) {
    for (int a = 0; a < kAgents; ++a) before[a] = before[a] > other.before[a] ? before[a] : other.before[a];
  }
  // What both know.
  void intersect(const Knowledge& other) {
    for (int a = 0; a < kAgents; ++a) before[a] = before[a] < other.before[a] ? before[a] : other.before[a];
  }
};

// An array of registers as it was at a thread's last wgmma_fence.
struct FencedRegisters {
  const void* data;
  size_t bytes;
  uint64_t hash;
};

struct Fibre {
  Context context;
  void* stack = nullptr;  // null before it starts and after it ends
  Copies copies;
  std::vector<uint32_t> stored;         // chunks of shared memory, since its warp last came to a barrier
  std::vector<Time> proxy_fences;       // the times of its fence_proxy_async, increasing
  std::vector<FencedRegisters> fenced;  // by its wgmma_fence
  int mbarrier = -1;                    // that it waits for
  Where where;                          // of that wait
};

struct Warp {
  uint32_t alive = 0;     // lanes whose thread has not ended
  uint32_t runnable = 0;  // lanes that may go on, the running lane among them
  uint32_t arrived = 0;   // lanes that wait in the present meeting
  Meeting meeting{};
  int barrier = 0;  // id and thread count of the barrier, where the meeting is at a named one
  int barrier_threads = 0;
  bool at_barrier = false;    // the whole warp waits at a barrier
  bool at_warpgroup = false;  // the whole warp waits for the others of its warpgroup, or for registers
  int parity = 0;             // the half of `values` that the next meeting uses: a fast lane may be one meeting ahead
  Where where;
  Knowledge knows{};
  uint64_t values[2][kLanes];  // the values that lanes hand each other
  uint32_t votes[2];
  void* operands[kLanes];
};

struct Barrier {
  int threads = 0;  // threads that it waits for, 0 while none has come
  int come = 0;
  uint32_t waiting = 0;  // warps
  Knowledge knows{};
};

struct GridState {
  std::string op;
  std::string kernel;
};
const GridState& grid();

struct Block {
  int threads = 0;
  int warps = 0;
  int alive = 0;  // threads
  uint32_t warps_runnable = 0;
  Time now = 0;
  Time started = 0;  // the time at which it began
  bool has_mbarriers = false;
  Warp warp[kMaxWarps];
  Barrier barrier[kNamedBarriers];
  Knowledge ended{};  // the accesses of warps that have ended
  Fibre fibre[kMaxThreads];
};
extern Block block;

// The running thread.
struct Running {
  Warp* warp = nullptr;
  int thread = 0;
  int lane = 0;
};
extern Running running;
inline Warp& this_warp() { return *running.warp; }
inline int this_thread() { return running.thread; }
inline int this_lane() { return running.lane; }
inline int warp_number(const Warp& warp) { return static_cast<int>(&warp - block.warp); }

// The running lane comes to a meeting. True in the lane that comes last, which then does the work of all and calls
// end_meeting(); false in the others, once it has. Not for barriers.
bool meet(Meeting meeting, const Where& where);
void end_meeting(Warp& warp);

void block_barrier(const Where& where);
void named_barrier(int id, int threads, bool wait, const Where& where);
void warp_barrier(const Where& where);

struct Kernel {
  const char* name;       // given to launch()
  const char* signature;  // __PRETTY_FUNCTION__ of launch<kKernel>
  void (*call)(const void* params);
  const void* params;
};
// The op whose launches follow, for reports.
void begin_op(const char* op);
void run_grid(const Kernel& kernel, dim3 grid, int threads, int shared_bytes);

constexpr int kRuntimeVersion = 13000;  // of CUDA, as cuda_runtime_version() has it

// The first launches since configure(), as many as are kept.
struct Launched {
  std::string op;
  std::string kernel;
  dim3 grid;
  int threads;
  int shared_bytes;
};
const std::vector<Launched>& launches();

// The device's properties as kernels and launches see them.
struct Device {
  int sm_count = 4;
  int shared_memory_limit = 227 * 1024;
  DeviceFacts facts = {.driver = kRuntimeVersion, .capability = 90, .code = DeviceCode::kFound};
  bool tensor_maps = true;  // the driver describes tensors
};
void configure(uint64_t seed, const Device& device);
void claim(const DeviceFacts& facts, bool tensor_maps);
const Device& device();

// A meeting of the four warps of a warpgroup: as meet(), which the caller has been through, for the warps. True in the
// lane that comes last of all, which does the work and calls end_warpgroup_meeting(); false in the others, once it has.
bool meet_warpgroup(const Where& where);
void end_warpgroup_meeting(int warpgroup);
inline int this_warpgroup() { return warp_number(this_warp()) / kWarpgroupWarps; }

// The running thread waits until resume() is called for it.
void suspend();
void resume(int thread);

// Reports that follow are about this thread.
void speak_for(int thread);

// A random number below n, from the seed; 0 with seed 0.
uint32_t draw(uint32_t n);
// A number below n that the seed, the block and `salt` decide.
uint32_t fixed_draw(uint32_t n, uint32_t salt);

}  // namespace warpform::simt
