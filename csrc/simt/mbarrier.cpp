#include "simt/mbarrier.h"

#include <vector>

#include "simt/shared_memory.h"

namespace warpform::simt {
namespace {

constexpr int kMostArrivals = (1 << 20) - 1;

struct Mbarrier {
  uint32_t address;
  int arrivals;         // of a phase
  int pending;          // arrivals that the phase lacks
  int64_t bytes = 0;    // that were announced and have not landed
  uint32_t phases = 0;  // that have ended
  int initialiser;      // thread
  Time initialised;
  Time fenced = 0;        // by the initialiser's fence; 0: not yet
  Knowledge arriving{};   // of those who have arrived
  Knowledge published{};  // of those who had when the last phase ended
  std::vector<int> waiting{};
  int copier = -1;          // the thread of the newest copy that completed here and that no thread has waited for
  uint32_t copy_phase = 0;  // in which it did
  Where copy_where{};
};
std::vector<Mbarrier> barriers;

std::string place(const Mbarrier& b) { return "the mbarrier at address " + std::to_string(b.address - kSharedBase); }

int find(uint32_t address, const char* verb, const Where& where) {
  for (size_t i = 0; i < barriers.size(); ++i) {
    if (barriers[i].address == address) return static_cast<int>(i);
  }
  fail(std::string(verb) + " on address " + std::to_string(static_cast<int64_t>(address) - kSharedBase) +
           ", where no mbarrier was initialised",
       where);
}

// The barrier at this address, if its initialisation is ordered before what the running thread does.
Mbarrier& usable(uint32_t address, const char* verb, const Where& where) {
  Mbarrier& b = barriers[static_cast<size_t>(find(address, verb, where))];
  const int w = b.initialiser / kLanes;
  if (this_thread() != b.initialiser && b.initialised >= this_warp().knows.before[w]) {
    fail(std::string(verb) + " on " + place(b) + " is not ordered by a barrier after its initialisation by thread " +
             std::to_string(b.initialiser) + ";",
         where);
  }
  return b;
}

// Ends the phase if all have come.
void settle(Mbarrier& b, const Where& where) {
  if (b.pending != 0 || b.bytes > 0) return;
  if (b.bytes < 0) {
    fail("more bytes have landed on " + place(b) + " than the phase announced: " + std::to_string(-b.bytes) +
             " too many",
         where);
  }
  ++b.phases;
  b.pending = b.arrivals;
  b.published.join(b.arriving);
  for (const int thread : b.waiting) resume(thread);
  b.waiting.clear();
}

}  // namespace

void clear_mbarriers() { barriers.clear(); }

void init_mbarrier(uint32_t address, int arrivals, const Where& where) {
  if (arrivals < 1 || arrivals > kMostArrivals) {
    fail("mbarrier_init: the arrivals must be 1 to " + std::to_string(kMostArrivals) + ", got " +
             std::to_string(arrivals),
         where);
  }
  if (barriers.size() == kMaxMbarriers) {
    fail("mbarrier_init: the emulator has " + std::to_string(kMaxMbarriers) + " barriers a block", where);
  }
  claim_mbarrier(address, where);  // fails where one lies
  barriers.push_back({.address = address,
                      .arrivals = arrivals,
                      .pending = arrivals,
                      .initialiser = this_thread(),
                      .initialised = block.now});
  block.has_mbarriers = true;
}

void fence_mbarrier_inits() {
  for (Mbarrier& b : barriers) {
    if (b.initialiser == this_thread() && b.fenced == 0) b.fenced = ++block.now;
  }
}

void arrive_at_mbarrier(uint32_t address, int expected_bytes, const Where& where) {
  Mbarrier& b = usable(address, "mbarrier_arrive", where);
  if (b.pending == 0) {
    fail("more arrivals at " + place(b) + " than the " + std::to_string(b.arrivals) + " of its phase;", where);
  }
  if (expected_bytes < 0 || expected_bytes > kMostArrivals) {
    fail("mbarrier_arrive_expect: the bytes must be 0 to " + std::to_string(kMostArrivals) + ", got " +
             std::to_string(expected_bytes),
         where);
  }
  // All that the warp did until now, but for what its other lanes stored since its last barrier: that has a later time
  // from here on, as what they do next.
  Knowledge mine = this_warp().knows;
  mine.before[warp_number(this_warp())] = ++block.now;
  b.arriving.join(mine);
  postpone_stores_of_other_lanes();
  b.bytes += expected_bytes;
  --b.pending;
  settle(b, where);
}

void wait_for_mbarrier(uint32_t address, uint32_t parity, const Where& where) {
  const int number = find(address, "mbarrier_wait", where);
  usable(address, "mbarrier_wait", where);
  if (parity > 1) fail("mbarrier_wait: the parity must be 0 or 1, got " + std::to_string(parity), where);
  const auto barrier = [&]() -> Mbarrier& { return barriers[static_cast<size_t>(number)]; };
  const uint32_t phase = barrier().phases;
  if ((phase & 1) == parity) {
    Fibre& fibre = block.fibre[this_thread()];
    fibre.mbarrier = number;
    fibre.where = where;
    barrier().waiting.push_back(this_thread());
    suspend();
    fibre.mbarrier = -1;
    if (barrier().phases != phase + 1) {
      fail(place(barrier()) + " went " + std::to_string(barrier().phases - phase) +
               " phases ahead while this thread waited for one: on a GPU it may wait for ever;",
           where);
    }
  }
  this_warp().knows.join(barrier().published);
  if (barrier().phases > barrier().copy_phase) barrier().copier = -1;
}

int mbarrier_of_copy(uint32_t address, const Where& where) {
  const Mbarrier& b = usable(address, "a bulk copy", where);
  const bool ordered = this_thread() == b.initialiser || b.fenced < this_warp().knows.before[b.initialiser / kLanes];
  if (b.fenced == 0 || !ordered) {
    fail("a bulk copy completes on " + place(b) +
             ", and its initialisation has no fence_mbarrier_init before the barrier that orders them;",
         where);
  }
  return static_cast<int>(&b - barriers.data());
}

void complete_on_mbarrier(int number, int bytes, const Where& where) {
  Mbarrier& b = barriers[static_cast<size_t>(number)];
  Time& known = b.arriving.before[kFirstMbarrier + number];
  known = ++block.now;
  b.copier = this_thread();
  b.copy_phase = b.phases;
  b.copy_where = where;
  b.bytes -= bytes;
  settle(b, where);
}

void check_copies_waited_for() {
  for (const Mbarrier& b : barriers) {
    if (b.copier < 0) continue;
    speak_for(b.copier);
    fail("the block ended and no thread had waited for a bulk copy, issued", b.copy_where);
  }
}

std::string mbarrier_text(int number) {
  const Mbarrier& b = barriers[static_cast<size_t>(number)];
  std::string text = " at address " + std::to_string(b.address - kSharedBase) + " (phase " + std::to_string(b.phases) +
                     ": " + std::to_string(b.arrivals - b.pending) + " of " + std::to_string(b.arrivals) +
                     " arrivals came";
  if (b.bytes > 0) text += ", " + std::to_string(b.bytes) + " bytes did not land";
  return text + ")";
}

}  // namespace warpform::simt
