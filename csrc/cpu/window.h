// Forward and backward of window attention share this: where the tokens of a window lie, copies of their rows, the bias
// of scores and the softmax. Scores are in powers of 2: exp(x) is exp2(x * kLog2e).
//
// Rows of a window are worked on in blocks of queries against all keys of the window, all heads of a window before the
// next window, since the heads of a token lie side by side.
#pragma once

#include <cfloat>
#include <cmath>

#include "gemm.h"
#include "kernels/window/launch.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

constexpr float kLargestLogitScale = 4.605170185988092f;  // ln 100
// A vector that is no longer than this has no direction.
constexpr float kNormFloor = 1e-12f;
constexpr float kMinusInfinity = -HUGE_VALF;

// Rows of this many vectors keep their scores in registers during the softmax: windows of 49 to 64 tokens with AVX-512.
constexpr int kRowVectors = 4;
// Rows of a softmax at a time.
constexpr int kSoftmaxRows = 4;
// Queries of a short window whose scores are made at a time: between them the rows of the next head are asked for, a few
// at a time, since more requests than the CPU can hold open would stop it.
constexpr int64_t kScoreRows = 12;
// Work that an item should have at least, in operations of products: some 20 microseconds.
constexpr int64_t kItemWork = int64_t{1} << 20;
// Items that a call should have if they have that work: enough for machines with many cores.
constexpr int64_t kItems = 64;

struct WindowSizes {
  explicit WindowSizes(const WindowProblem& p) : problem(p) {
    tokens = p.tokens;
    columns = round_up(tokens, kLanes);
    whole = tokens <= kWindowBlock;
    // Rows of a power of two would share few sets of the cache.
    stride = whole ? columns : columns + 16;
    // 48 rows of 1,000 scores fit L2.
    queries = whole ? tokens : larger(12, smaller(48, (int64_t{1} << 16) / columns / 6 * 6));
    score_rows = whole ? kScoreRows : queries;
    depth = p.head_dim;
    wide = round_up(depth, kLanes);
    heads = p.heads;
    windows = p.windows;
    images_windows = p.batch > 0 ? windows / p.batch : 0;
    const float scaled = p.mask_value * kLog2e;
    mask = p.mask_value == kMinusInfinity ? scaled : scaled < -FLT_MAX ? -FLT_MAX : scaled > FLT_MAX ? FLT_MAX : scaled;
  }

  // Of `left` queries of a block those whose scores are made next: no few are left over.
  int64_t scored_at_once(int64_t left) const { return left < score_rows + 6 ? left : score_rows; }

  const WindowProblem& problem;
  bool whole;           // one block of queries holds the window, and no log-sum-exp is kept
  int64_t tokens;       // of a window
  int64_t columns;      // of a row of scores: tokens rounded up to whole vectors
  int64_t stride;       // from one row of scores to the next
  int64_t queries;      // of a block
  int64_t score_rows;   // of a block whose scores are made at a time
  int64_t depth, wide;  // head_dim, and rounded up to whole vectors
  int64_t heads;
  int64_t windows;         // of all images
  int64_t images_windows;  // of one image
  float mask;              // in powers of 2
};

// How the work is cut into items, by the problem alone: shares of consecutive windows, each for some of the heads.
struct WindowItems {
  // `products` of [tokens, tokens, head_dim] a head.
  WindowItems(const WindowSizes& z, int64_t products, int64_t least_windows, int64_t most_shares) {
    const int64_t head_work = 2 * products * z.tokens * z.columns * z.wide + 64 * z.tokens * z.wide + 4096;
    const int64_t work = head_work * z.heads;
    share = larger(larger(least_windows, ceil_div(kItemWork, work)), ceil_div(z.windows, most_shares));
    shares = ceil_div(z.windows, share);
    // Few shares: heads are cut too.
    const int64_t wanted = smaller(ceil_div(kItems, larger(1, shares)), ceil_div(share * work, kItemWork));
    heads_each = ceil_div(z.heads, smaller(z.heads, larger(1, wanted)));
    head_parts = ceil_div(z.heads, heads_each);
  }
  int64_t count() const { return shares * head_parts; }

  int64_t share;  // windows of a share
  int64_t shares;
  int64_t heads_each, head_parts;
};

