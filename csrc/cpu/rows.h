// The row-wise and elementwise kernels share this: a row seen as vectors, the last of them cut short, and parameters.
#pragma once

#include "simd.h"
#include "threads.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Elements of an item of work: some 10 microseconds.
constexpr int64_t kItemElements = 32768;
// Rows of a partial sum over rows: the problem alone decides, so that bits do not depend on threads. Sums of float32
// stay short, items are not too small, and the sums of all shares stay in a cache.
constexpr int64_t kFewestShareRows = 64;
constexpr int64_t kMostShares = 256;
constexpr int64_t share_rows(int64_t rows, int64_t cols) {
  const int64_t for_work = ceil_div(kItemElements, larger(1, cols));
  return round_up(larger(kFewestShareRows, larger(for_work, ceil_div(rows, kMostShares))), 4);
}

// A whole vector of a row.
struct AllLanes {
  template <class T>
  WARPFORM_INLINE Vec read(const T* p) const {
    return load(p);
  }
  template <class T>
  WARPFORM_INLINE void write(T* p, Vec v) const {
    store(p, v);
  }
  WARPFORM_INLINE Vec or_zero(Vec v) const { return v; }
};

// The vector at the end of a row, of which n elements are there. What is read past them is 0.
struct FirstLanes {
  int64_t n;
  template <class T>
  WARPFORM_INLINE Vec read(const T* p) const {
    return load_first(p, n);
  }
  template <class T>
  WARPFORM_INLINE void write(T* p, Vec v) const {
    store_first(p, v, n);
  }
  WARPFORM_INLINE Vec or_zero(Vec v) const { return first_lanes(n) ? v : Vec{}; }
};

// Calls f(c, lanes) for every vector of the columns [first, last), c its first column.
template <class F>
WARPFORM_INLINE void each_vector(int64_t first, int64_t last, const F& f) {
  int64_t c = first;
  for (; c + kLanes <= last; c += kLanes) f(c, AllLanes{});
  if (c < last) f(c, FirstLanes{last - c});
}

// Sums over the columns of rows: calls f(c, lanes, sum) for every vector, which adds to the kSums vectors of sum. An
// addition waits for the addition before it, so kChains sums are made side by side. Each of them has some 64 terms,
// which bounds its rounding error. Squares of few bits need that: of the bits that a sum drops theirs are more often small
// than large, so that rounding takes off more than it adds.
template <int kChains, int kSums, class F>
WARPFORM_INLINE void sum_columns(float (&total)[kSums], int64_t cols, const F& f) {
  constexpr int64_t kStep = kChains * kLanes;
  Vec totals[kSums] = {};
  for (int64_t first = 0; first < cols; first += 64 * kStep) {
    const int64_t last = smaller(cols, first + 64 * kStep);
    Vec sum[kChains][kSums] = {};
    int64_t c = first;
    for (; c + kStep <= last; c += kStep) {
#pragma GCC unroll 8
      for (int i = 0; i < kChains; ++i) f(c + i * kLanes, AllLanes{}, sum[i]);
    }
    each_vector(c, last, [&](int64_t at, auto lanes) { f(at, lanes, sum[0]); });
#pragma GCC unroll 8
    for (int k = 0; k < kSums; ++k) {
      Vec of_chains = sum[0][k];
#pragma GCC unroll 8
      for (int i = 1; i < kChains; ++i) of_chains += sum[i][k];
      totals[k] += of_chains;
    }
  }
  for (int k = 0; k < kSums; ++k) total[k] = sum_of_lanes(totals[k]);
}

// Where the mean and the deviation of a row are. The mean is near_mean + correction; taken off one after the other they
// cost no digits.
struct RowMoments {
  float near_mean, correction, rstd;
  WARPFORM_INLINE float mean() const { return near_mean + correction; }
  WARPFORM_INLINE Vec normal(Vec v) const { return (v - near_mean - correction) * rstd; }
};

