#include "simt/wgmma.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "simt/shared_memory.h"
#include "simt/tensor_core.h"
#include "simt/tensor_map.h"

namespace warpform::simt {
namespace {

constexpr int kThreads = kLanes * kWarpgroupWarps;  // of a warpgroup
constexpr int kRows = 64, kDepth = 16, kMostColumns = 256;
constexpr uint32_t kPoison = 0x7fc0dead;  // a NaN

// Accumulators of a warpgroup while products on them are in flight: their values are here, their registers are poisoned.
struct Accumulators {
  float* registers[kThreads];
  int columns;
  uint64_t last = 0;  // the newest product on them
  uint32_t back = 0;  // warps that have them back
  alignas(64) float value[kRows * kMostColumns];
};

struct Product {
  uint64_t number;
  Time issued;
  ProductOperands operands;  // of lane 0
  Accumulators* accumulators;
  bool done = false;
  const uint32_t* registers_a[kThreads];
  uint32_t copy_a[kThreads][4];  // at the issue
  Where where;
};

struct Warpgroup {
  uint64_t issued = 0;  // products
  std::deque<Product> products;
  std::vector<std::unique_ptr<Accumulators>> accumulators;
  std::vector<uint64_t> groups[kWarpgroupWarps];  // of each warp, the last product of every group that it may wait for
  uint64_t retired[kWarpgroupWarps] = {};         // the last product that its waits covered
};
Warpgroup warpgroups[kMaxWarpgroups];

const ProductOperands& operands_of(int g, int thread) {
  const Warp& warp = block.warp[g * kWarpgroupWarps + thread / kLanes];
  return *static_cast<const ProductOperands*>(warp.operands[thread % kLanes]);
}

int thread_number(int g, int thread) { return g * kThreads + thread; }

// ---- registers ----

uint64_t hash_of(const void* data, size_t bytes) {
  uint64_t hash = 0x9e3779b97f4a7c15u;
  const auto* words = static_cast<const char*>(data);
  for (size_t i = 0; i < bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, words + i, 8);
    hash = (hash ^ word) * 0xd6e8feb86659fd93u;
    hash ^= hash >> 32;
  }
  return hash;
}

// Fails unless the registers are as they were at the thread's last wgmma_fence that named them.
void check_fenced(int thread, const void* data, size_t bytes, const char* what, const Where& where) {
  const auto* first = static_cast<const char*>(data);
  for (const FencedRegisters& f : block.fibre[thread].fenced) {
    const auto* begin = static_cast<const char*>(f.data);
    if (first < begin || first + bytes > begin + f.bytes) continue;
    if (hash_of(f.data, f.bytes) == f.hash) return;
    speak_for(thread);
    fail(std::string("wgmma: the ") + what + " were written after the wgmma_fence that named them", where);
  }
  speak_for(thread);
  fail(std::string("wgmma: no wgmma_fence names the ") + what, where);
}

void forget_fence(int thread, const void* data) {
  auto& fenced = block.fibre[thread].fenced;
  std::erase_if(fenced, [&](const FencedRegisters& f) { return f.data == data; });
}

// ---- operands in shared memory ----

struct Description {
  uint32_t address;
  uint32_t leading;
  uint32_t stride;
  Swizzle swizzle;
};

Description decode(uint64_t bits, const char* name, const Where& where) {
  const auto field = [&](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; };
  const auto kind = static_cast<int>(bits >> 62);
  const Description d{field(0), field(16), field(32), kind == 0 ? Swizzle::kNone : static_cast<Swizzle>(4 - kind)};
  constexpr uint64_t kFields = 0x3fff | uint64_t{0x3fff} << 16 | uint64_t{0x3fff} << 32 | uint64_t{3} << 62;
  if (bits & ~kFields) fail(std::string("wgmma: the description of ") + name + " has bits that mean nothing", where);
  const auto pattern = static_cast<uint32_t>(swizzle_bytes(d.swizzle)) * 8;  // bytes after which the swizzle repeats
  if (d.swizzle != Swizzle::kNone && d.address % pattern >= static_cast<uint32_t>(swizzle_bytes(d.swizzle))) {
    fail(std::string("wgmma: ") + name + " begins in the middle of its swizzle's pattern of " +
             std::to_string(pattern) + " bytes, at address " + std::to_string(d.address - kSharedBase),
         where);
  }
  return d;
}

// Calls f(outer, depth, address) for every eight elements of an operand that lie side by side: along the depth, or along
// the outer dimension where that is contiguous.
template <class F>
void for_each_piece(const Description& d, bool outer_major, int outer, F&& f) {
  const auto span = static_cast<uint32_t>(swizzle_bytes(d.swizzle));
  const auto u = [](int i) { return static_cast<uint32_t>(i); };
  const bool plain = d.swizzle == Swizzle::kNone;
  if (!outer_major) {
    for (int o = 0; o < outer; ++o) {
      for (int k = 0; k < kDepth; k += 8) {
        const uint32_t along = plain ? u(k / 8) * d.leading : u(k) * 2;
        f(o, k, swizzled(d.address + u(o / 8) * d.stride + u(o % 8) * span + along, d.swizzle));
      }
    }
    return;
  }
  const int width = static_cast<int>(span) / 2;
  for (int k = 0; k < kDepth; ++k) {
    for (int o = 0; o < outer; o += 8) {
      const uint32_t at = plain ? u(k / 8) * d.leading + u(o / 8) * d.stride
                                : u(k / 8) * d.stride + u(o / width) * d.leading + u(o % width) * 2;
      f(o, k, swizzled(d.address + at + u(k % 8) * span, d.swizzle));
    }
  }
}

void widen(const void* from, bool half, float* to) {
  uint16_t bits[8];
  std::memcpy(bits, from, sizeof(bits));
  if (half) {
    for (int i = 0; i < 8; ++i) to[i] = __half2float(std::bit_cast<__half>(bits[i]));
  } else {
    for (int i = 0; i < 8; ++i) to[i] = std::bit_cast<float>(uint32_t{bits[i]} << 16);
  }
}

// Reads an operand as [depth][outer].
void read_operand(uint64_t bits, bool outer_major, bool half, int outer, float* to, const Where& where) {
  float piece[8];
  for_each_piece(decode(bits, "an operand", where), outer_major, outer, [&](int o, int k, uint32_t address) {
    widen(product_operand(address), half, piece);
    for (int i = 0; i < 8; ++i) to[outer_major ? k * outer + o + i : (k + i) * outer + o] = piece[i];
  });
}

// ---- the product ----

// Element e of thread t's accumulators: its place in [64][columns].
int place_of(int t, int e, int columns) {
  const int row = t / kLanes * 16 + t % kLanes / 4 + 8 * (e % 4 / 2);
  return row * columns + e / 4 * 8 + t % 4 * 2 + e % 2;
}

void compute(Product& p) {
  const ProductOperands& o = p.operands;
  alignas(64) static float a[kDepth * kRows], b[kDepth * kMostColumns];
  if (o.registers_a == nullptr) {
    read_operand(o.a, o.outer_a, o.half, kRows, a, p.where);
  } else {
    for (int t = 0; t < kThreads; ++t) {
      float values[8];
      widen(p.copy_a[t], o.half, values);
      const int row = t / kLanes * 16 + t % kLanes / 4, k = t % 4 * 2;
      for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < 2; ++i) a[(k + r / 2 * 8 + i) * kRows + row + r % 2 * 8] = values[2 * r + i];
      }
    }
  }
  read_operand(o.b, o.outer_b, o.half, o.columns, b, p.where);
  float* d = p.accumulators->value;
  if (!o.accumulate) std::fill_n(d, kRows * o.columns, 0.f);
  multiply_transposed(a, kRows, b, o.columns, kDepth, d);
  p.done = true;
}