// Memory of a known layout: `lay(take)` calls take(pointer, count) for each of its arrays.
template <class Layout>
WARPFORM_INLINE int64_t bytes_of_layout(Layout& layout) {
  int64_t bytes = 0;
  layout.lay([&]<class T>(T*&, int64_t count) { bytes += Scratch::bytes_of<T>(count); });
  return bytes;
}
template <class Layout>
WARPFORM_INLINE void place_layout(Layout& layout, Scratch& memory) {
  layout.lay([&]<class T>(T*& pointer, int64_t count) { pointer = memory.next<T>(count); });
}

// The tokens of a window: rows[i] is the token of place i among those of all images, -1 at padding; parts[i] tells the
// side of each seam of the roll that the place lies on. Returns whether the window has a seam.
WARPFORM_INLINE bool locate(const WindowSizes& z, int64_t window, int64_t* rows, float* parts) {
  const WindowProblem& p = z.problem;
  const int64_t image = window / z.images_windows;
  int64_t rest = window % z.images_windows, first[3], seam[3];
  bool any = false;
  for (int axis = 3; axis-- > 0;) {
    const int64_t count = p.count[axis].divisor, at = rest % count;
    rest /= count;
    first[axis] = at * p.window[axis];
    // Only the last window of an axis has places on both sides.
    const bool parted = p.shift[axis] > 0 && at == count - 1;
    seam[axis] = parted ? p.window[axis] - p.shift[axis] : p.window[axis];
    any = any || parted;
  }
  // Where place a along an axis came from, or -1.
  const auto source = [&](int axis, int64_t a) {
    const int64_t padded = static_cast<int64_t>(p.count[axis].divisor) * p.window[axis];
    int64_t from = first[axis] + a + p.shift[axis];
    if (from >= padded) from -= padded;
    return from < p.size[axis] ? from : -1;
  };
  int64_t i = 0;
  for (int64_t a0 = 0; a0 < p.window[0]; ++a0) {
    const int64_t at0 = source(0, a0), part0 = a0 >= seam[0] ? 4 : 0;
    for (int64_t a1 = 0; a1 < p.window[1]; ++a1) {
      const int64_t at1 = source(1, a1), part1 = part0 + (a1 >= seam[1] ? 2 : 0);
      const bool inside = at0 >= 0 && at1 >= 0;
      const int64_t line = image * p.image_tokens + (at0 * p.size[1] + at1) * p.size[2];
      for (int64_t a2 = 0; a2 < p.window[2]; ++a2, ++i) {
        const int64_t at2 = source(2, a2);
        rows[i] = inside && at2 >= 0 ? line + at2 : -1;
        parts[i] = static_cast<float>(part1 + (a2 >= seam[2] ? 1 : 0));
      }
    }
  }
  for (; i < z.columns; ++i) parts[i] = 0;
  return any;
}

// The head that comes next, of this window or of the next one: its rows are asked for while this one is worked on.
struct NextHead {
  const int64_t* rows;  // null: there is none
  int64_t head;
};

// Where the tokens of a window and of the next one lie.
struct Places {
  int64_t* rows[2] = {};
  float* parts[2] = {};
  template <class Take>
  void lay(const WindowSizes& z, const Take& take) {
    for (int i = 0; i < 2; ++i) {
      take(rows[i], z.tokens);
      take(parts[i], z.columns);
    }
  }
};

// Calls work(window, head, rows, parts, next) for the windows [begin, end) and of each the heads [head0, heads). parts is
// null for a window without a seam.
template <class Work>
WARPFORM_INLINE void for_each_head(const WindowSizes& z, const Places& places, int64_t begin, int64_t end,
                                   int64_t head0, int64_t heads, const Work& work) {
  bool seam[2] = {};
  if (begin < end) seam[0] = locate(z, begin, places.rows[0], places.parts[0]);
  for (int64_t w = begin; w < end; ++w) {
    const int64_t now = (w - begin) % 2, then = 1 - now;
    if (w + 1 < end) seam[then] = locate(z, w + 1, places.rows[then], places.parts[then]);
    for (int64_t h = head0; h < heads; ++h) {
      const bool last = h + 1 == heads;
      const int64_t* const next = !last ? places.rows[now] : w + 1 < end ? places.rows[then] : nullptr;
      work(w, h, places.rows[now], seam[now] ? places.parts[now] : nullptr, NextHead{next, last ? head0 : h + 1});
    }
  }
}

// ---- rows of a head ----

// The rows of a window in a tensor [tokens of all images, step]; `absent` is the row of padding, or null: zeros.
template <class T>
struct HeadRows {
  const T* base;
  int64_t step;
  const int64_t* rows;
  const T* absent;
  const T* operator()(int64_t i) const { return rows[i] >= 0 ? base + rows[i] * step : absent; }
};

