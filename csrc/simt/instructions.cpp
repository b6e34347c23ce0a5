// One small kernel for each emulated instruction, and the op that runs them: what the emulator computes is compared
// with plain PyTorch by its tests. The operands are laid out here from the documentation of mma and ldmatrix, not from
// the emulator.
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>
#include <vector>

#include "device/accumulate.cuh"
#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "torch/launch.h"

namespace warpform {
namespace {

struct InstructionParams {
  const void* a;
  const void* b;
  void* out;
  int64_t n;  // elements of a
};

template <class T>
T at(const void* p, int64_t i) {
  return load_global(static_cast<const T*>(p) + i);
}
template <class T>
void put(void* p, int64_t i, T v) {
  store_global(static_cast<T*>(p) + i, v);
}

// ---- products: out [16, 8] float32 = 1 + a [16, K] b [K, 8] ----

template <class T>
uint32_t two(T lo, T hi) {
  uint16_t l, h;
  __builtin_memcpy(&l, &lo, 2);
  __builtin_memcpy(&h, &hi, 2);
  return uint32_t{l} | uint32_t{h} << 16;
}

void put_accumulator(void* out, const float (&d)[4]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  put(out, g * 8 + 2 * t, d[0]);
  put(out, g * 8 + 2 * t + 1, d[1]);
  put(out, (g + 8) * 8 + 2 * t, d[2]);
  put(out, (g + 8) * 8 + 2 * t + 1, d[3]);
}

template <class T>
__global__ void mma_16bit(const __grid_constant__ InstructionParams p) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const auto a = [&](int row, int col) { return two(at<T>(p.a, row * 16 + col), at<T>(p.a, row * 16 + col + 1)); };
  const auto b = [&](int row, int col) { return two(at<T>(p.b, row * 8 + col), at<T>(p.b, (row + 1) * 8 + col)); };
  const uint32_t fragment[4] = {a(g, 2 * t), a(g + 8, 2 * t), a(g, 2 * t + 8), a(g + 8, 2 * t + 8)};
  float d[4] = {1, 1, 1, 1};
  mma_m16n8k16<T>(d, fragment, b(2 * t, g), b(2 * t + 8, g));
  put_accumulator(p.out, d);
}

__global__ void mma_tf32(const __grid_constant__ InstructionParams p) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const auto a = [&](int row, int col) { return at<uint32_t>(p.a, row * 8 + col); };
  const auto b = [&](int row, int col) { return at<uint32_t>(p.b, row * 8 + col); };
  const uint32_t fragment[4] = {a(g, t), a(g + 8, t), a(g, t + 4), a(g + 8, t + 4)};
  float d[4] = {1, 1, 1, 1};
  mma_m16n8k8_tf32(d, fragment, b(t, g), b(t + 4, g));
  put_accumulator(p.out, d);
}

// ---- ldmatrix: a int16 [4, 8, 8] -> out int16 [32, 4, 2], the registers of each lane ----

template <bool kTransposed>
__global__ void ldmatrix(const __grid_constant__ InstructionParams p) {
  const int lane = lane_id();
  const auto row = load_global(static_cast<const uint4*>(p.a) + lane);
  // Rows in an order of their own, so that addresses matter.
  const uint32_t address = shared_base() + static_cast<uint32_t>(lane * 7 % 32) * 16;
  store_shared(address, row);
  warp_sync();
  uint32_t r[4];
  if constexpr (kTransposed) {
    ldmatrix_x4_trans(r, address);
  } else {
    ldmatrix_x4(r, address);
  }
  for (int i = 0; i < 4; ++i) put(p.out, lane * 4 + i, r[i]);
}

// ---- lanes: a float32 [n], b int32 [1] -> out float32 [n] ----

