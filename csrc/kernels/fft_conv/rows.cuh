// Sequences between global and shared memory, two of them as real and imaginary part, and the powers of two by which
// they are scaled.
#pragma once

#include <type_traits>

#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "fft_conv/launch.h"

namespace warpform {

constexpr int kRowChunk = 8;                        // values in 16 bytes
constexpr int kRowSegment = kWarpSize * kRowChunk;  // values of a sequence that a warp moves at a time
constexpr uint32_t kInfinityBits = 0x7f800000u;

__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
__device__ __forceinline__ uint32_t magnitude_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits & 0x7fffffffu;
}

// The lane, but as a number that the compiler knows nothing about: what follows from it is computed, or loaded, where
// it is used, instead of far ahead of it, into registers that there are not.
__device__ __forceinline__ int opaque_lane() { return static_cast<int>(opaque(lane_id())); }

// Rows of kCols 16-bit elements. The 16-byte chunks of a row are permuted so that eight rows at the same column, and
// eight chunks of one row that lie 2 or 4 apart, are in eight different groups of four banks.
template <int kCols>
struct RowTile {
  uint32_t base;

  __device__ __forceinline__ uint32_t chunk(int row, int c) const {
    return base + row * (2 * kCols) + ((c ^ ((c >> 3 ^ row) & 7)) << 4);
  }
  // Address of two elements from an even column on.
  __device__ __forceinline__ uint32_t pair(int row, int col) const {
    return chunk(row, col / kRowChunk) + col % kRowChunk * 2;
  }
};

template <class T>
__device__ __forceinline__ Vec<float, 2> unpack_pair(uint32_t pair) {
  Vec<T, 2> v;
  __builtin_memcpy(&v, &pair, 4);
  return {{to_float(v[0]), to_float(v[1])}};
}
__device__ __forceinline__ Vec<float, 2> unpack_pair(uint32_t pair, bool bfloat16) {
  return bfloat16 ? unpack_pair<bf16_t>(pair) : unpack_pair<half_t>(pair);
}
__device__ __forceinline__ uint32_t pack_pair(float lo, float hi, bool bfloat16) {
  return bfloat16 ? pack2<bf16_t>(lo, hi) : pack2<half_t>(lo, hi);
}

// Eight 16-bit values of a sequence, as they lie in memory.
using RowValues = Vec<uint32_t, 4>;

// Values [col, col + 8) of the sequence that begins at element `row` of data; zeros from `length` on. Where sequences
// are no multiples of 16 bytes, value by value; not if that is known of them.
template <bool kMultiples = false>
__device__ __forceinline__ RowValues load_row(const void* data, int64_t row, int col, int length) {
  RowValues v = {{0, 0, 0, 0}};
  const uint16_t* from = static_cast<const uint16_t*>(data) + row + col;
  if (kMultiples || length % kRowChunk == 0) {
    if (col < length) v = load_global(reinterpret_cast<const RowValues*>(from));
  } else {
#pragma unroll
    for (int i = 0; i < kRowChunk; ++i) {
      if (col + i < length) v[i / 2] |= uint32_t{load_global(from + i)} << (i % 2 * 16);
    }
  }
  return v;
}

__device__ __forceinline__ void store_row(void* data, int64_t row, int col, int length, const RowValues& v) {
  uint16_t* to = static_cast<uint16_t*>(data) + row + col;
  if (length % kRowChunk == 0) {
    if (col < length) store_global(reinterpret_cast<RowValues*>(to), v);
  } else {
#pragma unroll
    for (int i = 0; i < kRowChunk; ++i) {
      if (col + i < length) store_global(to + i, static_cast<uint16_t>(v[i / 2] >> (i % 2 * 16)));
    }
  }
}

// The sequences that a CTA works on in one step: `slots` pairs of one channel, sequence 2 slot + q of the step.
template <class Plan>
struct RowWalk {
  static constexpr FftPlan kPlan = Plan::kPlan;
  static constexpr int kSegments = kPlan.points / kRowSegment;  // of a sequence
  static constexpr int kWarpsPerRow = kSegments < kPlan.warps ? kSegments : kPlan.warps;
  static constexpr int kRowsAtOnce = kPlan.warps / kWarpsPerRow;
  static constexpr int kSteps = kSegments / kWarpsPerRow;
  static_assert(kPlan.warps % kWarpsPerRow == 0 && kSegments % kWarpsPerRow == 0, "every warp has the same share");
  static_assert(2 * kPlan.slots % kRowsAtOnce == 0, "every warp has the same share");

  // f(sequence) for each of this warp's; f gets a column of each segment by column(step).
  template <class F>
  __device__ __forceinline__ static void for_each(F&& f) {
#pragma unroll 1
    for (int row = warp_id() / kWarpsPerRow; row < 2 * kPlan.slots; row += kRowsAtOnce) f(row);
  }
  __device__ __forceinline__ static int column(int step) {
    const int thread = static_cast<int>(opaque(threadIdx.x % (kWarpsPerRow * kWarpSize)));
    return step * kWarpsPerRow * kRowSegment + thread * kRowChunk;
  }
  // Shared address of the 8 values at `col` of a sequence: sequence q of a pair begins at row q outer.
  __device__ __forceinline__ static uint32_t address(uint32_t base, int row, int col) {
    const RowTile<kPlan.inner> tile{base + row / 2 * kPlan.slot_bytes()};
    return tile.chunk(row % 2 * kPlan.outer + col / kPlan.inner, col % kPlan.inner / kRowChunk);
  }
};