// All products up to this one, in order.
void compute_until(Warpgroup& w, uint64_t number) {
  for (Product& p : w.products) {
    if (p.number > number) break;
    if (!p.done) compute(p);
  }
}

Accumulators& take_accumulators(Warpgroup& w, int g, const Where& where) {
  const ProductOperands& first = operands_of(g, 0);
  const size_t bytes = static_cast<size_t>(first.columns) * 2;
  for (const auto& known : w.accumulators) {
    if (known->registers[0] != first.d) continue;
    for (int t = 1; t < kThreads; ++t) {
      if (known->registers[t] == operands_of(g, t).d) continue;
      speak_for(thread_number(g, t));
      fail("wgmma: this thread names other accumulators than at the product in flight before", where);
    }
    if (known->columns != first.columns) {
      fail("wgmma: " + std::to_string(first.columns) + " columns on accumulators that products of " +
               std::to_string(known->columns) + " columns in flight have",
           where);
    }
    if (known->back != 0) fail("wgmma: some warps have waited for these accumulators and others have not", where);
    return *known;
  }
  for (int t = 0; t < kThreads; ++t)
    check_fenced(thread_number(g, t), operands_of(g, t).d, bytes, "accumulators", where);
  auto& taken = *w.accumulators.emplace_back(std::make_unique<Accumulators>());
  taken.columns = first.columns;
  for (int t = 0; t < kThreads; ++t) {
    float* d = operands_of(g, t).d;
    taken.registers[t] = d;
    for (int e = 0; e < first.columns / 2; ++e) {
      taken.value[place_of(t, e, first.columns)] = d[e];
      std::memcpy(&d[e], &kPoison, 4);
    }
  }
  return taken;
}