struct Xor {
  static float run(float v, int n) { return shuffle_xor(v, n); }
};
struct Up {
  static float run(float v, int n) { return shuffle_up(v, n); }
};
struct Down {
  static float run(float v, int n) { return shuffle_down(v, n); }
};
struct From {
  static float run(float v, int n) { return shuffle(v, n); }
};
struct WarpSum {
  static float run(float v, int) { return warp_reduce(v, Sum{}); }
};
struct BlockSum {
  static float run(float v, int) { return block_reduce<128>(v, Sum{}, shared_base()); }
};
struct BlockMax {
  static float run(float v, int) { return block_reduce<128>(v, Max{}, shared_base()); }
};
struct Exp2 {
  static float run(float v, int) { return exp2_approx(v); }
};
struct Log2 {
  static float run(float v, int) { return log2_approx(v); }
};
struct Reciprocal {
  static float run(float v, int) { return reciprocal_approx(v); }
};
struct Rsqrt {
  static float run(float v, int) { return rsqrt_approx(v); }
};
// Many collectives one after another, so that fast lanes run ahead of slow ones.
struct Chain {
  static float run(float v, int n) {
    for (int i = 0; i < n; ++i) v = shuffle_xor(v, 1 << i % 5) + static_cast<float>(popcount(ballot(v > 0)));
    return v;
  }
};
template <class Function>
__global__ void map_lanes(const __grid_constant__ InstructionParams p) {
  put(p.out, threadIdx.x, Function::run(at<float>(p.a, threadIdx.x), at<int32_t>(p.b, 0)));
}

// a int32 [n] -> out int32 [n]: the votes of each lane's warp
__global__ void votes(const __grid_constant__ InstructionParams p) {
  put(p.out, threadIdx.x, ballot(at<int32_t>(p.a, threadIdx.x) != 0));
}

// ---- barriers and copies: a float32 [n] -> out float32 [n] ----

// Warp 0 produces, warps 1 to 3 consume, two buffers of 96 values: full[i] and empty[i] are named barriers.
__global__ void producer_consumer(const __grid_constant__ InstructionParams p) {
  constexpr int kTile = 96, kThreads = 128;
  const int tiles = static_cast<int>(p.n) / kTile;
  const auto slot = [](int buffer, int i) { return shared_base() + static_cast<uint32_t>(buffer * kTile + i) * 4; };
  for (int tile = 0; tile < tiles; ++tile) {
    const int buffer = tile % 2;
    const int full = 1 + buffer, empty = 3 + buffer;
    if (warp_id() == 0) {
      if (tile >= 2) named_barrier_sync(empty, kThreads);
      for (int i = lane_id(); i < kTile; i += kWarpSize)
        store_shared(slot(buffer, i), at<float>(p.a, tile * kTile + i));
      named_barrier_arrive(full, kThreads);
    } else {
      named_barrier_sync(full, kThreads);
      const int i = static_cast<int>(threadIdx.x) - kWarpSize;
      put(p.out, tile * kTile + i, 2 * load_shared<float>(slot(buffer, kTile - 1 - i)));
      if (tile + 2 < tiles) named_barrier_arrive(empty, kThreads);
    }
  }
}

// Three stages of 512 values; the tail is filled with zeros, which the sum of each stage counts.
__global__ void copy_pipeline(const __grid_constant__ InstructionParams p) {
  constexpr int kThreads = 128, kStages = 3, kTile = kThreads * 4;
  const int t = static_cast<int>(threadIdx.x);
  const int tiles = static_cast<int>((p.n + kTile - 1) / kTile);
  const auto slot = [](int stage, int i) { return shared_base() + static_cast<uint32_t>(stage * kTile + i) * 4; };
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      const int64_t i = int64_t{tile} * kTile + t * 4;
      cp_async_16(slot(tile % kStages, t * 4), static_cast<const float*>(p.a) + (i < p.n ? i : 0), i < p.n);
    }
    cp_async_commit();
  };
  fetch(0);
  fetch(1);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<1>();
    block_sync();
    fetch(tile + 2);
    for (int i = t; i < kTile; i += kThreads) {
      const float v = load_shared<float>(slot(tile % kStages, kTile - 1 - i));
      if (tile * kTile + i < p.n) put(p.out, tile * kTile + i, v);
    }
  }
}

// out[0] = sum of a, out[1] = the number of threads, each by atomics
__global__ void atomics(const __grid_constant__ InstructionParams p) {
  float* out = static_cast<float*>(p.out);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    store_global(out, 0.0f);
    store_global(reinterpret_cast<int*>(out) + 1, 0);
  }
}
__global__ void atomics_add(const __grid_constant__ InstructionParams p) {
  float* out = static_cast<float*>(p.out);
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < p.n) atomic_add_global(out, at<float>(p.a, i));
  atomic_add_global(reinterpret_cast<int*>(out) + 1, 1);
}