// Those of a row of floats whose sum is `total`. The sum of the differences from near_mean is what rounding left in it.
// It corrects the mean and the variance, which matters where the mean is large beside the deviation.
WARPFORM_INLINE RowMoments row_moments(const float* row, float total, int64_t cols, float eps) {
  const auto count = static_cast<float>(cols);
  const float near_mean = total / count;
  float moments[2];
  sum_columns<4>(moments, cols, [&](int64_t c, auto lanes, Vec(&part)[2]) __attribute__((always_inline)) {
    const Vec d = lanes.or_zero(lanes.read(row + c) - near_mean);
    part[0] += d;
    part[1] += d * d;
  });
  const float correction = moments[0] / count;
  float variance = moments[1] / count - correction * correction;
  if (variance < 0.f) variance = 0.f;  // and NaN stays NaN
  return {near_mean, correction, 1.f / __builtin_sqrtf(variance + eps)};
}

// 1 / sqrt(squares), and 0 for 0: a row of zeros stays one.
inline float inverse_root(float squares) { return squares == 0.f ? 0.f : 1.f / __builtin_sqrtf(squares); }

// Calls work(row, line) for every row, in threads; `line` is room of the thread for `cols` float32 numbers, rounded up to
// kLanes, or null if it is not asked for.
template <class Work>
void over_rows(const Host& host, int64_t rows, int64_t cols, bool needs_line, const Work& work) {
  const int64_t rows_each = larger(1, kItemElements / cols), wide = round_up(cols, kLanes);
  over(host, ceil_div(rows, rows_each), [&](Items& items) {
    Scratch own(host, Scratch::bytes_of<float>(needs_line ? wide : 0));
    float* const line = needs_line ? own.next<float>(wide) : nullptr;
    for (int64_t item; items.next(item);) {
      for (int64_t r = item * rows_each; r < smaller(rows, (item + 1) * rows_each); ++r) work(r, line);
    }
  });
}

// Goes over shares of rows whose column sums are added up apart: calls several(r, sums) for kAtOnce rows from r on while
// there are as many, and one(r, sums) for the rest of a share. `sums` is the share's own part of `all`, `floats` numbers
// that begin as 0.
template <int kAtOnce, class Several, class One>
void over_shares(const Host& host, int64_t rows, int64_t rows_each, float* all, int64_t floats, const Several& several,
                 const One& one) {
  over(host, ceil_div(rows, rows_each), [&](Items& items) {
    for (int64_t share; items.next(share);) {
      float* const sums = all + share * floats;
      if (floats > 0) std::memset(sums, 0, static_cast<size_t>(floats) * sizeof(float));
      int64_t r = share * rows_each;
      const int64_t last = smaller(rows, r + rows_each);
      for (; r + kAtOnce <= last; r += kAtOnce) several(r, sums);
      for (; r < last; ++r) one(r, sums);
    }
  });
}

// A parameter [cols] as float32, or null: itself, or a copy in `room`, which has place for cols rounded up to kLanes.
inline const float* as_floats(const void* parameter, DType type, int64_t cols, float* room) {
  if (parameter == nullptr || type == DType::kFloat32) return static_cast<const float*>(parameter);
  with_element(type, [&]<class T>(T*) {
    const auto* const from = static_cast<const T*>(parameter);
    for (int64_t c = 0; c < cols; c += kLanes) store(room + c, load_first(from + c, cols - c));
  });
  return room;
}

// to [cols] of `type` = the sums of columns over shares, in order; share i begins at sums + i * stride. Zeros without
// shares.
inline void add_shares(void* to, DType type, const float* sums, int64_t shares, int64_t stride, int64_t cols) {
  with_element(type, [&]<class T>(T*) {
    auto* const out = static_cast<T*>(to);
    for (int64_t c = 0; c < cols; c += kLanes) {
      Vec sum{};
      for (int64_t share = 0; share < shares; ++share) sum += load(sums + share * stride + c);
      store_first(out + c, sum, cols - c);
    }
  });
}

}  // namespace
}  // namespace warpform::cpu::WARPFORM_CPU_ISA