// All four warps have come.
void issue(int g, const Where& where) {
  Warpgroup& w = warpgroups[g];
  const ProductOperands& first = operands_of(g, 0);
  for (int t = 1; t < kThreads; ++t) {
    const ProductOperands& o = operands_of(g, t);
    const bool same_shape = o.columns == first.columns && o.half == first.half && o.outer_a == first.outer_a &&
                            o.outer_b == first.outer_b && (o.registers_a == nullptr) == (first.registers_a == nullptr);
    if (same_shape && o.b == first.b && o.a == first.a && o.accumulate == first.accumulate) continue;
    speak_for(thread_number(g, t));
    fail("wgmma: this thread has another description of an operand, or accumulates otherwise, than thread " +
             std::to_string(thread_number(g, 0)),
         where);
  }
  Product& p = w.products.emplace_back();
  p.number = ++w.issued;
  p.operands = first;
  p.where = where;
  p.accumulators = &take_accumulators(w, g, where);
  p.accumulators->last = p.number;
  if (first.registers_a != nullptr) {
    for (int t = 0; t < kThreads; ++t) {
      p.registers_a[t] = operands_of(g, t).registers_a;
      check_fenced(thread_number(g, t), p.registers_a[t], 16, "registers of the left operand", where);
      std::memcpy(p.copy_a[t], p.registers_a[t], 16);
    }
  }

  // What the products read has to be ordered before them for every warp.
  Knowledge common = block.warp[g * kWarpgroupWarps].knows;
  for (int i = 1; i < kWarpgroupWarps; ++i) common.intersect(block.warp[g * kWarpgroupWarps + i].knows);
  p.issued = ++block.now;
  const auto check = [&](uint64_t bits, const char* name, bool outer_major, int outer) {
    for_each_piece(decode(bits, name, where), outer_major, outer, [&](int, int, uint32_t address) {
      begin_product_read(address, kFirstTensorCore + g, common, where);
    });
  };
  if (first.registers_a == nullptr) check(first.a, "the left operand", first.outer_a, kRows);
  check(first.b, "the right operand", first.outer_b, first.columns);
  if (draw(2) == 1) compute_until(w, p.number);
}

// ---- waits ----

bool names(const RegisterArray* arrays, int count, const void* data) {
  for (int i = 0; i < count; ++i) {
    if (arrays[i].data == data) return true;
  }
  return false;
}

struct Wait {
  const RegisterArray* arrays;
  int count;
};

// Gives one warp back what the products up to this one have of its registers.
void retire(Warpgroup& w, int g, int warp, uint64_t number, const Where& where) {
  const auto in_warp = [&](auto&& f) {
    for (int t = warp * kLanes; t < (warp + 1) * kLanes; ++t) f(t);
  };
  for (const Product& p : w.products) {
    if (p.number > number) break;
    if (p.number <= w.retired[warp]) continue;
    Time& known = block.warp[g * kWarpgroupWarps + warp].knows.before[kFirstTensorCore + g];
    known = std::max(known, p.issued + 1);
    if (p.operands.registers_a == nullptr) continue;
    in_warp([&](int t) {
      if (std::memcmp(p.registers_a[t], p.copy_a[t], 16) == 0) return;
      speak_for(thread_number(g, t));
      fail("register hazard: the left operand of the wgmma at " + text_of(p.where) +
               " was written before the wait that covers it",
           where);
    });
  }
  for (const auto& accumulators : w.accumulators) {
    Accumulators& acc = *accumulators;
    if (acc.last > number || (acc.back >> warp & 1)) continue;
    in_warp([&](int t) {
      const auto& wait = *static_cast<const Wait*>(block.warp[g * kWarpgroupWarps + warp].operands[t % kLanes]);
      float* d = acc.registers[t];
      if (!names(wait.arrays, wait.count, d)) {
        speak_for(thread_number(g, t));
        fail("wgmma_wait: accumulators come back that it does not name", where);
      }
      for (int e = 0; e < acc.columns / 2; ++e) {
        if (std::memcmp(&d[e], &kPoison, 4) != 0) {
          speak_for(thread_number(g, t));
          fail("register hazard: accumulators were written before the wait that covers their products", where);
        }
        d[e] = acc.value[place_of(t, e, acc.columns)];
      }
      forget_fence(thread_number(g, t), d);
    });
    acc.back |= 1u << warp;
  }
  std::erase_if(w.accumulators, [](const auto& acc) { return acc->back == (1u << kWarpgroupWarps) - 1; });
  w.retired[warp] = std::max(w.retired[warp], number);
  const uint64_t all = *std::min_element(w.retired, w.retired + kWarpgroupWarps);
  while (!w.products.empty() && w.products.front().number <= all) w.products.pop_front();
}

