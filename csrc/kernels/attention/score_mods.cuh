// The keys that a query sees, and the modification of a score before the softmax.
//
// A score modification is a policy of the kernels, built once per tile and head. It has
//   factor()            the factor that turns its values into exponents of 2
//   gather<side>(row, row_token, col_token), add<side>(scores, row)
//                       add what comes from tables to q.k: gather before the product, add after it. The warp's 16 rows
//                       of the tile begin at `row` and are the tokens from `row_token` on; the 64 columns are the
//                       tokens from `col_token` on
//   with_term(i, j, f)  calls f(term) for scores that begin at query i and key j. Choices that hold for all of them are
//                       made here, outside of the loops
//   shared_bytes(p), prepare(p, shared)
//                       the size of its shared memory, and the function with which all threads fill it
//   Gradient            its backward: takes d loss / d score of every pair (relative_gradient.cuh)
// and a term has
//   term(qk, di, dj, slope)
//                       the value for query i + di and key j + dj from the bare product, and d score /
//                       d (softmax_scale * qk) for the backward; -inf, a masked pair, stays -inf
// A further bias is a further policy and not a further kernel.
#pragma once

#include "attention/launch.h"
#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "device/softmax.cuh"

namespace warpform {

// The queries and the keys of one sequence, aligned at their ends as in FlashAttention: query i is at position
// i + k_length - q_length.
struct Pair {
  int q_length;
  int k_length;
  int q_limit;  // min(length, max_seqlen): tokens past it take no part
  int k_limit;
  int first;  // query i sees keys [i + first, i + last), as far as there are any
  int last;

  // No token's number reaches it (the binding sees to that), and sums of two do not overflow.
  static constexpr int kUnbounded = kMaxTokens;

  __device__ __forceinline__ Pair(const AttentionProblem& p, int q_length_, int k_length_)
      : q_length(q_length_),
        k_length(k_length_),
        q_limit(min(q_length_, p.max_seqlen_q)),
        k_limit(min(k_length_, p.max_seqlen_k)) {
    const int offset = k_length - q_length;
    first = p.window_left < 0 ? -kUnbounded : max(offset - min(p.window_left, kUnbounded), -kUnbounded);
    last = p.window_right < 0 ? kUnbounded : min(offset + min(p.window_right, kUnbounded - 1) + 1, kUnbounded);
  }
};

struct Range {
  int first;
  int last;  // exclusive
};

// Keys that query i sees.
__device__ __forceinline__ Range visible_keys(const Pair& pair, int i) {
  return {min(max(i + pair.first, 0), pair.k_limit), min(max(i + pair.last, 0), pair.k_limit)};
}

// Queries that see key j: the inverse of visible_keys.
__device__ __forceinline__ Range seeing_queries(const Pair& pair, int j) {
  if (j >= pair.k_limit) return {0, 0};
  return {min(max(j - pair.last + 1, 0), pair.q_limit), min(max(j - pair.first + 1, 0), pair.q_limit)};
}

// The side whose tokens are the rows of a warp's tile; the tokens of the other side are its columns.
enum class Side : int { kQueries, kKeys };

// Base of the score modifications that gather nothing from tables.
struct NoTables {
  struct Gradient {
    template <Side kSide, class ScoreMod, int kSteps>
    __device__ __forceinline__ static void add(const ScoreMod&, void*, const uint32_t (&)[kSteps][4], int, int, int) {}
    template <class ScoreMod>
    __device__ __forceinline__ static void finish(const ScoreMod&, void*, int, int) {}
  };
  __host__ __device__ static constexpr int shared_bytes(const AttentionProblem&) { return 0; }
  template <int kThreads>
  __device__ __forceinline__ static void prepare(const AttentionProblem&, uint32_t /*shared*/) {}
  template <Side kSide>
  __device__ __forceinline__ void gather(int, int, int) const {}
  template <Side kSide, int kM, int kN>
  __device__ __forceinline__ void add(float (&)[kM][kN][4], int) const {}
};

// softmax_scale * q.k and nothing else.
struct ScaleOnly : NoTables {
  static constexpr bool kPlain = true;
  static constexpr bool kDqFromKeys = true;  // launches may ask the keys' kernel for dQ

