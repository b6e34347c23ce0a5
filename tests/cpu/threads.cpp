// Runs CPU kernels on 1, 2, 3 and 7 threads of this program: their results must be the same bits, and ThreadSanitizer must
// see no race. Torch's own threads come from an OpenMP runtime that it does not know.
#include <algorithm>
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
int64_t regions = 0;  // that were parallel since it was set to 0

const cpu::Host kHost{
    .threads = [] { return thread_count; },
    .run =
        [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
          ++regions;
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

// Calls of a forward and a backward kernel, which fill the results that are returned.
struct Case {
  const char* name;
  int64_t most_regions;  // of both together
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

std::vector<Floats> rms_norm() {
  constexpr int64_t kRows = 3001, kCols = 77;
  static const Floats x = drawn(kRows * kCols), residual = drawn(kRows * kCols), dout = drawn(kRows * kCols);
  static const Floats weight = drawn(kCols);
  Floats out(kRows * kCols), sum(kRows * kCols), rstd(kRows), dx(kRows * kCols), dweight(kCols);
  kernels::rms_norm({.x = x.data(),
                     .residual = residual.data(),
                     .weight = weight.data(),
                     .out = out.data(),
                     .sum = sum.data(),
                     .rstd = rstd.data(),
                     .rows = kRows,
                     .cols = kCols,
                     .eps = 1e-6f},
                    kHost);
  kernels::rms_norm_backward({.dout = dout.data(),
                              .dsum = residual.data(),
                              .sum = sum.data(),
                              .weight = weight.data(),
                              .rstd = rstd.data(),
                              .dx = dx.data(),
                              .dweight = dweight.data(),
                              .rows = kRows,
                              .cols = kCols},
                             kHost);
  return {out, sum, rstd, dx, dweight};
}

std::vector<Floats> rms_norm_gelu() {
  constexpr int64_t kRows = 3001, kCols = 77;
  static const Floats x = drawn(kRows * kCols), dout = drawn(kRows * kCols);
  Floats out(kRows * kCols), dx(kRows * kCols);
  kernels::rms_norm_gelu({.x = x.data(), .out = out.data(), .rows = kRows, .cols = kCols, .gain = 1.f}, kHost);
  kernels::rms_norm_gelu_backward(
      {.dout = dout.data(), .x = x.data(), .dx = dx.data(), .rows = kRows, .cols = kCols, .gain = 1.f}, kHost);
  return {out, dx};
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

HeadsView heads_of(const Floats& t, int heads, int dim) { return {t.data(), heads * dim, dim}; }

// q, k and v of some tokens each, [tokens, heads, dim].
AttentionProblem problem_of(const Floats& q, const Floats& k, const Floats& v, int heads, int key_heads, int dim) {
  const int total_q = static_cast<int>(q.size()) / (heads * dim),
            total_k = static_cast<int>(k.size()) / (key_heads * dim);
  return {.q = heads_of(q, heads, dim),
          .k = heads_of(k, key_heads, dim),
          .v = heads_of(v, key_heads, dim),
          .batch = 1,
          .total_q = total_q,
          .total_k = total_k,
          .max_seqlen_q = total_q,
          .max_seqlen_k = total_k,
          .heads_q = heads,
          .heads_kv = key_heads,
          .head_dim = dim,
          .dtype = DType::kFloat32,
          .softmax_scale = 0.2f,
          .window_left = -1,
          .window_right = -1};
}
void cut(AttentionProblem& problem, const std::vector<int32_t>& cu_q, const std::vector<int32_t>& cu_k) {
  problem.cu_seqlens_q = cu_q.data(), problem.cu_seqlens_k = cu_k.data();
  problem.batch = static_cast<int>(cu_q.size()) - 1;
}

// Sequences of all kinds of lengths, two query heads for each key head.
std::vector<Floats> attention(bool causal) {
  static const std::vector<int32_t> cu = {0, 5, 5, 90, 153, 154, 700};
  constexpr int kTokens = 700, kHeads = 4, kKeyHeads = 2, kDim = 40;
  static const Floats q = drawn(kTokens * kHeads * kDim), dout = drawn(kTokens * kHeads * kDim);
  static const Floats k = drawn(kTokens * kKeyHeads * kDim), v = drawn(kTokens * kKeyHeads * kDim);
  AttentionProblem problem = problem_of(q, k, v, kHeads, kKeyHeads, kDim);
  cut(problem, cu, cu);
  if (causal) problem.window_right = 0;
  Floats out(q.size()), lse(kHeads * kTokens), dq(q.size()), dk(k.size()), dv(v.size());
  kernels::varlen_attention({.problem = problem, .out = out.data(), .lse = lse.data()}, kHost);
  kernels::varlen_attention_backward({.problem = problem,
                                      .out = heads_of(out, kHeads, kDim),
                                      .dout = heads_of(dout, kHeads, kDim),
                                      .lse = lse.data(),
                                      .dq = dq.data(),
                                      .dk = dk.data(),
                                      .dv = dv.data()},
                                     kHost);
  return {out, lse, dq, dk, dv};
}

// A few queries, which read many keys where they lie.
std::vector<Floats> few_queries() {
  static const std::vector<int32_t> cu_q = {0, 1, 3}, cu_k = {0, 700, 741};
  constexpr int kQueries = 3, kKeys = 741, kHeads = 4, kKeyHeads = 2, kDim = 40;
  static const Floats q = drawn(kQueries * kHeads * kDim);
  static const Floats k = drawn(kKeys * kKeyHeads * kDim), v = drawn(kKeys * kKeyHeads * kDim);
  AttentionProblem problem = problem_of(q, k, v, kHeads, kKeyHeads, kDim);
  cut(problem, cu_q, cu_k);
  problem.window_left = 650, problem.window_right = 0;
  Floats out(q.size()), lse(kHeads * kQueries);
  kernels::varlen_attention({.problem = problem, .out = out.data(), .lse = lse.data()}, kHost);
  return {out, lse};
}

// Shifted windows over grids that are no multiple of them: of 49 tokens, whose scores are worked on whole, and of 144.
std::vector<Floats> windows(int window) {
  constexpr int kBatch = 2, kHeight = 25, kWidth = 31, kHeads = 3, kDim = 24, kTokens = kBatch * kHeight * kWidth;
  const size_t entries = static_cast<size_t>((2 * window - 1) * (2 * window - 1));
  const Floats table(entries * kHeads, 0.25f);
  static const Floats qkv = drawn(kTokens * 3 * kHeads * kDim), dout = drawn(kTokens * kHeads * kDim);
  WindowProblem problem{.qkv = qkv.data(),
                        .table = table.data(),
                        .dtype = DType::kFloat32,
                        .batch = kBatch,
                        .heads = kHeads,
                        .head_dim = kDim,
                        .size = {1, kHeight, kWidth},
                        .window = {1, window, window},
                        .shift = {0, 3, 3},
                        .scale = 0.2f,
                        .mask_value = -100.f};
  problem.derive();
  Floats out(dout.size()), lse(static_cast<size_t>(problem.windows * problem.tokens * kHeads));
  Floats dqkv(qkv.size()), dtable(table.size());
  kernels::window_attention({.problem = problem, .out = out.data(), .lse = window > 8 ? lse.data() : nullptr}, kHost);
  kernels::window_attention_backward({.problem = problem,
                                      .dout = dout.data(),
                                      .out = out.data(),
                                      .lse = window > 8 ? lse.data() : nullptr,
                                      .dqkv = dqkv.data(),
                                      .dtable = dtable.data()},
                                     kHost);
  return {out, lse, dqkv, dtable};
}

std::vector<Floats> monarch() {
  constexpr int64_t kRows = 300, kBlocks = 3, kIn = 20, kMiddle = 36, kOut = 28;
  static const Floats x = drawn(kRows * kBlocks * kIn), dout = drawn(kRows * kBlocks * kOut);
  static const Floats first = drawn(kBlocks * kMiddle * kIn), second = drawn(kBlocks * kOut * kMiddle);
  Floats out(dout.size()), dx(x.size()), dfirst(first.size()), dsecond(second.size());
  cpu::BlockProductParams params{
      .first = {.w = first.data(), .dw = dfirst.data(), .count = kBlocks, .rows = kMiddle, .cols = kIn},
      .second = {.w = second.data(), .dw = dsecond.data(), .count = kBlocks, .rows = kOut, .cols = kMiddle},
      .x = x.data(),
      .dout = dout.data(),
      .out = out.data(),
      .dx = dx.data(),
      .rows = kRows,
      .x_stride = kBlocks * kIn,
      .dout_stride = kBlocks * kOut,
      .dtype = DType::kFloat32};
  kernels::monarch_multiply(params, kHost);
  kernels::monarch_multiply_backward(params, kHost);
  return {out, dx, dfirst, dsecond};
}

std::vector<Floats> short_conv() {
  constexpr int64_t kBatch = 3, kSeqlen = 101, kChannels = 150, kTaps = 3;
  static const Floats x = drawn(kBatch * kSeqlen * 3 * kChannels), weight = drawn(3 * kChannels * kTaps);
  static const Floats bias = drawn(3 * kChannels), dout = drawn(kBatch * kChannels * kSeqlen);
  Floats gated(dout.size()), gate(dout.size()), dx(x.size()), dweight(weight.size()), dbias(bias.size());
  kernels::short_conv_gate({.x = x.data(),
                            .weight = weight.data(),
                            .bias = bias.data(),
                            .gated = gated.data(),
                            .gate = gate.data(),
                            .batch = kBatch,
                            .seqlen = kSeqlen,
                            .channels = kChannels,
                            .taps = kTaps},
                           kHost);
  kernels::short_conv_gate_backward({.dgated = dout.data(),
                                     .dgate = dout.data(),
                                     .x = x.data(),
                                     .weight = weight.data(),
                                     .bias = bias.data(),
                                     .dx = dx.data(),
                                     .dweight = dweight.data(),
                                     .dbias = dbias.data(),
                                     .batch = kBatch,
                                     .seqlen = kSeqlen,
                                     .channels = kChannels,
                                     .taps = kTaps},
                                    kHost);
  return {gated, gate, dx, dweight, dbias};
}

// Images of several pieces: their rows are cut, and their channels.
std::vector<Floats> pool_mixer() {
  constexpr int64_t kBatch = 5, kHeight = 40, kWidth = 60, kChannels = 77;
  static const Floats x = drawn(kBatch * kHeight * kWidth * kChannels), dout = drawn(x.size());
  static const Floats weight = drawn(kChannels), scale = drawn(kChannels);
  Floats out(x.size()), mean(kBatch), rstd(kBatch), dx(x.size()), dweight(kChannels), dscale(kChannels);
  const SpatialShape shape{kBatch, kHeight, kWidth, kChannels};
  kernels::pool_mixer({.x = x.data(),
                       .weight = weight.data(),
                       .scale = scale.data(),
                       .out = out.data(),
                       .mean = mean.data(),
                       .rstd = rstd.data(),
                       .shape = shape,
                       .pool_size = 3,
                       .eps = 1e-5f},
                      kHost);
  kernels::pool_mixer_backward({.dout = dout.data(),
                                .x = x.data(),
                                .weight = weight.data(),
                                .scale = scale.data(),
                                .mean = mean.data(),
                                .rstd = rstd.data(),
                                .dx = dx.data(),
                                .dweight = dweight.data(),
                                .dscale = dscale.data(),
                                .shape = shape,
                                .pool_size = 3},
                               kHost);
  return {out, mean, rstd, dx, dweight, dscale};
}

std::vector<Floats> depthwise_conv2d() {
  constexpr int64_t kBatch = 2, kHeight = 41, kWidth = 50, kChannels = 77, kSize = 3;
  static const Floats x = drawn(kBatch * kHeight * kWidth * kChannels), dout = drawn(x.size());
  static const Floats weight = drawn(kChannels * kSize * kSize), bias = drawn(kChannels);
  Floats out(x.size()), dx(x.size()), dweight(weight.size()), dbias(kChannels);
  const SpatialShape shape{kBatch, kHeight, kWidth, kChannels};
  kernels::depthwise_conv2d({.x = x.data(),
                             .weight = weight.data(),
                             .bias = bias.data(),
                             .out = out.data(),
                             .shape = shape,
                             .kernel_size = kSize,
                             .activation = Activation::kGelu},
                            kHost);
  kernels::depthwise_conv2d_backward({.dout = dout.data(),
                                      .x = x.data(),
                                      .weight = weight.data(),
                                      .bias = bias.data(),
                                      .dx = dx.data(),
                                      .dweight = dweight.data(),
                                      .dbias = dbias.data(),
                                      .shape = shape,
                                      .kernel_size = kSize,
                                      .activation = Activation::kGelu},
                                     kHost);
  return {out, dx, dweight, dbias};
}

// A step on top of a state, and its gradients.
std::vector<Floats> attention_step() {
  constexpr int kRows = 300, kHeads = 2, kDim = 24, kSize = kRows * kHeads * kDim;
  static const Floats q = drawn(kSize), k = drawn(kSize), v = drawn(kSize), dout = drawn(kSize), state = drawn(kSize);
  static const Floats lse_before = drawn(kHeads * kRows), delta = drawn(kHeads * kRows);
  const StateView before{state.data(), kHeads * kDim, kDim, 0};
  const AttentionProblem problem = problem_of(q, k, v, kHeads, kHeads, kDim);
  StepLayout layout{};
  layout.positions = {.q_stride = 1, .k_stride = 1, .first_key = -kRows, .last_key = 1};  // causal
  layout.head_rows = kRows;
  Floats out(kSize), lse(kHeads * kRows), dq(kSize), dk(kSize), dv(kSize);
  kernels::attention_step({.problem = problem,
                           .step = layout,
                           .out_before = before,
                           .lse_before = lse_before.data(),
                           .out = out.data(),
                           .lse = lse.data()},
                          kHost);
  kernels::attention_step_backward({.problem = problem,
                                    .step = layout,
                                    .dout = heads_of(dout, kHeads, kDim),
                                    .lse = lse.data(),
                                    .delta = delta.data(),
                                    .dq_before = before,
                                    .dk_before = before,
                                    .dv_before = before,
                                    .dq_accumulator = dq.data(),
                                    .dk = dk.data(),
                                    .dv = dv.data()},
                                   kHost);
  return {out, lse, dq, dk, dv};
}

// Sequences with both relative terms, whose tables have a row for each distance up to 8.
std::vector<Floats> disentangled() {
  static const std::vector<int32_t> cu = {0, 5, 5, 90, 300};
  constexpr int kTokens = 300, kHeads = 2, kDim = 24, kReach = 8, kRows = 2 * kReach, kSize = kTokens * kHeads * kDim;
  static const Floats q = drawn(kSize), k = drawn(kSize), v = drawn(kSize), dout = drawn(kSize);
  static const Floats pos_key = drawn(kRows * kHeads * kDim), pos_query = drawn(kRows * kHeads * kDim);
  static const std::vector<int32_t> rows = [] {
    std::vector<int32_t> found;
    for (int distance = -kReach; distance <= kReach; ++distance)
      found.push_back(std::min(kReach + distance, kRows - 1));
    return found;
  }();
  AttentionProblem problem = problem_of(q, k, v, kHeads, kHeads, kDim);
  cut(problem, cu, cu);
  const cpu::RelativeTables tables{.pos_key = heads_of(pos_key, kHeads, kDim),
                                   .pos_query = heads_of(pos_query, kHeads, kDim),
                                   .rows = kRows,
                                   .row_of_distance = rows.data(),
                                   .reach = kReach};
  Floats out(kSize), lse(kHeads * kTokens), dq(kSize), dk(kSize), dv(kSize);
  Floats dpos_key(pos_key.size()), dpos_query(pos_query.size());
  kernels::disentangled_attention(
      {.attention = {.problem = problem, .out = out.data(), .lse = lse.data()}, .tables = tables}, kHost);
  kernels::disentangled_attention_backward({.attention = {.problem = problem,
                                                          .out = heads_of(out, kHeads, kDim),
                                                          .dout = heads_of(dout, kHeads, kDim),
                                                          .lse = lse.data(),
                                                          .dq = dq.data(),
                                                          .dk = dk.data(),
                                                          .dv = dv.data()},
                                            .tables = tables,
                                            .dpos_key = dpos_key.data(),
                                            .dpos_query = dpos_query.data()},
                                           kHost);
  return {out, lse, dq, dk, dv, dpos_key, dpos_query};
}

// The gated MLP of two block-diagonal factors.
std::vector<Floats> glu() {
  constexpr int64_t kRows = 300, kBlocks = 2, kIn = 20, kInner = 36;
  static const Floats x = drawn(kRows * kBlocks * kIn), dout = drawn(kRows * kBlocks * kIn);
  static const Floats up = drawn(kBlocks * 2 * kInner * kIn), down = drawn(kBlocks * kIn * kInner);
  Floats out(x.size()), dx(x.size()), dup(up.size()), ddown(down.size()), dbias(kBlocks * kIn);
  const cpu::BlockProductParams params{
      .first = {.w = up.data(), .dw = dup.data(), .count = kBlocks, .rows = 2 * kInner, .cols = kIn},
      .second = {.w = down.data(), .dw = ddown.data(), .count = kBlocks, .rows = kIn, .cols = kInner},
      .x = x.data(),
      .dout = dout.data(),
      .out = out.data(),
      .dx = dx.data(),
      .dbias = dbias.data(),
      .rows = kRows,
      .x_stride = kBlocks * kIn,
      .dout_stride = kBlocks * kIn,
      .dtype = DType::kFloat32};
  kernels::blockdiag_glu(params, kHost);
  kernels::blockdiag_glu_backward(params, kHost);
  return {out, dx, dup, ddown, dbias};
}

// A plan of tokens with one to three of six groups, and products by it.
std::vector<Floats> routing() {
  constexpr int64_t kTokens = 500, kGroups = 6, kWidth = 20, kDense = 44, kTile = 128, kTiles = 4;
  constexpr int64_t kRouted = kGroups * kWidth;
  static const std::vector<int64_t> mask = [] {
    std::vector<int64_t> found;
    for (int64_t t = 0; t < kTokens; ++t) found.push_back(1 << t % kGroups | 1 << t * 7 % kGroups | 1 << t / 90);
    return found;
  }();
  std::vector<int32_t> perm(kTiles * kTile), inverse(kTokens), tile_class(kTiles);
  std::vector<int64_t> tile_mask(kTiles);
  kernels::routing_plan({.group_mask = mask.data(),
                         .perm = perm.data(),
                         .inverse = inverse.data(),
                         .tile_mask = tile_mask.data(),
                         .tile_class = tile_class.data(),
                         .tokens = kTokens,
                         .tiles = kTiles,
                         .tile = kTile,
                         .num_groups = kGroups,
                         .num_classes = 1},
                        kHost);
  static const Floats routed = drawn(kTokens * kRouted), dense = drawn(kTokens * kDense), w = drawn(kDense * kRouted);
  static const Floats gates = drawn(kTokens * kGroups);
  Floats gathered(kTokens * kDense), scattered(kTokens * kRouted), dw(kDense * kRouted);
  cpu::RoutedProductParams params{.group_mask = mask.data(),
                                  .perm = perm.data(),
                                  .tile_class = tile_class.data(),
                                  .tokens = kTokens,
                                  .tiles = kTiles,
                                  .tile = kTile,
                                  .num_groups = kGroups,
                                  .num_classes = 1,
                                  .width = kWidth,
                                  .num_out = 1,
                                  .dense_width = kDense,
                                  .w = w.data(),
                                  .gates = gates.data(),
                                  .dtype = DType::kFloat32};
  params.x = routed.data(), params.x_stride = kRouted, params.out = gathered.data();
  params.out_stride = kRouted, params.in_stride = 1;
  kernels::hidden_gather(params, kHost);
  params.x = dense.data(), params.x_stride = kDense, params.out = scattered.data();
  params.out_stride = 1, params.in_stride = kRouted;  // the transpose
  kernels::hidden_scatter(params, kHost);
  params.dot_with = routed.data(), params.dot_stride = kRouted, params.out = dw.data();
  params.w = nullptr;
  kernels::hidden_weight_grad(params, kHost);
  return {Floats(perm.begin(), perm.end()), gathered, scattered, dw};
}

// Windows of 24 tokens, all of whose optional arguments are there: dilated, with channels that are no whole vectors.
std::vector<Floats> window_mix() {
  constexpr int kBatch = 3, kHeight = 24, kWidth = 42, kChannels = 29, kTokens = 24, kRows = kBatch * kHeight * kWidth;
  static const Floats both = drawn(kRows * 2 * kChannels), dout = drawn(kRows * kChannels);  // x and the gate
  static const Floats weight = drawn(kTokens * kTokens), bias = drawn(kTokens);
  static const Floats norm_weight = drawn(kChannels), norm_bias = drawn(kChannels);
  Floats out(kRows * kChannels), mean(kRows), rstd(kRows), dx(kRows * kChannels), dgate(kRows * kChannels);
  Floats dweight(kTokens * kTokens), dbias(kTokens), dnorm_weight(kChannels), dnorm_bias(kChannels);
  WindowMixProblem problem{.x = both.data() + kChannels,
                           .x_stride = 2 * kChannels,
                           .gate = both.data(),
                           .gate_stride = 2 * kChannels,
                           .weight = weight.data(),
                           .bias = bias.data(),
                           .norm_weight = norm_weight.data(),
                           .norm_bias = norm_bias.data(),
                           .mean = mean.data(),
                           .rstd = rstd.data(),
                           .eps = 1e-6f,
                           .dtype = DType::kFloat32,
                           .dilated = true,
                           .batch = kBatch,
                           .height = kHeight,
                           .width = kWidth,
                           .channels = kChannels,
                           .window = {4, 6}};
  problem.derive();
  kernels::window_mix({.problem = problem, .out = out.data()}, kHost);
  kernels::window_mix_backward({.problem = problem,
                                .dout = dout.data(),
                                .dx = dx.data(),
                                .dgate = dgate.data(),
                                .dweight = dweight.data(),
                                .dbias = dbias.data(),
                                .dnorm_weight = dnorm_weight.data(),
                                .dnorm_bias = dnorm_bias.data()},
                               kHost);
  return {out, mean, rstd, dx, dgate, dweight, dbias, dnorm_weight, dnorm_bias};
}

const Case kCases[] = {
    {"bias_gelu", 2, gelu},
    {"layer_norm", 2, layer_norm},
    {"rms_norm", 2, rms_norm},
    {"rms_norm_gelu", 2, rms_norm_gelu},
    {"packing", 2, packing},
    {"attention", 2, [] { return attention(false); }},
    {"causal attention", 2, [] { return attention(true); }},
    {"few queries", 1, few_queries},
    {"windows of 49", 2, [] { return windows(7); }},
    {"windows of 144", 2, [] { return windows(12); }},
    {"monarch", 2, monarch},
    {"short_conv", 2, short_conv},
    {"pool_mixer", 2, pool_mixer},
    {"depthwise_conv2d", 2, depthwise_conv2d},
    {"window_mix", 2, window_mix},
    {"attention_step", 2, attention_step},
    {"disentangled attention", 2, disentangled},
    {"glu", 2, glu},
    {"routing", 6, routing},  // a plan, and three products, of which two pack the weight first
};

}  // namespace

// With the name of a file, the results of one thread go there, too.
int main(int count, char** arguments) {
  std::FILE* const file = count > 1 ? std::fopen(arguments[1], "wb") : nullptr;
  for (const Case& one : kCases) {
    std::vector<Floats> first;
    for (const int64_t threads : {1, 2, 3, 7}) {
      thread_count = threads;
      regions = 0;
      const std::vector<Floats> found = one.call();
      if (regions > one.most_regions) {
        std::printf("%s: %d parallel regions\n", one.name, static_cast<int>(regions));
        return 1;
      }
      if (threads == 1) first = found;
      for (const Floats& result : found) {
        if (threads == 1 && file) std::fwrite(result.data(), sizeof(float), result.size(), file);
      }
      for (size_t i = 0; i < found.size(); ++i) {
        if (std::memcmp(found[i].data(), first[i].data(), found[i].size() * sizeof(float)) != 0) {
          std::printf("%s: result %zu differs on %d threads\n", one.name, i, static_cast<int>(threads));
          return 1;
        }
      }
    }
  }
  if (file) std::fclose(file);
  std::puts("the same bits on 1, 2, 3 and 7 threads");
}