// q, k or v (part 0, 1 or 2) of a head.
template <class T>
WARPFORM_INLINE HeadRows<T> part_rows(const WindowProblem& p, int part, int64_t head, const int64_t* rows) {
  const int64_t offset = part * p.width + head * p.head_dim;
  const auto* const bias = static_cast<const T*>(p.qkv_bias);
  return {static_cast<const T*>(p.qkv) + offset, 3 * p.width, rows, bias == nullptr ? nullptr : bias + offset};
}

template <class T>
WARPFORM_INLINE void copy_rows(float* to, const WindowSizes& z, const HeadRows<T>& row) {
  for (int64_t i = 0; i < z.tokens; ++i, to += z.wide) {
    const T* const from = row(i);
    if (from == nullptr) {
      for (int64_t d = 0; d < z.wide; d += kLanes) store(to + d, Vec{});
      continue;
    }
    int64_t d = 0;
    for (; d + kLanes <= z.depth; d += kLanes) store(to + d, load(from + d));
    if (d < z.depth) store(to + d, load_first(from + d, z.depth - d));
  }
}

// Asks for the bytes of one row of a head.
template <int kWrite, class T>
WARPFORM_INLINE void prefetch_row(const T* row, int64_t depth) {
  const auto* const from = reinterpret_cast<const char*>(row);
  const int64_t bytes = depth * static_cast<int64_t>(sizeof(T));
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b, kWrite, 2);
}

// Asks for q, k and v of places [first, first + m) of the next head.
template <class T>
WARPFORM_INLINE void prefetch_parts(const NextHead& next, const WindowSizes& z, int64_t first, int64_t m) {
  if (next.rows == nullptr) return;
  const WindowProblem& p = z.problem;
  const T* const base = static_cast<const T*>(p.qkv) + next.head * z.depth;
  for (int64_t i = first; i < first + m; ++i) {
    if (next.rows[i] < 0) continue;
    for (int part = 0; part < 3; ++part) prefetch_row<0>(base + (3 * next.rows[i] + part) * p.width, z.depth);
  }
}

// Rows become unit vectors, or 0 where they have no direction; `inverse` are the inverses of their lengths, or 0.
WARPFORM_INLINE void make_unit(float* x, const WindowSizes& z, float* inverse) {
  for (int64_t i = 0; i < z.tokens; ++i, x += z.wide) {
    Vec squares{};
    for (int64_t d = 0; d < z.wide; d += kLanes) squares += load(x + d) * load(x + d);
    const float length = __builtin_sqrtf(sum_of_lanes(squares));
    // A length that is not a number stays one.
    inverse[i] = length <= kNormFloor ? 0.f : 1.f / length;
    for (int64_t d = 0; d < z.wide; d += kLanes) store(x + d, load(x + d) * inverse[i]);
  }
}

// Row i of a block of m rows [wide] times scale(i) goes to its token in a tensor [tokens, step]; rows of padding are added
// to `padding` [wide] instead, where it is not null.
template <class T, class Scale>
WARPFORM_INLINE void scatter_rows(T* to, int64_t step, const int64_t* rows, const float* from, int64_t m,
                                  const WindowSizes& z, float* padding, const Scale& scale) {
  for (int64_t i = 0; i < m; ++i, from += z.wide) {
    const float factor = scale(i);
    if (rows[i] < 0) {
      if (padding == nullptr) continue;
      for (int64_t d = 0; d < z.wide; d += kLanes) store(padding + d, load(padding + d) + load(from + d) * factor);
      continue;
    }
    T* const row = to + rows[i] * step;
    int64_t d = 0;
    for (; d + kLanes <= z.depth; d += kLanes) store(row + d, load(from + d) * factor);
    if (d < z.depth) store_first(row + d, load(from + d) * factor, z.depth - d);
  }
}

// The factor of each head's products of q and k.
WARPFORM_INLINE void head_factors(const WindowProblem& p, float* factors) {
  for (int64_t h = 0; h < p.heads; ++h) factors[h] = p.scale;
  if (p.logit_scale == nullptr) return;
  with_element(p.logit_scale_dtype, [&](auto* element) {
    const auto* const scales = static_cast<const decltype(element)>(const_cast<void*>(p.logit_scale));
    for (int64_t h = 0; h < p.heads; ++h) {
      const float scale = to_float(scales[h]);
      factors[h] = expf(scale > kLargestLogitScale ? kLargestLogitScale : scale);
    }
  });
}

