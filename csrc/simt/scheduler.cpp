#include "simt/scheduler.h"

#include <algorithm>
#include <bit>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "simt/bulk.h"
#include "simt/global_memory.h"
#include "simt/mbarrier.h"
#include "simt/shared_memory.h"
#include "simt/warpgroup.h"
#include "simt/wgmma.h"

namespace warpform::simt {

Block block;
Running running;

namespace {

GridState grid_state;
const Kernel* running_kernel = nullptr;
Context launcher;
std::exception_ptr error;

uint64_t seed = 1;
uint64_t random_state = 1;
Device device_properties;
constexpr size_t kMostLaunched = 4096;  // that are kept
std::vector<Launched> launched;

// One meeting in this many ends with a look at another warp.
constexpr uint32_t kWarpPatience = 16;
// One change of threads in this many lets a bulk copy land.
constexpr uint32_t kCopyPatience = 64;

// A linear congruential generator; its upper 32 bits are what is random in it.
inline uint32_t next_random() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(random_state >> 32);
}

// A set bit of a non-empty mask: the first from bit `turn` % 32 on.
inline int bit_from(uint32_t mask, uint32_t turn) {
  return static_cast<int>(
      (static_cast<uint32_t>(std::countr_zero(std::rotr(mask, static_cast<int>(turn & 31)))) + turn) & 31);
}

inline void set_runnable(Warp& warp, uint32_t lanes) {
  warp.runnable |= lanes;
  if (warp.runnable != 0) block.warps_runnable |= 1u << warp_number(warp);
}

inline void unset_runnable(Warp& warp, uint32_t lanes) {
  warp.runnable &= ~lanes;
  if (warp.runnable == 0) block.warps_runnable &= ~(1u << warp_number(warp));
}

std::string lanes_text(int w, uint32_t lanes) {
  const int first = w * kLanes + std::countr_zero(lanes);
  const int last = w * kLanes + 31 - std::countl_zero(lanes);
  const int count = std::popcount(lanes);
  if (count == 1) return "thread " + std::to_string(first);
  return std::to_string(count) + " threads of " + std::to_string(first) + " to " + std::to_string(last);
}

// Everyone waits for someone else: says who waits where.
std::exception_ptr deadlock() {
  std::string text = "deadlock, no thread can go on:";
  int first = -1;
  for (int w = 0; w < block.warps; ++w) {
    const Warp& warp = block.warp[w];
    const uint32_t waiting = warp.at_barrier ? warp.alive : warp.arrived;
    if (waiting == 0) continue;
    if (first < 0) first = w * kLanes + std::countr_zero(waiting);
    text += " " + lanes_text(w, waiting) + " in " + name_of(warp.meeting);
    if (warp.meeting == Meeting::kNamedSync || warp.meeting == Meeting::kNamedArrive) {
      const Barrier& b = block.barrier[warp.barrier];
      text += " " + std::to_string(warp.barrier) + " (" + std::to_string(b.come) + " of " + std::to_string(b.threads) +
              " threads came)";
    }
    if (warp.at_warpgroup) text += waiting_warpgroup_text(w);
    text += " at " + text_of(warp.where) + ";";
  }
  // Threads may wait for an mbarrier one by one: those of a warp that wait in the same line are named together.
  for (int w = 0; w < block.warps; ++w) {
    uint32_t lanes = 0;
    for (int l = 0; l < kLanes; ++l) lanes |= static_cast<uint32_t>(block.fibre[w * kLanes + l].mbarrier >= 0) << l;
    while (lanes != 0) {
      const Fibre& one = block.fibre[w * kLanes + std::countr_zero(lanes)];
      uint32_t same = 0;
      for (int l = 0; l < kLanes; ++l) {
        const Fibre& other = block.fibre[w * kLanes + l];
        if ((lanes >> l & 1) && other.mbarrier == one.mbarrier && same_site(other.where, one.where)) same |= 1u << l;
      }
      if (first < 0) first = w * kLanes + std::countr_zero(same);
      text += " " + lanes_text(w, same) + " in mbarrier_wait" + mbarrier_text(one.mbarrier) + " at " +
              text_of(one.where) + ";";
      lanes &= ~same;
    }
  }
  text.pop_back();
  return std::make_exception_ptr(std::runtime_error(report_header(first) + text));
}

inline void enter(int thread) {
  running = {&block.warp[thread / kLanes], thread, thread % kLanes};
  threadIdx.x = static_cast<unsigned>(thread);
}

// The next thread to run, or -1 when the block has ended or cannot go on.
inline int pick() {
  // A copy in flight lands now and then, and at the latest when all threads wait.
  if (copies_in_flight() && draw(kCopyPatience) == kCopyPatience - 1) land_a_copy();
  while (block.warps_runnable == 0 && copies_in_flight()) land_a_copy();
  if (block.warps_runnable == 0) return -1;
  const uint32_t random = seed == 0 ? 0 : next_random();
  Warp* warp = running.warp;
  if (warp->runnable == 0 || (random >> 10) % kWarpPatience == 1) {
    warp = &block.warp[bit_from(block.warps_runnable, random >> 5)];
  }
  return warp_number(*warp) * kLanes + bit_from(warp->runnable, random);
}

void fibre_main();

inline void go_on_with(Context& from, int thread) {
  Fibre& fibre = block.fibre[thread];
  enter(thread);
  if (fibre.stack == nullptr) {
    fibre.stack = take_stack();
    make_context(fibre.context, fibre.stack, fibre_main);
  }
  switch_context(from, fibre.context);
}

// The running thread waits until it is runnable again.
void yield() {
  const int self = running.thread;
  const int next = pick();
  if (next == self) return;
  if (next < 0) {
    error = deadlock();
    switch_context(block.fibre[self].context, launcher);
  }
  go_on_with(block.fibre[self].context, next);
}

void open(Barrier& barrier) {
  for (int w = 0; w < block.warps; ++w) {
    if (!(barrier.waiting >> w & 1)) continue;
    block.warp[w].knows.join(barrier.knows);
    block.warp[w].at_barrier = false;
    set_runnable(block.warp[w], block.warp[w].alive);
  }
  barrier = Barrier{};
}

// Publishes through the barrier what the warp did until now.
void contribute(Warp& warp, Barrier& barrier) {
  const int w = warp_number(warp);
  ++block.now;
  const Time own = warp.knows.before[w];
  warp.knows.before[w] = block.now;
  barrier.knows.join(warp.knows);
  if (warp.meeting == Meeting::kNamedArrive) warp.knows.before[w] = own;
}

void open_block_barrier_if_complete() {
  Barrier& barrier = block.barrier[0];
  if (barrier.waiting == 0) return;
  for (int w = 0; w < block.warps; ++w) {
    if (block.warp[w].alive != 0 && !(barrier.waiting >> w & 1)) return;
  }
  barrier.knows.join(block.ended);
  open(barrier);
}

// All living lanes of the warp have come to a barrier.
void warp_came(Warp& warp) {
  const uint32_t lanes = warp.arrived;
  warp.arrived = 0;
  if (block.has_mbarriers) {
    const int first = warp_number(warp) * kLanes;
    for (int l = 0; l < kLanes; ++l) block.fibre[first + l].stored.clear();
  }
  if (warp.meeting == Meeting::kWarpSync) {
    warp.knows.before[warp_number(warp)] = ++block.now;
    set_runnable(warp, lanes);
    return;
  }
  Barrier& barrier = block.barrier[warp.meeting == Meeting::kBlockSync ? 0 : warp.barrier];
  contribute(warp, barrier);
  if (warp.meeting == Meeting::kNamedArrive) {
    set_runnable(warp, lanes);
  } else {
    barrier.waiting |= 1u << warp_number(warp);
    warp.at_barrier = true;
  }
  if (warp.meeting == Meeting::kBlockSync) {
    open_block_barrier_if_complete();
    return;
  }
  barrier.threads = warp.barrier_threads;
  barrier.come += kLanes;
  if (barrier.come == barrier.threads) open(barrier);
}

bool is_barrier(Meeting meeting) { return meeting <= Meeting::kWarpSync; }

[[noreturn]] void divergent(const Warp& warp, Meeting meeting, const Where& where) {
  fail(std::string("divergent ") + name_of(meeting) + ": " + lanes_text(warp_number(warp), warp.arrived) +
           " of the warp in " + name_of(warp.meeting) + " at " + text_of(warp.where) + ", this thread",
       where);
}

[[noreturn]] void lanes_missing(const Warp& warp, Meeting meeting, const Where& where) {
  fail(std::string("divergent ") + name_of(meeting) + ": all 32 lanes must take part, but " +
           lanes_text(warp_number(warp), ~warp.alive) + " ended or never existed;",
       where);
}

// The lane joins the warp's meeting; fails if the others are elsewhere.
inline uint32_t join(Warp& warp, Meeting meeting, const Where& where) {
  if (warp.arrived == 0) {
    warp.meeting = meeting;
    warp.where = where;
  } else if (warp.meeting != meeting || !same_site(warp.where, where)) {
    divergent(warp, meeting, where);
  }
  return warp.arrived |= 1u << this_lane();
}

void wait_at_barrier(Meeting meeting, const Where& where) {
  Warp& warp = this_warp();
  const uint32_t bit = 1u << this_lane();
  const uint32_t arrived = join(warp, meeting, where);
  unset_runnable(warp, bit);
  if (arrived == warp.alive) warp_came(warp);
  if (!(warp.runnable & bit)) yield();
}

// The running thread has ended: others may have waited for just that.
void thread_ended() {
  Warp& warp = this_warp();
  const int w = warp_number(warp);
  const uint32_t bit = 1u << this_lane();
  warp.alive &= ~bit;
  unset_runnable(warp, bit);
  --block.alive;
  if (products_in_flight(w)) report_products_in_flight(w);
  if (warp.arrived != 0) {
    if (!is_barrier(warp.meeting)) {
      // Reported for a thread that waits, in its line.
      enter(w * kLanes + std::countr_zero(warp.arrived));
      lanes_missing(warp, warp.meeting, warp.where);
    }
    if (warp.arrived == warp.alive) warp_came(warp);
  } else if (warp.alive == 0) {
    // A warp that has ended counts as come to every later block barrier, with all that it did.
    warp.knows.before[w] = ++block.now;
    block.ended.join(warp.knows);
    open_block_barrier_if_complete();
  }
}

// Runs threads one after another until one of them has to wait: a thread that never waits needs no stack of its own.
void fibre_main() {
  for (;;) {
    int next;
    try {
      running_kernel->call(running_kernel->params);
      thread_ended();
      next = pick();
      if (next < 0 && block.alive != 0) error = deadlock();
    } catch (...) {
      error = std::current_exception();
      next = -1;
    }
    // From a thread that failed the report may have moved on to another; the stack is still that of the fibre that ran.
    if (next >= 0 && block.fibre[next].stack == nullptr) {
      std::swap(block.fibre[next].stack, block.fibre[running.thread].stack);
      enter(next);
      continue;
    }
    static Context dead;
    if (next < 0) switch_context(dead, launcher);
    return_stack(block.fibre[running.thread].stack);
    block.fibre[running.thread].stack = nullptr;
    go_on_with(dead, next);
  }
}

void start_block(int threads) {
  block.threads = threads;
  block.started = block.now;
  block.has_mbarriers = false;
  block.warps = (threads + kLanes - 1) / kLanes;
  block.alive = threads;
  block.warps_runnable = 0;
  ++block.now;
  for (int w = 0; w < block.warps; ++w) {
    Warp& warp = block.warp[w];
    const int lanes = threads - w * kLanes;
    warp.alive = lanes >= kLanes ? 0xffffffffu : (1u << lanes) - 1;
    warp.runnable = 0;
    warp.arrived = 0;
    warp.at_barrier = false;
    warp.at_warpgroup = false;
    warp.votes[0] = warp.votes[1] = 0;
    for (Time& t : warp.knows.before) t = block.now;
    set_runnable(warp, warp.alive);
  }
  for (Barrier& barrier : block.barrier) barrier = Barrier{};
  block.ended = Knowledge{};
}

void run_block(int threads) {
  start_block(threads);
  clear_shared();
  clear_mbarriers();
  clear_copies();
  clear_warpgroups(threads);
  clear_products();
  error = nullptr;
  enter(0);
  const int first = pick();
  go_on_with(launcher, first);
  for (int t = 0; t < threads; ++t) {
    Fibre& fibre = block.fibre[t];
    fibre.copies.clear();
    fibre.proxy_fences.clear();
    fibre.stored.clear();
    fibre.fenced.clear();
    fibre.mbarrier = -1;
    if (fibre.stack != nullptr) {
      return_stack(fibre.stack);
      fibre.stack = nullptr;
    }
  }
  if (error) std::rethrow_exception(std::exchange(error, nullptr));
  check_copies_waited_for();
}

// From "... [with auto kKernel = warpform::{anonymous}::gather<uint4>; Params = ...]" the kernel.
std::string kernel_name(const Kernel& kernel) {
  std::string text = kernel.signature;
  const std::string key = "kKernel = ";
  size_t begin = text.find(key);
  if (begin == std::string::npos) return kernel.name;
  begin += key.size();
  size_t end = text.find("; ", begin);
  if (end == std::string::npos) end = text.size() - 1;
  text = text.substr(begin, end - begin);
  for (const char* noise : {"warpform::", "{anonymous}::", "(anonymous namespace)::", "&", "simt::"}) {
    const std::string word = noise;
    for (size_t at; (at = text.find(word)) != std::string::npos;) text.erase(at, word.size());
  }
  return text;
}

}  // namespace