// out [18, 24] = 1, + what a warp with the accumulators a [16, 16] adds, times 2, from row 1, column 2 on; b: rows and
// columns that it may reach
__global__ void ones(const __grid_constant__ InstructionParams p) {
  for (int i = static_cast<int>(threadIdx.x); i < 18 * 24; i += 32) put(p.out, i, 1.0f);
}
template <bool kPaired>
__global__ void add_accumulators(const __grid_constant__ InstructionParams p) {
  float acc[2][4];
  for_each_accumulator<1, 2>([&](int, int n, int e) {
    acc[n][e] = at<float>(p.a, (lane_id() / 4 + e / 2 * 8) * 16 + 8 * n + lane_id() % 4 * 2 + e % 2);
  });
  add_accumulators_global<kPaired>(static_cast<float*>(p.out) + 24 + 2, 24, at<int32_t>(p.b, 0), at<int32_t>(p.b, 1),
                                   acc, 2.0f);
}

// out int32 [blocks * threads]: the order in which threads came, to see that the seed decides it; a counts the arrivals
__global__ void order(const __grid_constant__ InstructionParams p) {
  int* counter = static_cast<int*>(p.out);
  put(p.out, 1 + int64_t{blockIdx.x} * blockDim.x + threadIdx.x, atomic_add_global(counter, 1));
}

// Threads that have ended count as come to the block's barrier, and what they stored is seen after it.
__global__ void exit_before_barrier(const __grid_constant__ InstructionParams p) {
  const int t = static_cast<int>(threadIdx.x);
  store_shared(shared_base() + static_cast<uint32_t>(t) * 4, at<float>(p.a, t));
  put(p.out, t, -1.0f);
  if (t >= 50) return;
  block_sync();
  put(p.out, t, load_shared<float>(shared_base() + static_cast<uint32_t>(127 - t) * 4));
}

// Neighbours store the two halves of a word, which is no race.
__global__ void half_words(const __grid_constant__ InstructionParams p) {
  const int t = static_cast<int>(threadIdx.x);
  store_shared(shared_base() + static_cast<uint32_t>(t) * 2, at<uint16_t>(p.a, t));
  block_sync();
  put(p.out, t, load_shared<uint32_t>(shared_base() + static_cast<uint32_t>(t / 2) * 4));
}

// `n` times: all lanes of one warp do it together; what the emulator's time goes into.
template <int kWhat>
__global__ void repeat(const __grid_constant__ InstructionParams p) {
  const int n = at<int32_t>(p.b, 0);
  uint32_t r[4] = {1, 2, 3, 4};
  float d[4] = {0, 0, 0, 0};
  const uint32_t address = shared_base() + threadIdx.x * 16;
  store_shared(address, Vec<uint32_t, 4>{{0, 0, 0, 0}});
  block_sync();
  for (int i = 0; i < n; ++i) {
    if constexpr (kWhat == 0) block_sync();
    if constexpr (kWhat == 1) r[0] = shuffle_xor(r[0], 1);
    if constexpr (kWhat == 2) ldmatrix_x4(r, address);
    if constexpr (kWhat == 3) mma_m16n8k16<half_t>(d, r, r[0], r[1]);
    if constexpr (kWhat == 4) mma_m16n8k16<bf16_t>(d, r, r[0], r[1]);
    if constexpr (kWhat == 5) r[0] += load_shared<uint32_t>(address);
    if constexpr (kWhat == 6) store_shared(address, r[0]);
    if constexpr (kWhat == 7) r[0] += at<uint32_t>(p.b, 0);
    if constexpr (kWhat == 8) {
      cp_async_16(address, p.a);
      cp_async_commit();
      cp_async_wait<0>();
    }
    if constexpr (kWhat == 9) ldmatrix_x4_trans(r, address);
  }
  put(p.out, threadIdx.x, static_cast<float>(r[0]) + d[0]);
}

struct Instruction {
  void (*run)(const InstructionParams& p);
  std::vector<int64_t> (*shape)(const Tensor& a);
  ScalarType dtype;
};
std::vector<int64_t> accumulator(const Tensor&) { return {16, 8}; }
std::vector<int64_t> registers(const Tensor&) { return {32, 4, 2}; }
std::vector<int64_t> as_a(const Tensor& a) { return {a.numel()}; }
std::vector<int64_t> two_values(const Tensor&) { return {2}; }
std::vector<int64_t> sums(const Tensor&) { return {18, 24}; }
std::vector<int64_t> arrivals(const Tensor&) { return {1 + 8 * 64}; }

