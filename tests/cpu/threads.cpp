// Runs CPU kernels on 1, 2, 3 and 7 threads of this program: their results must be the same bits, and ThreadSanitizer must
// see no race. Torch's own threads come from an OpenMP runtime that it does not know.
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "cpu/families.h"

namespace kernels = warpform::cpu::WARPFORM_CPU_ISA;
using namespace warpform;  // parameters

namespace {

int64_t thread_count = 1;

const cpu::Host kHost{
    .threads = [] { return thread_count; },
    .run =
        [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
          std::vector<std::thread> threads;
          std::barrier start(n);  // or the first thread would do the work before the next is there
          for (int64_t i = 0; i < n; ++i) {
            threads.emplace_back([&, i] {
              start.arrive_and_wait();
              body(i, i + 1, context);
            });
          }
          for (std::thread& thread : threads) thread.join();
        },
    .take = [](size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); },
    .give = [](void* memory) { std::free(memory); },
};

using Floats = std::vector<float>;

Floats drawn(size_t count) {
  static uint32_t state = 1;
  Floats values(count);
  for (float& x : values) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<float>(state >> 8) / (1 << 24) - 0.5f;
  }
  return values;
}

// A kernel's call, which fills the results that it returns.
struct Case {
  const char* name;
  std::function<std::vector<Floats>()> call;
};

std::vector<Floats> gelu() {
  constexpr int64_t kRows = 3001, kCols = 77;
  static const Floats x = drawn(kRows * kCols), bias = drawn(kCols), dout = drawn(kRows * kCols);
  Floats out(kRows * kCols), dx(kRows * kCols), dbias(kCols);
  kernels::bias_gelu({.x = x.data(), .bias = bias.data(), .out = out.data(), .rows = kRows, .cols = kCols}, kHost);
  kernels::bias_gelu_backward({.dout = dout.data(),
                               .x = x.data(),
                               .bias = bias.data(),
                               .dx = dx.data(),
                               .dbias = dbias.data(),
                               .rows = kRows,
                               .cols = kCols},
                              kHost);
  return {out, dx, dbias};
}

const Case kCases[] = {{"bias_gelu", gelu}};

}  // namespace

int main() {
  for (const Case& one : kCases) {
    std::vector<Floats> first;
    for (const int64_t threads : {1, 2, 3, 7}) {
      thread_count = threads;
      const std::vector<Floats> found = one.call();
      if (threads == 1) first = found;
      for (size_t i = 0; i < found.size(); ++i) {
        if (std::memcmp(found[i].data(), first[i].data(), found[i].size() * sizeof(float)) != 0) {
          std::printf("%s: result %zu differs on %d threads\n", one.name, i, static_cast<int>(threads));
          return 1;
        }
      }
    }
  }
  std::puts("the same bits on 1, 2, 3 and 7 threads");
}