const char* name_of(Meeting meeting) {
  switch (meeting) {
    case Meeting::kBlockSync: return "block_sync";
    case Meeting::kNamedSync: return "named_barrier_sync";
    case Meeting::kNamedArrive: return "named_barrier_arrive";
    case Meeting::kWarpSync: return "warp_sync";
    case Meeting::kShuffleXor: return "shuffle_xor";
    case Meeting::kShuffleUp: return "shuffle_up";
    case Meeting::kShuffleDown: return "shuffle_down";
    case Meeting::kShuffle: return "shuffle";
    case Meeting::kBallot: return "ballot";
    case Meeting::kLdmatrix: return "ldmatrix_x4";
    case Meeting::kLdmatrixTrans: return "ldmatrix_x4_trans";
    case Meeting::kMmaHalf: return "mma_m16n8k16<half_t>";
    case Meeting::kMmaBfloat16: return "mma_m16n8k16<bf16_t>";
    case Meeting::kMmaTf32: return "mma_m16n8k8_tf32";
    case Meeting::kStmatrix: return "stmatrix_x4";
    case Meeting::kStmatrixTrans: return "stmatrix_x4_trans";
    case Meeting::kElect: return "elect_one";
    case Meeting::kGiveRegisters: return "give_registers";
    case Meeting::kTakeRegisters: return "take_registers";
    case Meeting::kWgmmaFence: return "wgmma_fence";
    case Meeting::kWgmma: return "wgmma";
    case Meeting::kWgmmaCommit: return "wgmma_commit";
    case Meeting::kWgmmaWait: return "wgmma_wait";
  }
  return "?";
}