  float exponent;

  template <class AnyPair>
  __device__ __forceinline__ ScaleOnly(const AttentionProblem& p, const AnyPair&, int /*sequence*/, int /*head*/,
                                       int /*first_token*/, uint32_t /*shared*/)
      : exponent(p.softmax_scale * kLog2e) {}
  __device__ __forceinline__ float factor() const { return exponent; }
  template <class F>
  __device__ __forceinline__ void with_term(int, int, F&& f) const {
    f(*this);
  }
  __device__ __forceinline__ float operator()(float qk, int, int, float& slope) const {
    slope = 1.f;
    return qk;
  }
};

// softcap * tanh(x / softcap) if there is a softcap, then ALiBi's -slope * |distance| if there are slopes (Press et
// al., arXiv 2108.12409), chosen at run time: one variant for all of them.
//
// kAnySoftcap: of whatever size. Without it the error of tanh, 2^-22, counts times the softcap, and up to kFewSoftcap
// stays below half an eps of float16; it takes fewer registers.
constexpr float kFewSoftcap = 256.f;

template <bool kAnySoftcap>
struct SoftcapAlibiOf : NoTables {
  static constexpr bool kPlain = false;
  static constexpr bool kDqFromKeys = true;

  const AttentionProblem& p;  // in constant memory: no registers
  float alibi_slope;
  int offset;  // of a query's position from its index

  __device__ __forceinline__ SoftcapAlibiOf(const AttentionProblem& problem, const Pair& pair, int sequence, int head,
                                            int /*first_token*/, uint32_t /*shared*/)
      : p(problem), alibi_slope(0.f), offset(pair.k_length - pair.q_length) {
    if (p.alibi_slopes != nullptr) {
      alibi_slope = load_global(p.alibi_slopes + static_cast<int64_t>(sequence) * p.alibi_batch_stride + head);
    }
  }
  __device__ __forceinline__ float factor() const { return kLog2e; }
  template <class F>
  __device__ __forceinline__ void with_term(int i, int j, F&& f) const {
    const float distance = static_cast<float>(i + offset - j);
    if (p.softcap > 0.f) {
      f(Term<true>{p, alibi_slope, distance});
    } else {
      f(Term<false>{p, alibi_slope, distance});
    }
  }

  template <bool kSoftcap>
  struct Term {
    const AttentionProblem& p;
    float alibi_slope;
    float distance;  // of key j behind query i; that of the others differs by a constant

    __device__ __forceinline__ float operator()(float qk, int di, int dj, float& slope) const {
      float x = qk * p.softmax_scale;
      slope = 1.f;
      if constexpr (kSoftcap) {
        // tanh u = 1 - 2 / (e^2u + 1); both ends saturate as they should. Near 0 that is a difference of numbers close
        // to 1, and a large softcap would multiply its error: up to 1/8 the series, whose next term is 2^-22 of u.
        constexpr float kHalfLn2 = 0.5f * kLn2, kSquare = kHalfLn2 * kHalfLn2;
        const float exponent = x * p.softcap_exponent, square = exponent * exponent;
        float tanh = 1.f - 2.f * reciprocal_approx(exp2_approx(exponent) + 1.f);
        float capped = p.softcap * tanh;
        if (kAnySoftcap && square < 1.f / 64 / kSquare) {
          const float ratio = 1.f + square * (-kSquare / 3 + square * (kSquare * kSquare * 2 / 15));
          tanh = exponent * kHalfLn2 * ratio;
          capped = x * ratio;
        }
        x = qk == negative_infinity() ? qk : capped;
        slope = 1.f - tanh * tanh;
      }
      return x - alibi_slope * fabsf(distance + static_cast<float>(di - dj));
    }
  };
};

using SoftcapAlibi = SoftcapAlibiOf<true>;

}  // namespace warpform
