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

std::vector<Floats> layer_norm() {
  constexpr int64_t kRows = 3001, kCols = 77;
  static const Floats x = drawn(kRows * kCols), residual = drawn(kRows * kCols), dout = drawn(kRows * kCols);
  static const Floats bias = drawn(kCols), weight = drawn(kCols);
  Floats out(kRows * kCols), sum(kRows * kCols), mean(kRows), rstd(kRows), dx(kRows * kCols);
  Floats dbias(kCols), dweight(kCols), dln_bias(kCols);
  kernels::layer_norm({.x = x.data(),
                       .residual = residual.data(),
                       .bias = bias.data(),
                       .weight = weight.data(),
                       .ln_bias = bias.data(),
                       .out = out.data(),
                       .sum = sum.data(),
                       .mean = mean.data(),
                       .rstd = rstd.data(),
                       .rows = kRows,
                       .cols = kCols,
                       .eps = 1e-5f},
                      kHost);
  kernels::layer_norm_backward({.dout = dout.data(),
                                .sum = sum.data(),
                                .weight = weight.data(),
                                .mean = mean.data(),
                                .rstd = rstd.data(),
                                .dx = dx.data(),
                                .dbias = dbias.data(),
                                .dweight = dweight.data(),
                                .dln_bias = dln_bias.data(),
                                .rows = kRows,
                                .cols = kCols},
                               kHost);
  return {out, sum, mean, rstd, dx, dbias, dweight, dln_bias};
}

// A plan of a mask with holes, and rows packed by it. Integers go through float, which all of them fit into.
std::vector<Floats> packing() {
  constexpr int64_t kBatch = 301, kSeqlen = 257, kCapacity = 60001, kWidth = 5;
  std::vector<uint8_t> mask(kBatch * kSeqlen);
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i / 50 % 3 != 0 || i % 7 == 0;
  std::vector<int32_t> cu_seqlens(kBatch + 1), lengths(kBatch), ranks(kBatch * kSeqlen);
  std::vector<int64_t> indices(kCapacity), position_ids(kCapacity), summary(2);
  kernels::packing_plan({.mask = mask.data(),
                         .mask_bytes = 1,
                         .mask_stride = kSeqlen,
                         .mask_column_stride = 1,
                         .batch = kBatch,
                         .seqlen = kSeqlen,
                         .capacity = kCapacity,
                         .cu_seqlens = cu_seqlens.data(),
                         .lengths = lengths.data(),
                         .indices = indices.data(),
                         .position_ids = position_ids.data(),
                         .ranks = ranks.data(),
                         .summary = summary.data()},
                        kHost);
  static const Floats x = drawn(kBatch * kSeqlen * kWidth);
  Floats packed(kCapacity * kWidth);
  kernels::gather_rows({.in = x.data(),
                        .out = packed.data(),
                        .index = indices.data(),
                        .index_bytes = 8,
                        .in_rows = kBatch * kSeqlen,
                        .out_rows = kCapacity,
                        .row_bytes = kWidth * 4,
                        .in_stride = kWidth * 4},
                       kHost);
  const auto floats = [](const auto& values) { return Floats(values.begin(), values.end()); };
  return {floats(cu_seqlens),   floats(lengths), floats(ranks), floats(indices),
          floats(position_ids), floats(summary), packed};
}

const Case kCases[] = {{"bias_gelu", gelu}, {"layer_norm", layer_norm}, {"packing", packing}};

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