const GridState& grid() { return grid_state; }

bool meet(Meeting meeting, const Where& where) {
  Warp& warp = this_warp();
  if (__builtin_expect(warp.alive != 0xffffffffu, false)) lanes_missing(warp, meeting, where);
  if (join(warp, meeting, where) == 0xffffffffu) return true;
  unset_runnable(warp, 1u << this_lane());
  yield();
  return false;
}

void end_meeting(Warp& warp) {
  warp.parity ^= 1;
  warp.arrived = 0;
  set_runnable(warp, 0xffffffffu);
}

bool meet_warpgroup(const Where& where) {
  Warp& warp = this_warp();
  const int w = warp_number(warp), first = w / kWarpgroupWarps * kWarpgroupWarps;
  if (first + kWarpgroupWarps > block.warps) {
    fail(std::string(name_of(warp.meeting)) + ": all four warps of a warpgroup must take part, but the block has " +
             std::to_string(block.warps - first) + " of them",
         where);
  }
  warp.at_warpgroup = true;
  int come = 0;
  for (int i = 0; i < kWarpgroupWarps; ++i) {
    const Warp& other = block.warp[first + i];
    if (!other.at_warpgroup) continue;
    ++come;
    if (other.meeting != warp.meeting || !same_site(other.where, warp.where)) {
      fail(std::string("divergent ") + name_of(warp.meeting) + ": warp " + std::to_string(first + i) +
               " of the warpgroup is in " + name_of(other.meeting) + " at " + text_of(other.where) + ", this warp",
           where);
    }
  }
  if (come == kWarpgroupWarps) return true;
  unset_runnable(warp, 1u << this_lane());
  yield();
  return false;
}

