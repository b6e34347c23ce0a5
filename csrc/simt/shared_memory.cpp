#include "simt/shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "simt/scheduler.h"

namespace warpform::simt {
namespace {

constexpr uint32_t kChunk = 16;

// Who touched a granule, when (in logical time) and in which line. Time 0 is never.
struct Touch {
  Where where;
  Time time = 0;
  uint8_t warp = 0;
  uint8_t lane = 0;
  bool several = false;  // other lanes of the warp as well, at the same time
  bool copy = false;     // written by an asynchronous copy
};

// The history of a granule: the last write, and the reads since then, one of each warp. A read that is ordered
// before a later one need not be kept: what is ordered after the later is ordered after both. Where more warps read at
// the same time than there is room for, some are forgotten; a race may then be missed but none is made up.
struct alignas(64) Granule {
  static constexpr int kReaders = 3;
  Touch write;
  Touch read[kReaders];
};

// Chunks of 16 bytes have one granule as long as accesses are of 16 bytes, then four, then eight.
enum Level : uint8_t { kWhole, kWords, kHalves };
constexpr int kGranules[] = {1, 4, 8};

size_t arena_bytes = 0;
size_t capacity_chunks = 0;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Array = std::unique_ptr<T[], Free>;

Array<unsigned char> arena;
Array<uint16_t> written;   // a bit a byte
Array<uint8_t> level;      // of each chunk
Array<uint8_t> in_flight;  // kCopy: an asynchronous copy into this chunk is in flight; and halves that hold an mbarrier
constexpr uint8_t kCopy = 1, kMbarrierLow = 2, kMbarrierHigh = 4;
Array<Granule> whole;  // of each chunk
Array<Granule> parts;  // eight a chunk

template <class T>
void allocate(Array<T>& array, size_t n) {
  const size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
  array.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
  if (array == nullptr) throw std::bad_alloc();
  std::memset(static_cast<void*>(array.get()), 0, bytes);
}

bool ordered(const Touch& t, int warp, int lane) {
  return t.time < this_warp().knows.before[t.warp] || (t.warp == warp && t.lane == lane && !t.several);
}

std::string agent_text(const Touch& t) {
  if (t.warp >= kFirstMbarrier) return " by TMA";
  if (t.warp >= kFirstTensorCore) return " by wgmma of warpgroup " + std::to_string(t.warp - kFirstTensorCore);
  return " by " + thread_text(t.warp, t.lane);
}

[[noreturn]] void race(uint32_t address, const char* now, const char* then, const Touch& earlier, const Where& where) {
  fail(std::string("shared-memory race: ") + now + " of address " + std::to_string(address - kSharedBase) +
           " is not ordered by a barrier after the " + (earlier.copy ? "asynchronous copy" : then) +
           agent_text(earlier) + " at " + text_of(earlier.where) + ";",
       where);
}

[[noreturn]] void lacks_proxy_fence(uint32_t address, const char* now, const Touch& earlier, const Where& where) {
  fail(std::string(now) + " of address " + std::to_string(address - kSharedBase) + " after the write by " +
           thread_text(earlier.warp, earlier.lane) + " at " + text_of(earlier.where) +
           ", which has no fence_proxy_async between it and the barrier that orders them;",
       where);
}

// True if bulk copies and wgmma see what a thread wrote: it was fenced before the barrier through which they know of it.
bool crosses_proxy(const Touch& write, const Knowledge& knows) {
  if (write.time <= block.started || write.warp >= kMaxWarps) return true;
  const int thread = write.warp * kLanes + write.lane;
  const auto& fences = block.fibre[thread].proxy_fences;
  const auto fence = std::upper_bound(fences.begin(), fences.end(), write.time);
  return fence != fences.end() && (*fence < knows.before[write.warp] || thread == this_thread());
}

// Calls f(granule, its address) for all granules of a chunk.
template <class F>
void for_each_granule(uint32_t chunk, F&& f) {
  if (level[chunk] == kWhole) {
    f(whole[chunk], kSharedBase + chunk * kChunk);
    return;
  }
  const int count = kGranules[level[chunk]];
  for (int i = 0; i < count; ++i) {
    f(parts[size_t{chunk} * 8 + static_cast<size_t>(i)],
      kSharedBase + chunk * kChunk + static_cast<uint32_t>(i) * kChunk / static_cast<uint32_t>(count));
  }
}

inline Touch touch_now(int warp, int lane, const Where& where) {
  return {where, block.now, static_cast<uint8_t>(warp), static_cast<uint8_t>(lane), false, false};
}

inline void note_read(Granule& g, uint32_t address, int warp, int lane, const Where& where) {
  // The warp's last access to it, at this same time: nothing to learn.
  if (g.read[0].time == block.now && g.read[0].warp == warp && (g.read[0].several || g.read[0].lane == lane)) return;
  if (__builtin_expect(!ordered(g.write, warp, lane), false)) race(address, "this read", "write", g.write, where);
  Touch* slot = nullptr;
  for (Touch& r : g.read) {
    if (r.warp == warp && r.time != 0) {
      if (r.time >= this_warp().knows.before[warp]) {
        r.several |= r.lane != lane;
        r.lane = static_cast<uint8_t>(lane);
        r.time = block.now;
        r.where = where;
        return;
      }
      slot = &r;
      break;
    }
    if (r.time < this_warp().knows.before[r.warp]) slot = &r;
  }
  // No room: the newest read takes the place of one drawn at random.
  if (slot == nullptr) slot = &g.read[draw(Granule::kReaders)];
  *slot = touch_now(warp, lane, where);
}

inline void note_write(Granule& g, uint32_t address, int warp, int lane, const Where& where) {
  if (__builtin_expect(!ordered(g.write, warp, lane), false)) race(address, "this write", "write", g.write, where);
  for (Touch& r : g.read) {
    if (r.time == 0) continue;
    if (__builtin_expect(!ordered(r, warp, lane), false)) race(address, "this write", "read", r, where);
    r.time = 0;
  }
  g.write = touch_now(warp, lane, where);
}

inline void remember_store(uint32_t chunk, int thread) {
  if (block.has_mbarriers) block.fibre[thread].stored.push_back(chunk);
}

// Splits a chunk's granule so that no two narrow accesses share one.
void refine(uint32_t chunk, Level to) {
  Granule* g = &parts[size_t{chunk} * 8];
  if (level[chunk] == kWhole) {
    for (int i = 0; i < kGranules[to]; ++i) g[i] = whole[chunk];
  } else {
    for (int i = 8; i-- > 0;) g[i] = g[i / 2];
  }
  level[chunk] = to;
}

template <int kBytes, void (*kNote)(Granule&, uint32_t, int, int, const Where&)>
inline void note(uint32_t address, uint32_t offset, int warp, int lane, const Where& where) {
  constexpr Level kNeeded = kBytes == 16 ? kWhole : kBytes >= 4 ? kWords : kHalves;
  const uint32_t chunk = offset / kChunk;
  if (level[chunk] < kNeeded) refine(chunk, kNeeded);
  if (level[chunk] == kWhole) {
    kNote(whole[chunk], address, warp, lane, where);
    return;
  }
  const uint32_t size = level[chunk] == kWords ? 4 : 2;
  Granule* g = &parts[size_t{chunk} * 8 + offset % kChunk / size];
  for (uint32_t i = 0; i * size < kBytes; ++i) kNote(g[i], address + i * size, warp, lane, where);
}

// A write of a whole chunk: whatever its parts remembered is behind it.
inline void note_whole_write(uint32_t address, uint32_t offset, const Where& where, int lane = this_lane()) {
  const uint32_t chunk = offset / kChunk;
  note<16, note_write>(address, offset, warp_number(this_warp()), lane, where);
  if (level[chunk] == kWhole) return;
  level[chunk] = kWhole;
  whole[chunk].write = touch_now(warp_number(this_warp()), lane, where);
  for (Touch& r : whole[chunk].read) r.time = 0;
}

// The address as an offset into the arena, if the access is allowed.
template <int kBytes>
inline uint32_t locate(uint32_t address, const char* verb, const Where& where) {
  const uint32_t offset = address - kSharedBase;
  if (__builtin_expect(address % kBytes != 0, false)) {
    fail(std::string("misaligned shared ") + verb + " of " + std::to_string(kBytes) + " bytes at address " +
             std::to_string(static_cast<int64_t>(address) - kSharedBase),
         where);
  }
  if (__builtin_expect(address < kSharedBase || offset + kBytes > arena_bytes, false)) {
    fail(std::string("out-of-bounds shared ") + verb + " of " + std::to_string(kBytes) + " bytes at address " +
             std::to_string(static_cast<int64_t>(address) - kSharedBase) + " of " + std::to_string(arena_bytes) +
             " bytes",
         where);
  }
  return offset;
}

// Fails where a copy is in flight or an mbarrier lies.
template <int kBytes>
void check_free(uint32_t offset, const char* verb, const Where& where) {
  const uint8_t state = in_flight[offset / kChunk];
  if (state & kCopy) {
    fail(std::string("shared-memory race: ") + verb + " to address " + std::to_string(offset) +
             " while an asynchronous copy into it is under way",
         where);
  }
  const uint8_t halves = kBytes == 16          ? kMbarrierLow | kMbarrierHigh
                         : offset % kChunk < 8 ? kMbarrierLow
                                               : kMbarrierHigh;
  if (state & halves) {
    fail(std::string(verb) + " to address " + std::to_string(offset) + ", where an mbarrier lies", where);
  }
}

template <int kBytes>
inline void check_written(uint32_t offset, const Where& where) {
  constexpr uint32_t kMask = (1u << kBytes) - 1;
  const uint32_t mask = kMask << (offset % kChunk);
  if (__builtin_expect((written[offset / kChunk] & mask) != mask, false)) {
    fail(
        (in_flight[offset / kChunk] & kCopy ? "shared memory read before its asynchronous copy was waited for, address "
                                            : "shared memory read that was never written, address ") +
            std::to_string(offset),
        where);
  }
}

}  // namespace

void size_shared(size_t bytes) {
  arena_bytes = bytes;
  const size_t chunks = (bytes + kChunk - 1) / kChunk;
  if (chunks > capacity_chunks) {
    capacity_chunks = 0;
    allocate(arena, chunks * kChunk);
    allocate(written, chunks);
    allocate(level, chunks);
    allocate(in_flight, chunks);
    allocate(whole, chunks);
    allocate(parts, chunks * 8);
    capacity_chunks = chunks;
  }
}

void clear_shared() {
  // All ones is NaN in every floating-point type and -1 in every integer one. Old granules need no clearing: a block
  // begins with knowledge of all that came before.
  const size_t chunks = (arena_bytes + kChunk - 1) / kChunk;
  if (chunks == 0) return;
  std::memset(arena.get(), 0xff, chunks * kChunk);
  std::memset(written.get(), 0, chunks * sizeof(uint16_t));
  std::memset(level.get(), kWhole, chunks);
  std::memset(in_flight.get(), 0, chunks);
}

template <int kBytes>
void load_shared_bytes(uint32_t address, void* to, const Where& where) {
  const uint32_t offset = locate<kBytes>(address, "load", where);
  check_written<kBytes>(offset, where);
  note<kBytes, note_read>(address, offset, warp_number(this_warp()), this_lane(), where);
  std::memcpy(to, &arena[offset], kBytes);
}

template <int kBytes>
void store_shared_bytes(uint32_t address, const void* from, const Where& where) {
  const uint32_t offset = locate<kBytes>(address, "store", where);
  const uint32_t chunk = offset / kChunk;
  if (__builtin_expect(in_flight[chunk] != 0, false)) check_free<kBytes>(offset, "store", where);
  if constexpr (kBytes == 16) {
    note_whole_write(address, offset, where);
  } else {
    note<kBytes, note_write>(address, offset, warp_number(this_warp()), this_lane(), where);
  }
  written[chunk] = static_cast<uint16_t>(written[chunk] | (((1u << kBytes) - 1) << (offset % kChunk)));
  std::memcpy(&arena[offset], from, kBytes);
  remember_store(chunk, this_thread());
}

template void load_shared_bytes<2>(uint32_t, void*, const Where&);
template void load_shared_bytes<4>(uint32_t, void*, const Where&);
template void load_shared_bytes<8>(uint32_t, void*, const Where&);
template void load_shared_bytes<16>(uint32_t, void*, const Where&);
template void store_shared_bytes<2>(uint32_t, const void*, const Where&);
template void store_shared_bytes<4>(uint32_t, const void*, const Where&);
template void store_shared_bytes<8>(uint32_t, const void*, const Where&);
template void store_shared_bytes<16>(uint32_t, const void*, const Where&);

const void* shared_row(uint32_t address, int lane, const Where& where) {
  const uint32_t offset = locate<16>(address, "ldmatrix row", where);
  check_written<16>(offset, where);
  note<16, note_read>(address, offset, warp_number(this_warp()), lane, where);
  return &arena[offset];
}

void begin_shared_copy(uint32_t address, const Where& where) {
  const uint32_t offset = locate<16>(address, "asynchronous copy", where);
  const uint32_t chunk = offset / kChunk;
  check_free<kChunk>(offset, "a second asynchronous copy", where);
  note_whole_write(address, offset, where);
  whole[chunk].write.copy = true;
  in_flight[chunk] = kCopy;
  written[chunk] = 0;
  std::memset(&arena[offset], 0xff, kChunk);
}

void end_shared_copy(uint32_t address, const void* from, const Where& where) {
  const uint32_t offset = address - kSharedBase;
  const uint32_t chunk = offset / kChunk;
  // Others see the data after a barrier that follows this moment, the wait.
  whole[chunk].write = touch_now(warp_number(this_warp()), this_lane(), where);
  whole[chunk].write.copy = true;
  remember_store(chunk, this_thread());
  in_flight[chunk] = 0;
  written[chunk] = 0xffff;
  if (from != nullptr) {
    std::memcpy(&arena[offset], from, kChunk);
  } else {
    std::memset(&arena[offset], 0, kChunk);
  }
}

void store_shared_row(uint32_t address, int lane, const void* from, const Where& where) {
  const uint32_t offset = locate<16>(address, "stmatrix row", where);
  const uint32_t chunk = offset / kChunk;
  if (in_flight[chunk] != 0) check_free<kChunk>(offset, "stmatrix row", where);
  note_whole_write(address, offset, where, lane);
  written[chunk] = 0xffff;
  std::memcpy(&arena[offset], from, kChunk);
  remember_store(chunk, warp_number(this_warp()) * kLanes + lane);
}

void begin_bulk_copy_to(uint32_t address, const Where& where) {
  const uint32_t offset = locate<16>(address, "bulk copy", where);
  check_free<kChunk>(offset, "a bulk copy", where);
  for_each_granule(offset / kChunk, [&](const Granule& g, uint32_t at) {
    const bool known = ordered(g.write, warp_number(this_warp()), this_lane());
    if (known && !crosses_proxy(g.write, this_warp().knows)) lacks_proxy_fence(at, "a bulk copy", g.write, where);
  });
  begin_shared_copy(address, where);
}

void end_bulk_copy(uint32_t address, const void* from, int agent, Time now, const Where& where) {
  const uint32_t chunk = (address - kSharedBase) / kChunk;
  whole[chunk].write = {where, now, static_cast<uint8_t>(agent), 0, false, true};
  in_flight[chunk] = 0;
  written[chunk] = 0xffff;
  std::memcpy(&arena[address - kSharedBase], from, kChunk);
}

void begin_product_read(uint32_t address, int agent, const Knowledge& knows, const Where& where) {
  const uint32_t offset = locate<16>(address, "wgmma operand", where);
  check_written<16>(offset, where);
  for_each_granule(offset / kChunk, [&](Granule& g, uint32_t at) {
    if (g.write.time >= knows.before[g.write.warp]) race(at, "this read by wgmma", "write", g.write, where);
    if (!crosses_proxy(g.write, knows)) lacks_proxy_fence(at, "a read by wgmma", g.write, where);
    Touch* slot = nullptr;
    for (Touch& r : g.read) {
      if (r.warp == agent && r.time != 0) {
        slot = &r;
        break;
      }
      if (r.time < knows.before[r.warp]) slot = &r;
    }
    if (slot == nullptr) slot = &g.read[draw(Granule::kReaders)];
    *slot = {where, block.now, static_cast<uint8_t>(agent), 0, false, false};
  });
}

const void* product_operand(uint32_t address) { return &arena[address - kSharedBase]; }

void claim_mbarrier(uint32_t address, const Where& where) {
  const uint32_t offset = locate<8>(address, "mbarrier", where);
  if (in_flight[offset / kChunk] != 0) check_free<8>(offset, "mbarrier_init", where);
  note<8, note_write>(address, offset, warp_number(this_warp()), this_lane(), where);
  const uint32_t mask = 0xffu << (offset % kChunk);
  written[offset / kChunk] = static_cast<uint16_t>(written[offset / kChunk] & ~mask);
  in_flight[offset / kChunk] |= offset % kChunk < 8 ? kMbarrierLow : kMbarrierHigh;
}

void postpone_stores_of_other_lanes() {
  const int warp = warp_number(this_warp());
  const Time until = block.now;
  block.fibre[this_thread()].stored.clear();
  for (int lane = 0; lane < kLanes; ++lane) {
    Fibre& fibre = block.fibre[warp * kLanes + lane];
    if (fibre.stored.empty()) continue;
    // Those that a proxy fence covers stay covered: they come first, and the fence anew behind them.
    const Time last_fence = fibre.proxy_fences.empty() ? 0 : fibre.proxy_fences.back();
    for (const bool fenced : {true, false}) {
      const Time now = ++block.now;
      for (const uint32_t chunk : fibre.stored) {
        for_each_granule(chunk, [&](Granule& g, uint32_t) {
          const bool mine = g.write.warp == warp && g.write.lane == lane && g.write.time > block.started;
          if (mine && g.write.time <= until && (g.write.time < last_fence) == fenced) g.write.time = now;
        });
      }
      if (fenced && last_fence != 0) fibre.proxy_fences.push_back(++block.now);
    }
  }
}

}  // namespace warpform::simt
