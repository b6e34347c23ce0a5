// How a kernel goes over its work in threads. The binding says which threads there are (torch's), so kernels know nothing
// of torch, and a test may bring others. This header is compiled for several instruction sets: it has no function that
// the linker could share between them (see simd.h).
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef WARPFORM_CPU_ISA
#error "csrc/cpu is compiled once for each instruction set, with -DWARPFORM_CPU_ISA=v3, v4 or neon"
#endif

#include "host.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Hands out the numbers [0, count), each once. Which thread gets which is chance, so results must not depend on it.
class Items {
 public:
  explicit Items(int64_t count) : count_(count) {}
  bool next(int64_t& item) {
    item = __atomic_fetch_add(&taken_, 1, __ATOMIC_RELAXED);
    return item < count_;
  }

 private:
  int64_t taken_ = 0;
  const int64_t count_;
};

// Calls work(items) in at most as many threads as there are items; each call takes items until none is left. One
// parallel region. An item should be 10 microseconds of work or more: a region costs about as much, and beside a busy
// process far more. A thread that was held up keeps the others waiting for one item only.
template <class Work>
void over(const Host& host, int64_t count, const Work& work) {
  if (count <= 0) return;
  struct Shared {
    const Work& work;
    Items items;
  } shared{work, Items(count)};
  const int64_t threads = host.threads();
  const int64_t workers = count < threads ? count : threads;
  if (workers <= 1) {
    work(shared.items);
    return;
  }
  host.run(
      workers,
      [](int64_t begin, int64_t end, void* context) {
        auto* shared = static_cast<Shared*>(context);
        for (int64_t i = begin; i < end; ++i) shared->work(shared->items);
      },
      &shared);
}

// Memory for one call in one thread, aligned to 64 bytes, its contents unset. It comes from what the thread used before:
// memory that is fresh from the system costs a page fault for every 4 KiB.
class Scratch {
 public:
  Scratch(const Host& host, int64_t bytes) : host_(host), data_(host.take(static_cast<size_t>(bytes))) {}
  ~Scratch() { host_.give(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` elements, again aligned to 64 bytes; whoever made the scratch counted them with `bytes_of`.
  template <class T>
  T* next(int64_t count) {
    T* const found = reinterpret_cast<T*>(static_cast<char*>(data_) + used_);
    used_ += bytes_of<T>(count);
    return found;
  }
  template <class T>
  static constexpr int64_t bytes_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  const Host& host_;
  void* const data_;
  int64_t used_ = 0;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace warpform::cpu::WARPFORM_CPU_ISA