void end_warpgroup_meeting(int warpgroup) {
  for (int i = 0; i < kWarpgroupWarps; ++i) {
    Warp& warp = block.warp[warpgroup * kWarpgroupWarps + i];
    warp.at_warpgroup = false;
    end_meeting(warp);
  }
}

void suspend() {
  unset_runnable(this_warp(), 1u << this_lane());
  yield();
}

void resume(int thread) { set_runnable(block.warp[thread / kLanes], 1u << thread % kLanes); }

void speak_for(int thread) { enter(thread); }

void block_barrier(const Where& where) { wait_at_barrier(Meeting::kBlockSync, where); }
void warp_barrier(const Where& where) { wait_at_barrier(Meeting::kWarpSync, where); }

void named_barrier(int id, int threads, bool wait, const Where& where) {
  const Meeting meeting = wait ? Meeting::kNamedSync : Meeting::kNamedArrive;
  const auto name = [&] { return std::string(name_of(meeting)); };
  if (id < 1 || id >= kNamedBarriers) fail(name() + ": the id must be 1 to 15, got " + std::to_string(id), where);
  if (threads <= 0 || threads % kLanes != 0 || threads > block.warps * kLanes) {
    fail(name() + ": the thread count must be a multiple of 32 up to the block's, got " + std::to_string(threads),
         where);
  }
  const Barrier& barrier = block.barrier[id];
  if (barrier.come != 0 && barrier.threads != threads) {
    fail(name() + " " + std::to_string(id) + ": others came expecting " + std::to_string(barrier.threads) +
             " threads, this one " + std::to_string(threads),
         where);
  }
  Warp& warp = this_warp();
  if (warp.arrived != 0 && warp.meeting == meeting && (warp.barrier != id || warp.barrier_threads != threads)) {
    fail("divergent " + name() + ": lanes of the warp name different barriers;", where);
  }
  warp.barrier = id;
  warp.barrier_threads = threads;
  wait_at_barrier(meeting, where);
}