// ---- bias ----

// The rows of scores' bias. A head's column of the table lies reversed in a line: there the keys of one row of a window,
// a run, have their bias side by side. Rows are made of runs, once for all windows where that is less work and takes little
// memory, else for each block of queries.
class WindowBias {
 public:
  explicit WindowBias(const WindowSizes& z) : z_(z) {
    const WindowProblem& p = z.problem;
    has_table_ = p.table != nullptr;
    line_ = round_up(p.table_entries + kLanes, kLanes);
    kept_ = has_table_ && z.windows >= 4 && z.heads * z.tokens * z.columns <= kMostKept;
  }
  template <class Take>
  void lay(const Take& take) {
    if (has_table_) take(lines_, z_.heads * line_);
    take(rows_, (kept_ ? z_.heads * z_.tokens * z_.columns : z_.columns) + kLanes);
  }
  // Elements of the room that rows() needs.
  int64_t room() const { return has_table_ && !kept_ ? z_.queries * z_.columns + kLanes : 0; }

  void make() {
    const WindowProblem& p = z_.problem;
    if (!has_table_) {
      for (int64_t j = 0; j < z_.columns; ++j) rows_[j] = j < z_.tokens ? 0.f : kMinusInfinity;
      return;
    }
    with_element(p.table_dtype, [&](auto* element) {
      const auto* const table = static_cast<const decltype(element)>(const_cast<void*>(p.table));
      for (int64_t h = 0; h < z_.heads; ++h) {
        float* const line = lines_ + h * line_;
        for (int64_t e = 0; e < p.table_entries; ++e) {
          line[e] = to_float(table[(p.table_entries - 1 - e) * z_.heads + h]) * kLog2e;
        }
        for (int64_t e = p.table_entries; e < line_; ++e) line[e] = 0;
      }
    });
    if (!kept_) return;
    for (int64_t h = 0; h < z_.heads; ++h) fill(rows_ + h * z_.tokens * z_.columns, h, 0, z_.tokens);
  }

  int64_t stride() const { return has_table_ ? z_.columns : 0; }
  // The rows of m queries from `first` on; -inf in columns past the last key.
  const float* rows(int64_t head, int64_t first, int64_t m, float* room) const {
    if (!has_table_) return rows_;
    if (kept_) return rows_ + (head * z_.tokens + first) * z_.columns;
    fill(room, head, first, m);
    return room;
  }

 private:
  static constexpr int64_t kMostKept = int64_t{4} << 20;

  void fill(float* to, int64_t head, int64_t first, int64_t m) const {
    const float* const line = lines_ + head * line_;
    const int64_t run = z_.problem.window[2];
    for (int64_t i = first; i < first + m; ++i, to += z_.columns) {
      // What a run writes past its end the next one overwrites, that of a row's last run the next row.
      for_each_run(z_.problem, i, [&](int64_t j, int64_t at) {
        for (int64_t x = 0; x < run; x += kLanes) store(to + j + x, load_first(line + at + x, line_ - at - x));
      });
      for (int64_t j = z_.tokens; j < z_.columns; ++j) to[j] = kMinusInfinity;
    }
  }

 public:
  // Calls f(key, at) for each run of keys: its first key, and where the run's bias for query i begins in the line.
  template <class F>
  static WARPFORM_INLINE void for_each_run(const WindowProblem& p, int64_t i, const F& f) {
    const int64_t w0 = p.window[0], w1 = p.window[1], w2 = p.window[2];
    const int64_t i2 = i % w2, i1 = i / w2 % w1, i0 = i / w2 / w1;
    int64_t j = 0;
    for (int64_t j0 = 0; j0 < w0; ++j0) {
      for (int64_t j1 = 0; j1 < w1; ++j1, j += w2) {
        const int64_t entry = ((i0 - j0 + w0 - 1) * (2 * w1 - 1) + i1 - j1 + w1 - 1) * (2 * w2 - 1) + i2 + w2 - 1;
        f(j, p.table_entries - 1 - entry);
      }
    }
  }

 private:
  const WindowSizes& z_;
  bool has_table_, kept_;
  int64_t line_;  // elements of a line
  float* lines_ = nullptr;
  float* rows_ = nullptr;
};

// ---- softmax ----