// What a wait names is the kernel's again, so that no product in flight may write it.
void check_nothing_named_is_in_flight(const Warpgroup& w, int g, int warp, const Where& where) {
  for (const auto& acc : w.accumulators) {
    if (acc->back >> warp & 1) continue;
    for (int t = warp * kLanes; t < (warp + 1) * kLanes; ++t) {
      const auto& wait = *static_cast<const Wait*>(block.warp[g * kWarpgroupWarps + warp].operands[t % kLanes]);
      if (!names(wait.arrays, wait.count, acc->registers[t])) continue;
      speak_for(thread_number(g, t));
      fail("wgmma_wait: it names accumulators that products in flight still write", where);
    }
  }
}

}  // namespace

void clear_products() {
  for (int g = 0; g < (block.warps + kWarpgroupWarps - 1) / kWarpgroupWarps; ++g) warpgroups[g] = Warpgroup{};
}

void fence_products(const RegisterArray* arrays, int count, const Where& where) {
  Warp& warp = this_warp();
  auto& fenced = block.fibre[this_thread()].fenced;
  for (int i = 0; i < count; ++i) {
    const FencedRegisters now{arrays[i].data, arrays[i].bytes, hash_of(arrays[i].data, arrays[i].bytes)};
    const auto known = std::find_if(fenced.begin(), fenced.end(), [&](const auto& f) { return f.data == now.data; });
    if (known == fenced.end()) {
      fenced.push_back(now);
    } else {
      *known = now;
    }
  }
  if (meet(Meeting::kWgmmaFence, where)) end_meeting(warp);
}

void issue_product(const ProductOperands& operands, const Where& where) {
  Warp& warp = this_warp();
  warp.operands[this_lane()] = const_cast<ProductOperands*>(&operands);
  if (!meet(Meeting::kWgmma, where) || !meet_warpgroup(where)) return;
  const int g = this_warpgroup();
  issue(g, where);
  end_warpgroup_meeting(g);
}

void commit_products(const Where& where) {
  Warp& warp = this_warp();
  if (!meet(Meeting::kWgmmaCommit, where)) return;
  Warpgroup& w = warpgroups[this_warpgroup()];
  w.groups[warp_number(warp) % kWarpgroupWarps].push_back(w.issued);
  end_meeting(warp);
}

void wait_for_products(int groups_left, const RegisterArray* arrays, int count, const Where& where) {
  Warp& warp = this_warp();
  Wait mine{arrays, count};
  warp.operands[this_lane()] = &mine;
  if (!meet(Meeting::kWgmmaWait, where)) return;
  const int g = this_warpgroup(), number = warp_number(warp) % kWarpgroupWarps, thread = this_thread();
  Warpgroup& w = warpgroups[g];
  auto& groups = w.groups[number];
  if (static_cast<int>(groups.size()) > groups_left) {
    const auto done = groups.size() - static_cast<size_t>(groups_left);
    const uint64_t last = groups[done - 1];
    groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
    compute_until(w, last);
    retire(w, g, number, last, where);
  }
  check_nothing_named_is_in_flight(w, g, number, where);
  speak_for(thread);
  end_meeting(warp);
}

bool products_in_flight(int warp) {
  const Warpgroup& w = warpgroups[warp / kWarpgroupWarps];
  return w.retired[warp % kWarpgroupWarps] < w.issued;
}

void report_products_in_flight(int warp) {
  fail("the thread ended while a wgmma was in flight, issued",
       warpgroups[warp / kWarpgroupWarps].products.back().where);
}

}  // namespace warpform::simt