void run_grid(const Kernel& kernel, dim3 grid_size, int threads, int shared_bytes) {
  constexpr uint64_t kMaxX = 0x7fffffff, kMaxY = 65535;
  grid_state.kernel = kernel_name(kernel);
  const auto refuse = [&](const std::string& text) {
    throw std::runtime_error(grid_state.op + ": kernel " + grid_state.kernel + ": " + text);
  };
  if (threads < 1 || threads > kMaxThreads) refuse("a block of " + std::to_string(threads) + " threads");
  if (shared_bytes < 0 || shared_bytes > device_properties.shared_memory_limit) {
    refuse(std::to_string(shared_bytes) + " bytes of shared memory a block; the device has " +
           std::to_string(device_properties.shared_memory_limit));
  }
  if (grid_size.x > kMaxX || grid_size.y > kMaxY || grid_size.z > kMaxY) refuse("the grid is too large");

  if (launched.size() < kMostLaunched) {
    launched.push_back({grid_state.op, grid_state.kernel, grid_size, threads, shared_bytes});
  }
  settle_extents();
  size_shared(static_cast<size_t>(shared_bytes));
  running_kernel = &kernel;
  gridDim = grid_size;
  blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  random_state = (seed + 1) * 0x9e3779b97f4a7c15u;

  // Blocks in the order first, first + step, ... modulo their number: any step without a common divisor visits each
  // once.
  const uint64_t blocks = uint64_t{grid_size.x} * grid_size.y * grid_size.z;
  uint64_t at = 0, step = 1;
  if (seed != 0) {
    at = (uint64_t{next_random()} << 32 | next_random()) % blocks;
    step = (uint64_t{next_random()} << 32 | next_random()) % blocks;
    while (std::gcd(step, blocks) != 1) step = (step + 1) % blocks;
  }
  for (uint64_t i = 0; i < blocks; ++i, at = (at + step) % blocks) {
    blockIdx.x = static_cast<unsigned>(at % grid_size.x);
    blockIdx.y = static_cast<unsigned>(at / grid_size.x % grid_size.y);
    blockIdx.z = static_cast<unsigned>(at / grid_size.x / grid_size.y);
    run_block(threads);
  }
}

void configure(uint64_t new_seed, const Device& device) {
  seed = new_seed;
  device_properties = device;
  launched.clear();
}

void claim(const DeviceFacts& facts, bool tensor_maps) {
  device_properties.facts = facts;
  device_properties.tensor_maps = tensor_maps;
}

const std::vector<Launched>& launches() { return launched; }

const Device& device() { return device_properties; }

uint32_t fixed_draw(uint32_t n, uint32_t salt) {
  if (seed == 0) return 0;
  const uint64_t mixed = (seed + 1) * 0x9e3779b97f4a7c15u ^ (uint64_t{salt} + 1) * 0xd6e8feb86659fd93u;
  return static_cast<uint32_t>((mixed ^ mixed >> 32) * 0x9e3779b97f4a7c15u >> 40) % n;
}

uint32_t draw(uint32_t n) { return seed == 0 ? 0 : next_random() % n; }

void begin_op(const char* op) { grid_state.op = op; }

}  // namespace warpform::simt