// A softmax adds these to the products of a block of queries, from `first` on.
struct Added {
  Added(const WindowSizes& z, const float* bias_rows, int64_t stride, const float* window_parts, int64_t first,
        float product_factor)
      : factor(product_factor * kLog2e),
        bias(bias_rows),
        bias_stride(stride),
        parts(window_parts),
        own(window_parts == nullptr ? nullptr : window_parts + first),
        mask(z.mask) {}

  float factor;  // of the products, in powers of 2
  const float* bias;
  int64_t bias_stride;
  const float* parts;  // of the keys; null in a window without a seam
  const float* own;    // of the block's queries
  float mask;
};

WARPFORM_INLINE Vec score_of(const float* s, const Added& a, int64_t row, int64_t j) {
  Vec x = load(s + j) * a.factor + load(a.bias + row * a.bias_stride + j);
  if (a.parts != nullptr) x += load(a.parts + j) != a.own[row] ? broadcast(a.mask) : Vec{};
  return x;
}

// Rows of products s become powers of 2 of the scores less their largest; `inverse` gets 1 over their sum, or 0 for a row
// that sees no key, and `lse` the log-sum-exp where it is not null.
template <int kRows, int kVectors>
WARPFORM_INLINE void softmax_rows(float* s, int64_t stride, int64_t columns, const Added& a, int64_t row,
                                  float* inverse, float* lse) {
  Vec top[kRows], sum[kRows];
  float largest[kRows];
  if constexpr (kVectors > 0) {
    Vec x[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) x[r][v] = score_of(s + r * stride, a, row + r, v * kLanes);
      top[r] = x[r][0];
#pragma GCC unroll 8
      for (int v = 1; v < kVectors; ++v) top[r] = max(top[r], x[r][v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float found = largest_lane(top[r]);
      largest[r] = found == kMinusInfinity ? 0.f : found;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        x[r][v] = exp2(x[r][v] - largest[r]);
        store(s + r * stride + v * kLanes, x[r][v]);
      }
      sum[r] = x[r][0];
#pragma GCC unroll 8
      for (int v = 1; v < kVectors; ++v) sum[r] += x[r][v];
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) top[r] = broadcast(kMinusInfinity), sum[r] = Vec{};
    for (int64_t j = 0; j < columns; j += kLanes) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec x = score_of(s + r * stride, a, row + r, j);
        store(s + r * stride + j, x);
        top[r] = max(top[r], x);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float found = largest_lane(top[r]);
      largest[r] = found == kMinusInfinity ? 0.f : found;
    }
    for (int64_t j = 0; j < columns; j += kLanes) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec power = exp2(load(s + r * stride + j) - largest[r]);
        store(s + r * stride + j, power);
        sum[r] += power;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float total = sum_of_lanes(sum[r]);
    inverse[row + r] = total == 0.f ? 0.f : 1.f / total;
    if (lse != nullptr) lse[row + r] = total == 0.f ? kMinusInfinity : largest[r] * kLn2 + logf(total);
  }
}

template <int kVectors>
__attribute__((noinline)) void softmax_block(float* s, int64_t m, int64_t stride, int64_t columns, const Added& a,
                                             float* inverse, float* lse) {
  int64_t i = 0;
  for (; i + kSoftmaxRows <= m; i += kSoftmaxRows) {
    softmax_rows<kSoftmaxRows, kVectors>(s + i * stride, stride, columns, a, i, inverse, lse);
  }
  for (; i < m; ++i) softmax_rows<1, kVectors>(s + i * stride, stride, columns, a, i, inverse, lse);
}

// The softmax of a block of m queries without its normalization.
WARPFORM_INLINE void softmax(float* s, int64_t m, const WindowSizes& z, const Added& a, float* inverse, float* lse) {
  if (kRegisters == 32 && z.columns == kRowVectors * kLanes) {
    softmax_block<kRowVectors>(s, m, z.stride, z.columns, a, inverse, lse);
  } else {
    softmax_block<0>(s, m, z.stride, z.columns, a, inverse, lse);
  }
}

// Scores of m queries q against all keys, kt, and their softmax without its normalization.
WARPFORM_INLINE void probabilities(float* s, int64_t m, const WindowSizes& z, const float* q, const float* kt,
                                   const Added& a, float* inverse, float* lse) {
  times_columns(m, z.tokens, z.depth, s, z.stride, q, z.wide, 1, kt);
  softmax(s, m, z, a, inverse, lse);
}

}  // namespace
}  // namespace warpform::cpu::WARPFORM_CPU_ISA