constexpr int kSharedBytes = 3 * 128 * 16;
template <auto kKernel, int kThreads, int kBlocks = 1>
void run(const InstructionParams& p) {
  launch<kKernel>("instruction", dim3(kBlocks), kThreads, kSharedBytes, nullptr, p);
}
void run_atomics(const InstructionParams& p) {
  run<atomics, 32>(p);
  run<atomics_add, 64, 8>(p);
}
void run_order(const InstructionParams& p) {
  *static_cast<int*>(p.out) = 0;
  run<order, 64, 8>(p);
}
template <bool kPaired>
void run_add_accumulators(const InstructionParams& p) {
  run<ones, 32>(p);
  run<add_accumulators<kPaired>, 32, 3>(p);
}
template <class Function>
constexpr Instruction lanes() {
  return {run<map_lanes<Function>, 128>, as_a, ScalarType::Float};
}
template <int kWhat>
constexpr Instruction repeated() {
  return {run<repeat<kWhat>, 128>, as_a, ScalarType::Float};
}

const std::map<std::string, Instruction> kInstructions = {
    {"mma_half", {run<mma_16bit<half_t>, 32>, accumulator, ScalarType::Float}},
    {"mma_bfloat16", {run<mma_16bit<bf16_t>, 32>, accumulator, ScalarType::Float}},
    {"mma_tf32", {run<mma_tf32, 32>, accumulator, ScalarType::Float}},
    {"ldmatrix", {run<ldmatrix<false>, 32>, registers, ScalarType::Short}},
    {"ldmatrix_trans", {run<ldmatrix<true>, 32>, registers, ScalarType::Short}},
    {"shuffle_xor", lanes<Xor>()},
    {"shuffle_up", lanes<Up>()},
    {"shuffle_down", lanes<Down>()},
    {"shuffle", lanes<From>()},
    {"warp_sum", lanes<WarpSum>()},
    {"block_sum", lanes<BlockSum>()},
    {"block_max", lanes<BlockMax>()},
    {"exp2", lanes<Exp2>()},
    {"log2", lanes<Log2>()},
    {"reciprocal", lanes<Reciprocal>()},
    {"rsqrt", lanes<Rsqrt>()},
    {"chain", lanes<Chain>()},
    {"ballot", {run<votes, 128>, as_a, ScalarType::Int}},
    {"producer_consumer", {run<producer_consumer, 128>, as_a, ScalarType::Float}},
    {"copy_pipeline", {run<copy_pipeline, 128>, as_a, ScalarType::Float}},
    {"atomics", {run_atomics, two_values, ScalarType::Float}},
    {"add_accumulators", {run_add_accumulators<false>, sums, ScalarType::Float}},
    {"add_accumulators_paired", {run_add_accumulators<true>, sums, ScalarType::Float}},
    {"order", {run_order, arrivals, ScalarType::Int}},
    {"exit_before_barrier", {run<exit_before_barrier, 128>, as_a, ScalarType::Float}},
    {"half_words", {run<half_words, 128>, as_a, ScalarType::Int}},
    {"repeat_block_sync", repeated<0>()},
    {"repeat_shuffle", repeated<1>()},
    {"repeat_ldmatrix", repeated<2>()},
    {"repeat_mma_half", repeated<3>()},
    {"repeat_mma_bfloat16", repeated<4>()},
    {"repeat_load_shared", repeated<5>()},
    {"repeat_store_shared", repeated<6>()},
    {"repeat_load_global", repeated<7>()},
    {"repeat_cp_async", repeated<8>()},
    {"repeat_ldmatrix_trans", repeated<9>()},
};

torch::stable::Tensor instruction(std::string name, torch::stable::Tensor a_, torch::stable::Tensor b_) {
  const Tensor a(a_), b(b_);
  const auto found = kInstructions.find(name);
  check(found != kInstructions.end(), "_instruction: none is called ", name);
  check(a.is_contiguous() && b.is_contiguous(), "_instruction: a and b must be contiguous");
  Tensor out = empty("_instruction", found->second.shape(a), found->second.dtype, a);
  const Launch launch("_instruction", a);
  found->second.run({launch.in(a), launch.in(b), launch.out(out), a.numel()});
  return out.as_torch();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(warpform_simt, m) {
  // Runs one emulated instruction, or a small kernel around it, by name.
  m.def("_instruction(str name, Tensor a, Tensor b) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(warpform_simt, CompositeExplicitAutograd, m) {
  m.impl("_instruction", TORCH_BOX(&instruction));
}

}  // namespace warpform