// Bytes of the largest magnitudes, one from each warp for each sequence of a step.
template <class Plan>
__host__ __device__ constexpr int magnitude_bytes() {
  return 2 * Plan::kPlan.slots * RowWalk<Plan>::kWarpsPerRow * 4;
}

// The power of two that brings a sequence's largest value, by its bits, to just below 2^target; 0 for a sequence of
// zeros. Not above 2^largest. One that is not finite counts as zeros too; `inverse` is NaN then.
struct RowScale {
  float scale;
  float inverse;
};
__device__ __forceinline__ RowScale row_scale(uint32_t largest_bits, int target, int limit) {
  if (largest_bits >= kInfinityBits) return {0, float_of_bits(0x7fc00000u)};
  const int exponent = static_cast<int>(largest_bits >> 23);
  if (exponent == 0) return {0, 0};
  const int scale = min(253 + target - exponent, 127 + limit);
  return {float_of_bits(static_cast<uint32_t>(scale) << 23), float_of_bits(static_cast<uint32_t>(254 - scale) << 23)};
}

// After a barrier behind load_rows.
template <class Plan>
__device__ __forceinline__ uint32_t largest_magnitude(uint32_t magnitudes, int row) {
  constexpr int kParts = RowWalk<Plan>::kWarpsPerRow;
  uint32_t most = 0;
#pragma unroll
  for (int w = 0; w < kParts; ++w) most = max(most, load_shared<uint32_t>(magnitudes + (row * kParts + w) * 4));
  return most;
}

// Element at which sequence `row` of a step begins; -1 if there is none. `pair` is the step's first.
__device__ __forceinline__ int64_t row_begin(const FftConvProblem& p, int channel, int pair, int row) {
  const int sequence = 2 * pair + row;
  return sequence < p.batch ? (int64_t{sequence} * p.channels + channel) * p.length : -1;
}

// v = gate u of the sequences of a step to shared memory, in 16 bits as they are, zeros where there is nothing; and
// the largest magnitude that each warp met.
template <class Plan>
__device__ __forceinline__ void load_rows(const FftConvProblem& p, const void* u, const void* gate, uint32_t base,
                                          uint32_t magnitudes, int channel, int pair) {
  using Walk = RowWalk<Plan>;
  Walk::for_each([&](int row) {
    const int64_t begin = row_begin(p, channel, pair, row);
    uint32_t most = 0;
    const auto load = [&]<int kAhead, bool kGate>(std::integral_constant<int, kAhead>, std::bool_constant<kGate>) {
#pragma unroll 1
      for (int step = 0; step < Walk::kSteps; step += kAhead) {
        RowValues v[kAhead], g[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int col = Walk::column(step + i);
          v[i] = load_row<(kAhead > 1)>(u, begin, col, p.length);
          if constexpr (kGate) g[i] = load_row<(kAhead > 1)>(gate, begin, col, p.length);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            Vec<float, 2> x = unpack_pair(v[i][j], p.bfloat16);
            if constexpr (kGate) {
              const Vec<float, 2> y = unpack_pair(g[i][j], p.bfloat16);
              v[i][j] = pack_pair(x[0] * y[0], x[1] * y[1], p.bfloat16);
              x = unpack_pair(v[i][j], p.bfloat16);
            }
            most = max(most, max(magnitude_bits(x[0]), magnitude_bits(x[1])));
          }
          store_shared(Walk::address(base, row, Walk::column(step + i)), v[i]);
        }
      }
    };
    // Loads in flight at a time; one where values come one by one.
    constexpr int kAhead = Walk::kSteps < 4 ? Walk::kSteps : 4;
    constexpr std::integral_constant<int, 1> kOne;
    if (begin < 0) {
#pragma unroll 1
      for (int step = 0; step < Walk::kSteps; ++step) {
        store_shared(Walk::address(base, row, Walk::column(step)), RowValues{{0, 0, 0, 0}});
      }
    } else if (p.length % kRowChunk != 0) {
      gate != nullptr ? load(kOne, std::true_type{}) : load(kOne, std::false_type{});
    } else if (gate != nullptr) {
      load(std::integral_constant<int, (kAhead > 2 ? 2 : kAhead)>{}, std::true_type{});
    } else {
      load(std::integral_constant<int, kAhead>{}, std::false_type{});
    }
    most = warp_reduce(most, Max{});
    if (opaque_lane() == 0) {
      store_shared(magnitudes + (row * Walk::kWarpsPerRow + warp_id() % Walk::kWarpsPerRow) * 4, most);
    }
  });
}

}  // namespace warpform
