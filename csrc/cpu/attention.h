// The blocks of attention that its kernels share: q, k and v packed as float32, scores of a block of queries against a
// block of keys, their mask, the softmax that goes on from block to block (Dao, arXiv 2307.08691), and the gradients.
//
// One item of work is a sequence, a key head and the query heads that read it: k and v are packed once for all of them.
// 48 queries meet 256 keys at a time. Keys become columns in panels for q k^T, and rows in panels for P v; a panel is
// contiguous, so that it stays in L1 whatever head_dim is. Rows of scores are 16 elements apart from a multiple of 256: they
// would share cache sets. 16-bit elements are widened where they are packed.
//
// What differs between kernels comes as function objects: which keys a query sees, what is added to a score, where results
// go. Probabilities are powers of 2; the scale of a score is a factor of its exponent, since products of 16-bit elements
// lose no digits as long as q is not scaled.
#pragma once

#include "gemm.h"
#include "kernels/attention/launch.h"
#include "simd.h"
#include "threads.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

constexpr int64_t kQueryBlock = 48;
constexpr int64_t kKeyBlock = 256;
constexpr int64_t kScoreStride = kKeyBlock + 16;
constexpr float kMinusInfinity = -__builtin_inff();

// ---- packing ----

// The rows of one head: `dim` elements, with zeros up to `padded`, whole vectors; packed in panels of `panel` columns.
struct HeadDim {
  int64_t dim, padded, panel;
  explicit HeadDim(int64_t head_dim)
      : dim(head_dim), padded(round_up(head_dim, kLanes)), panel(smaller(padded, kPanel)) {}
  int64_t panels() const { return ceil_div(padded, panel); }
};

// Rows of one head of one sequence.
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

// Reads of strided rows wait for memory, so each asks for the same part of the next head's row, which is what the next item
// reads.
template <class T>
WARPFORM_INLINE void prefetch_next_head(const T* p, const HeadDim& head) {
  __builtin_prefetch(p + head.dim);
}

// to [rows][padded] = factor * rows, zeros in the columns from dim on.
template <class T>
WARPFORM_INLINE void pack_rows(float* to, const HeadRows<T>& from, int64_t rows, const HeadDim& head, float factor) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* const row = from.row(i);
    float* const at = to + i * head.padded;
    int64_t d = 0;
    for (; d + kLanes <= head.dim; d += kLanes) {
      prefetch_next_head(row + d, head);
      store(at + d, load(row + d) * factor);
    }
    if (d < head.dim) store(at + d, load_first(row + d, head.dim - d) * factor);
  }
}

// to [panels][rows][panel].
template <class T>
WARPFORM_INLINE void pack_row_panels(float* to, const HeadRows<T>& from, int64_t rows, const HeadDim& head) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* const row = from.row(i);
    for (int64_t begin = 0; begin < head.padded; begin += head.panel) {
      float* const at = to + begin * rows + i * head.panel;
      const int64_t width = smaller(head.panel, head.padded - begin);
      for (int64_t d = 0; d < width; d += kLanes) {
        prefetch_next_head(row + begin + d, head);
        const int64_t left = head.dim - begin - d;
        store(at + d, left >= kLanes ? load(row + begin + d) : load_first(row + begin + d, left));
      }
    }
  }
}
WARPFORM_INLINE int64_t row_panels(int64_t rows, const HeadDim& head) { return rows * head.panels() * head.panel; }

template <class T>
WARPFORM_INLINE void pack_key_columns(float* to, const HeadRows<T>& from, int64_t rows, const HeadDim& head) {
  pack_columns<T>(to, rows, head.dim, [&](int64_t i) { return from.row(i); }, head.dim);
}

// C [m, padded] (+)= A [m, depth] times rows [first, first + depth) of packed panels of `rows` rows.
template <Into kInto>
WARPFORM_INLINE void times_row_panels(int64_t m, int64_t depth, float* c, const float* a, int64_t a_row,
                                      int64_t a_column, const float* panels, int64_t rows, int64_t first,
                                      const HeadDim& head, const float* scale = nullptr) {
  for (int64_t d = 0; d < head.padded; d += head.panel) {
    times_rows<kInto>(m, smaller(head.panel, head.padded - d), depth, c + d, head.padded, a, a_row, a_column,
                      panels + d * rows + first * head.panel, head.panel, scale);
  }
}

// ---- scores ----

// softmax_scale: q is packed times `sign` (-1, 0 or 1), and scores times `exponent`, positive, are exponents of 2.
struct ScoreScale {
  float sign, size;  // of softmax_scale; size 1 where that is 0
  float exponent;
  explicit ScoreScale(float softmax_scale)
      : sign(softmax_scale > 0.f   ? 1.f
             : softmax_scale < 0.f ? -1.f
                                   : 0.f),
        size(softmax_scale > 0.f   ? softmax_scale
             : softmax_scale < 0.f ? -softmax_scale
                                   : 1.f),
        exponent(size * kLog2e) {}
};

// The keys [first, last) that each query of a block sees; neither bound falls from row to row.
struct SeenKeys {
  int32_t first[kQueryBlock];
  int32_t last[kQueryBlock];
};

// Scores of a row of `width` keys, whole vectors: -inf but for [first, last).
WARPFORM_INLINE void mask_row(float* row, int64_t width, int64_t first, int64_t last) {
  const Vec minus_infinity = broadcast(kMinusInfinity);
  first = smaller(larger(first, 0), width), last = smaller(larger(last, 0), width);
  for (int64_t j = 0; j < first; j += kLanes) {
    const IntVec keys = lane_numbers() + static_cast<int32_t>(j);
    store(row + j, keys >= static_cast<int32_t>(first) ? load(row + j) : minus_infinity);
  }
  for (int64_t j = last / kLanes * kLanes; j < width; j += kLanes) {
    const IntVec keys = lane_numbers() + static_cast<int32_t>(j);
    store(row + j, keys < static_cast<int32_t>(last) ? load(row + j) : minus_infinity);
  }
}

// Masks the scores of `rows` queries against the keys from j on.
WARPFORM_INLINE void mask_scores(float* scores, int64_t rows, int64_t j, int64_t keys, const SeenKeys& seen,
                                 int64_t row) {
  const int64_t width = round_up(keys, kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = seen.first[row + r] - j, last = seen.last[row + r] - j;
    if (first > 0 || last < width) mask_row(scores + r * kScoreStride, width, first, last);
  }
}

// 2^y - 1 for y <= 0, within 2 ulp: 1 is not added, which would hide small values.
WARPFORM_INLINE Vec exp2_minus_1(Vec y) {
  const PowerOf2 found = power_of_2(y);
  return (found.power - 1.f) + found.power * found.fraction;
}

// log(x) for x > 0 within 2 ulp; -inf for 0, NaN for NaN. x is split into a power of 2 and a rest f in [sqrt(1/2), sqrt(2)),
// whose logarithm is 2 artanh((f - 1) / (f + 1)).
WARPFORM_INLINE Vec log(Vec x) {
  const IntVec offset = (IntVec)((UintVec)x - 0x3f3504f3u);  // sqrt(1/2); unsigned, as any bits may come
  const IntVec exponent = offset >> 23;
  const Vec f = as_float((offset & 0x7fffff) + 0x3f3504f3);
  const Vec t = (f - 1.f) / (f + 1.f), square = t * t;
  Vec p = broadcast(1.f / 9);
  p = p * square + 1.f / 7;
  p = p * square + 1.f / 5;
  p = p * square + 1.f / 3;
  const Vec rest = t * 2.f + t * 2.f * (square * p);
  const Vec found = __builtin_convertvector(exponent, Vec) * kLn2 + rest;
  const Vec positive = x > 0.f ? found : x * broadcast(__builtin_nanf(""));
  return x == 0.f ? broadcast(kMinusInfinity) : x == broadcast(__builtin_inff()) ? x : positive;
}

// Leaves scores as q k^T gives them.
struct PlainScores {
  // kSlopes: `slopes` gets d score / d (softmax_scale q.k) of each score if has_slopes().
  static constexpr bool has_slopes() { return false; }
  // Scores times this are exponents of 2.
  static float factor(const ScoreScale& scale) { return scale.exponent; }
  // Scores times this are those of the log-sum-exp.
  static float unit(const ScoreScale& scale) { return scale.size; }
  template <bool kSlopes>
  WARPFORM_INLINE void change(float*, float*, int64_t, int64_t, int64_t, int64_t) const {}
};

// softcap * tanh(x / softcap), then -slope * |distance| (Press et al., arXiv 2108.12409).
struct CappedScores {
  float exponent;  // ScoreScale's
  float softcap;   // 0: none
  float slope;     // of ALiBi, times log2(e)
  int64_t offset;  // of a query's position from its number

  bool has_slopes() const { return softcap > 0.f; }
  static float factor(const ScoreScale&) { return 1.f; }
  static float unit(const ScoreScale&) { return kLn2; }
  // Scores of queries from i on and keys from j on become exponents of 2.
  template <bool kSlopes>
  WARPFORM_INLINE void change(float* scores, float* slopes, int64_t rows, int64_t i, int64_t j, int64_t keys) const {
    const float tanh_exponent = -2.f / softcap, cap = softcap * kLog2e;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < keys; c += kLanes) {
        float* const at = scores + r * kScoreStride + c;
        Vec x = load(at) * exponent;
        if (softcap > 0.f) {
          // tanh |u| = -e / (2 + e) with e = exp(-2 |u|) - 1, which keeps its digits where u is small.
          const Vec e = exp2_minus_1(abs(x) * tanh_exponent);
          const Vec tanh = -e / (e + 2.f);
          x = as_float(as_int(abs(tanh * cap)) | (as_int(x) & static_cast<int32_t>(0x80000000)));
          if constexpr (kSlopes) store(slopes + r * kScoreStride + c, 1.f - tanh * tanh);
        }
        if (slope != 0.f) {
          const auto distance = static_cast<int32_t>(i + r + offset - j - c);
          x -= abs(__builtin_convertvector(distance - lane_numbers(), Vec)) * slope;
        }
        store(at, x);
      }
    }
  }
};

// ---- softmax ----

// Turns kRows rows of scores into probabilities over their largest score so far, which goes into `top`, and into their
// sums. The largest is subtracted before the factor is applied: rounded products of large scores would differ by more than
// the scores do. Where all scores are -inf, 0 is subtracted and the probabilities are 0.
template <int kRows>
WARPFORM_INLINE void softmax_rows(float* scores, int64_t width, float factor, bool first, float* top, float* sum) {
  Vec largest[kRows], total[kRows];
  float base[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) largest[r] = broadcast(kMinusInfinity), total[r] = Vec{};
  for (int64_t j = 0; j < width; j += kLanes)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) largest[r] = max(largest[r], load(scores + r * kScoreStride + j));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float found = largest_lane(largest[r]);
    top[r] = first || !(found < top[r]) ? found : top[r];
    base[r] = top[r] == kMinusInfinity ? 0.f : top[r];
  }
  for (int64_t j = 0; j < width; j += kLanes)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* const at = scores + r * kScoreStride + j;
      const Vec p = exp2((load(at) - base[r]) * factor);
      total[r] += p;
      store(at, p);
    }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r] = sum_of_lanes(total[r]);
}

// The softmax of a block of queries over the keys so far.
struct Softmax {
  float factor;                          // of scores in exponents of 2
  float unit;                            // of scores in the log-sum-exp
  alignas(64) float top[kQueryBlock];    // the largest score
  alignas(64) float sum[kQueryBlock];    // of the probabilities over it
  alignas(64) float scale[kQueryBlock];  // of what was summed before the last block of keys

  // Scores become probabilities over the largest so far; `scale` and `sum` follow.
  WARPFORM_INLINE void add(float* scores, int64_t rows, int64_t keys, bool first) {
    alignas(64) float before[kQueryBlock] = {}, part[kQueryBlock];
    const int64_t width = round_up(keys, kLanes);
    if (!first) std::memcpy(before, top, sizeof before);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) softmax_rows<4>(scores + r * kScoreStride, width, factor, first, top + r, part + r);
    for (; r < rows; ++r) softmax_rows<1>(scores + r * kScoreStride, width, factor, first, top + r, part + r);
    for (r = 0; r < rows; r += kLanes) {
      if (first) {
        store(sum + r, load(part + r));
        continue;
      }
      const Vec now = load(top + r);
      const Vec kept = exp2((load(before + r) - (now == kMinusInfinity ? Vec{} : now)) * factor);
      store(scale + r, kept);
      store(sum + r, load(sum + r) * kept + load(part + r));
    }
  }

  // The log-sum-exp of each row; -inf where nothing was seen. It is not inlined, so that it rounds alike in all kernels.
  __attribute__((noinline)) void log_sum_exp(float* lse, int64_t rows) const {
    for (int64_t r = 0; r < rows; r += kLanes) {
      const Vec total = load(sum + r);
      // The largest probability is 1, so a sum of 0 means that there is none.
      const Vec found = load(top + r) * unit + log(total);
      store(lse + r, total == 0.f ? broadcast(kMinusInfinity) : found);
    }
  }
};

// ---- operands and memory ----

// The heads of one sequence that share k and v.
template <class T>
struct SequenceHeads {
  HeadRows<T> q;  // of the first head
  int64_t q_head_stride;
  int64_t heads;  // of q
  HeadRows<T> k, v;
  int64_t q_rows, k_rows;  // those that take part
};

struct ForwardMemory {
  float *k_columns, *v_panels, *q, *scores, *out;

  static int64_t bytes(int64_t most_keys, const HeadDim& head) {
    return Scratch::bytes_of<float>(packed_columns(most_keys, head.dim)) +
           Scratch::bytes_of<float>(row_panels(most_keys, head)) +
           2 * Scratch::bytes_of<float>(kQueryBlock * head.padded) +
           Scratch::bytes_of<float>(kQueryBlock * kScoreStride);
  }
  ForwardMemory(Scratch& scratch, int64_t most_keys, const HeadDim& head)
      : k_columns(scratch.next<float>(packed_columns(most_keys, head.dim))),
        v_panels(scratch.next<float>(row_panels(most_keys, head))),
        q(scratch.next<float>(kQueryBlock * head.padded)),
        scores(scratch.next<float>(kQueryBlock * kScoreStride)),
        out(scratch.next<float>(kQueryBlock * head.padded)) {}
};

// The part of a block of queries between the first and the last that see a key.
struct SeeingRows {
  int64_t begin, end;
  SeeingRows(const SeenKeys& seen, int64_t rows) : begin(0), end(rows) {
    while (begin < end && seen.first[begin] >= seen.last[begin]) ++begin;
    while (begin < end && seen.first[end - 1] >= seen.last[end - 1]) --end;
  }
};

// ---- few queries ----

// Rows of queries, of all heads that share keys, up to which k and v are read where they lie: each element is used so few
// times that packing it would cost more than the products.
constexpr int64_t kFewRows = 4;

// scores [rows][kScoreStride] = q [rows][padded] times the transpose of k [keys, dim]. Columns past the last key, up to a
// whole vector, repeat its scores.
template <class T>
void scores_of_few(float* scores, const float* q, int64_t rows, const HeadRows<T>& k, int64_t keys,
                   const HeadDim& head) {
  for (int64_t j = 0; j < keys; j += kLanes) {
    const T* key[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) key[i] = k.row(smaller(j + i, keys - 1));
    for (int64_t r = 0; r < rows; ++r) {
      Vec sum[kLanes] = {};
      int64_t d = 0;
      for (; d + kLanes <= head.dim; d += kLanes) {
        const Vec x = load(q + r * head.padded + d);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) sum[i] += load(key[i] + d) * x;
      }
      if (d < head.dim) {
        const Vec x = load(q + r * head.padded + d);
        for (int i = 0; i < kLanes; ++i) sum[i] += load_first(key[i] + d, head.dim - d) * x;
      }
      transpose(sum);
#pragma GCC unroll 4
      for (int step = kLanes / 2; step > 0; step /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < step; ++i) sum[i] += sum[i + step];
      store(scores + r * kScoreStride + j, sum[0]);
    }
  }
}

// out [padded] = p [keys] times v [keys, dim], plus out * kept if there is a `kept`; chains are cut at kChain.
template <class T>
void values_of_few(float* out, const float* kept, const float* p, const HeadRows<T>& v, int64_t keys,
                   const HeadDim& head) {
  constexpr int kVectors = 4;
  for (int64_t d = 0; d < head.padded; d += kVectors * kLanes) {
    Vec total[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = d + i * kLanes;
      total[i] = kept != nullptr && at < head.padded ? load(out + at) * *kept : Vec{};
    }
    const int64_t left = head.dim - d;
    for (int64_t j0 = 0; j0 < keys; j0 += kChain) {
      Vec sum[kVectors] = {};
      for (int64_t j = j0; j < smaller(j0 + kChain, keys); ++j) {
        const T* const row = v.row(j) + d;
        if (left >= kVectors * kLanes) {
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; ++i) sum[i] += load(row + i * kLanes) * p[j];
        } else {
          for (int i = 0; i * kLanes < left; ++i) sum[i] += load_first(row + i * kLanes, left - i * kLanes) * p[j];
        }
      }
      for (int i = 0; i < kVectors; ++i) total[i] += sum[i];
    }
    for (int i = 0; i < kVectors && d + i * kLanes < head.padded; ++i) store(out + d + i * kLanes, total[i]);
  }
}

// attend for at most kFewRows rows of queries, of all heads together.
template <class T, class Seen, class ScoresOf, class Finish, class FinishUnseeing>
void attend_few(const ForwardMemory& memory, const SequenceHeads<T>& x, int64_t first_row, int64_t last_row,
                const HeadDim& head, const ScoreScale& scale, const Seen& seen, const ScoresOf& scores_of,
                const Finish& finish, const FinishUnseeing& finish_unseeing) {
  struct Row {
    int64_t h, i;
    int32_t first, last;  // the keys that it sees
  } row[kFewRows];
  int64_t rows = 0, first_key = x.k_rows, last_key = 0;
  for (int64_t h = 0; h < x.heads; ++h) {
    for (int64_t i = first_row; i < last_row; ++i) {
      Row& one = row[rows];
      one.h = h, one.i = i;
      seen(i, one.first, one.last);
      if (one.first >= one.last) {
        finish_unseeing(h, i, 1);
        continue;
      }
      pack_rows(memory.q + rows * head.padded, HeadRows<T>{x.q.row(i) + h * x.q_head_stride, x.q.stride}, 1, head,
                scale.sign);
      first_key = smaller(first_key, one.first), last_key = larger(last_key, one.last);
      ++rows;
    }
  }
  if (rows == 0) return;
  const auto first_change = scores_of(0);
  Softmax softmax;
  softmax.factor = first_change.factor(scale), softmax.unit = first_change.unit(scale);
  for (int64_t j = first_key; j < last_key; j += kKeyBlock) {
    const bool first = j == first_key;
    const int64_t count = smaller(kKeyBlock, last_key - j), width = round_up(count, kLanes);
    scores_of_few(memory.scores, memory.q, rows, HeadRows<T>{x.k.row(j), x.k.stride}, count, head);
    for (int64_t r = 0; r < rows; ++r) {
      float* const scores = memory.scores + r * kScoreStride;
      scores_of(row[r].h).template change<false>(scores, nullptr, 1, row[r].i, j, count);
      mask_row(scores, width, row[r].first - j, row[r].last - j);
    }
    softmax.add(memory.scores, rows, count, first);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t begin = larger(row[r].first - j, 0), end = larger(smaller(row[r].last - j, count), begin);
      values_of_few(memory.out + r * head.padded, first ? nullptr : softmax.scale + r,
                    memory.scores + r * kScoreStride + begin, HeadRows<T>{x.v.row(j + begin), x.v.stride}, end - begin,
                    head);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    softmax.top[0] = softmax.top[r], softmax.sum[0] = softmax.sum[r];
    finish(row[r].h, row[r].i, 1, memory.out + r * head.padded, softmax);
  }
}

// ---- an item, forward ----

// Attention of the queries [first_row, last_row) of all heads of a sequence.
//   seen(i, first, last)   the keys that query i sees; neither bound falls from query to query
//   scores_of(head)        what is done to scores, e.g. PlainScores
//   finish(head, i, rows, out, softmax)
//                          takes the results of `rows` queries from i on: out [rows][padded], not yet divided by the sum
//   finish_unseeing(head, i, rows)
//                          queries that see no key
template <class T, class Seen, class ScoresOf, class Finish, class FinishUnseeing>
void attend(const ForwardMemory& memory, const SequenceHeads<T>& x, int64_t first_row, int64_t last_row,
            const HeadDim& head, const ScoreScale& scale, const Seen& seen, const ScoresOf& scores_of,
            const Finish& finish, const FinishUnseeing& finish_unseeing) {
  if (x.heads * (last_row - first_row) <= kFewRows) {
    attend_few(memory, x, first_row, last_row, head, scale, seen, scores_of, finish, finish_unseeing);
    return;
  }
  // The keys that are packed: [packed_from, packed_from + packed).
  int64_t packed_from = 0, packed = 0;
  const auto pack_keys = [&](int64_t first, int64_t count) {
    packed_from = first, packed = count;
    pack_key_columns(memory.k_columns, HeadRows<T>{x.k.row(first), x.k.stride}, count, head);
    pack_row_panels(memory.v_panels, HeadRows<T>{x.v.row(first), x.v.stride}, count, head);
  };
  // Keys that one block of queries meets are packed a block at a time, which stays in cache; others, as far as the queries
  // see them, once for all.
  const bool once = x.heads == 1 && last_row - first_row <= kQueryBlock;
  if (!once) {
    int32_t first, last, unused;
    seen(first_row, first, unused);
    seen(last_row - 1, unused, last);
    const int64_t from = first / kPanel * kPanel;
    pack_keys(smaller(from, x.k_rows), larger(last - from, 0));
  }
  for (int64_t h = 0; h < x.heads; ++h) {
    const auto change = scores_of(h);
    for (int64_t i0 = first_row; i0 < last_row; i0 += kQueryBlock) {
      SeenKeys keys;
      const int64_t block = smaller(kQueryBlock, last_row - i0);
      for (int64_t r = 0; r < block; ++r) seen(i0 + r, keys.first[r], keys.last[r]);
      const SeeingRows some(keys, block);
      if (some.begin > 0) finish_unseeing(h, i0, some.begin);
      if (some.end < block) finish_unseeing(h, i0 + some.end, block - some.end);
      const int64_t rows = some.end - some.begin, i = i0 + some.begin;
      if (rows == 0) continue;
      const HeadRows<T> q{x.q.row(i) + h * x.q_head_stride, x.q.stride};
      pack_rows(memory.q, q, rows, head, scale.sign);
      Softmax softmax;
      softmax.factor = change.factor(scale), softmax.unit = change.unit(scale);
      const int64_t first_key = keys.first[some.begin], last_key = keys.last[some.end - 1];
      bool first = true;
      for (int64_t j = first_key / kPanel * kPanel; j < last_key; j += kKeyBlock) {
        const int64_t count = smaller(kKeyBlock, last_key - j);
        if (once) pack_keys(j, count);
        const int64_t at = j - packed_from;
        times_columns(rows, count, head.dim, memory.scores, kScoreStride, memory.q, head.padded, 1,
                      memory.k_columns + at * head.padded);
        change.template change<false>(memory.scores, nullptr, rows, i, j, count);
        mask_scores(memory.scores, rows, j, count, keys, some.begin);
        softmax.add(memory.scores, rows, count, first);
        const int64_t before = larger(first_key - j, 0);  // keys that no row sees
        if (first) {
          times_row_panels<Into::kSet>(rows, count - before, memory.out, memory.scores + before, kScoreStride, 1,
                                       memory.v_panels, packed, at + before, head);
        } else {
          times_row_panels<Into::kScaled>(rows, count - before, memory.out, memory.scores + before, kScoreStride, 1,
                                          memory.v_panels, packed, at + before, head, softmax.scale);
        }
        first = false;
      }
      finish(h, i, rows, memory.out, softmax);
    }
  }
}

// row [dim] = from * factor. A store waits for its line, so it asks for that of the next head, too.
template <class T>
WARPFORM_INLINE void store_row(T* row, const float* from, int64_t dim, float factor) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    __builtin_prefetch(row + d + dim, 1);
    store(row + d, load(from + d) * factor);
  }
  if (d < dim) store_first(row + d, load(from + d) * factor, dim - d);
}

// row [dim] = before + from * factor.
WARPFORM_INLINE void store_sum(float* row, const float* before, const float* from, int64_t dim, float factor) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(row + d, load(before + d) + load(from + d) * factor);
  if (d < dim) store_first(row + d, load_first(before + d, dim - d) + load(from + d) * factor, dim - d);
}

// ---- an item, backward ----

// What the gradient of a block of queries starts from, in rows.
struct GradientRows {
  alignas(64) float lse[kQueryBlock];    // times log2(e); inf where no key was seen: all probabilities are 0
  alignas(64) float delta[kQueryBlock];  // rowsum(dout * out) less the gradient of lse

  void set(int64_t r, float natural_lse, float row_delta) {
    lse[r] = natural_lse == kMinusInfinity ? -kMinusInfinity : natural_lse * kLog2e;
    delta[r] = row_delta;
  }
};

struct BackwardMemory {
  float *k_columns, *v_columns, *k_panels, *dk, *dv, *q, *dout, *dq, *scores, *products, *slopes;

  static int64_t bytes(int64_t most_keys, const HeadDim& head) {
    return 2 * Scratch::bytes_of<float>(packed_columns(most_keys, head.dim)) +
           Scratch::bytes_of<float>(row_panels(most_keys, head)) +
           2 * Scratch::bytes_of<float>(most_keys * head.padded) +
           3 * Scratch::bytes_of<float>(kQueryBlock * head.padded) +
           3 * Scratch::bytes_of<float>(kQueryBlock * kScoreStride);
  }
  BackwardMemory(Scratch& scratch, int64_t most_keys, const HeadDim& head)
      : k_columns(scratch.next<float>(packed_columns(most_keys, head.dim))),
        v_columns(scratch.next<float>(packed_columns(most_keys, head.dim))),
        k_panels(scratch.next<float>(row_panels(most_keys, head))),
        dk(scratch.next<float>(most_keys * head.padded)),
        dv(scratch.next<float>(most_keys * head.padded)),
        q(scratch.next<float>(kQueryBlock * head.padded)),
        dout(scratch.next<float>(kQueryBlock * head.padded)),
        dq(scratch.next<float>(kQueryBlock * head.padded)),
        scores(scratch.next<float>(kQueryBlock * kScoreStride)),
        products(scratch.next<float>(kQueryBlock * kScoreStride)),
        slopes(scratch.next<float>(kQueryBlock * kScoreStride)) {}
};

// Scores become probabilities P, products dout v^T become P * (product - delta), times the slopes if there are any.
template <bool kSlopes>
WARPFORM_INLINE void score_gradients(float* scores, float* products, const float* slopes, int64_t rows, int64_t keys,
                                     float factor, const GradientRows& x) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * kScoreStride;
    const float lse = x.lse[r], delta = x.delta[r];
    for (int64_t j = row; j < row + keys; j += kLanes) {
      // The least of both keeps NaN. A probability above 1 comes from an lse of other scores.
      const Vec p = exp2(min(broadcast(127.f), load(scores + j) * factor - lse));
      Vec gradient = p * (load(products + j) - delta);
      if constexpr (kSlopes) gradient *= load(slopes + j);
      // What is masked has no part in it, whatever its products are.
      store(products + j, p == 0.f ? Vec{} : gradient);
      store(scores + j, p);
    }
  }
}

// The gradients of all heads of a sequence through the keys [first_key, last_key): dk and dv, and of every query dq.
//   seen, scores_of                as in attend
//   rows_of(head, i, rows, dout, x)
//                                  sets what the gradients of `rows` queries from i on start from; dout [rows][padded]
//   finish(head, i, rows, dq)      takes dq [rows][padded], still to be multiplied by softmax_scale
//   finish_unseeing(head, i, rows) queries that see none of the keys
// Leaves dk, still to be multiplied by scale.size, and dv [keys][padded] in memory, from first_key on.
template <class T, class Seen, class ScoresOf, class RowsOf, class Finish, class FinishUnseeing>
void attend_backward(const BackwardMemory& memory, const SequenceHeads<T>& x, const HeadRows<T>& dout,
                     int64_t dout_head_stride, int64_t first_key, int64_t last_key, const HeadDim& head,
                     const ScoreScale& scale, const Seen& seen, const ScoresOf& scores_of, const RowsOf& rows_of,
                     const Finish& finish, const FinishUnseeing& finish_unseeing) {
  const int64_t keys_here = last_key - first_key;
  const HeadRows<T> k{x.k.row(first_key), x.k.stride}, v{x.v.row(first_key), x.v.stride};
  pack_key_columns(memory.k_columns, k, keys_here, head);
  pack_key_columns(memory.v_columns, v, keys_here, head);
  pack_row_panels(memory.k_panels, k, keys_here, head);
  std::memset(memory.dk, 0, static_cast<size_t>(keys_here * head.padded) * sizeof(float));
  std::memset(memory.dv, 0, static_cast<size_t>(keys_here * head.padded) * sizeof(float));
  for (int64_t h = 0; h < x.heads; ++h) {
    const auto change = scores_of(h);
    for (int64_t i0 = 0; i0 < x.q_rows; i0 += kQueryBlock) {
      SeenKeys keys;
      const int64_t block = smaller(kQueryBlock, x.q_rows - i0);
      for (int64_t r = 0; r < block; ++r) {
        int32_t first, last;
        seen(i0 + r, first, last);
        // Counted from first_key on.
        keys.first[r] = static_cast<int32_t>(smaller(larger(first - first_key, 0), keys_here));
        keys.last[r] = static_cast<int32_t>(smaller(larger(last - first_key, 0), keys_here));
      }
      const SeeingRows some(keys, block);
      if (some.begin > 0) finish_unseeing(h, i0, some.begin);
      if (some.end < block) finish_unseeing(h, i0 + some.end, block - some.end);
      const int64_t rows = some.end - some.begin, i = i0 + some.begin;
      if (rows == 0) continue;
      pack_rows(memory.q, HeadRows<T>{x.q.row(i) + h * x.q_head_stride, x.q.stride}, rows, head, scale.sign);
      pack_rows(memory.dout, HeadRows<T>{dout.row(i) + h * dout_head_stride, dout.stride}, rows, head, 1.f);
      GradientRows from;
      rows_of(h, i, rows, memory.dout, from);
      const int64_t begin = keys.first[some.begin], end = keys.last[some.end - 1];
      bool first = true;
      for (int64_t j = begin / kPanel * kPanel; j < end; j += kKeyBlock) {
        const int64_t count = smaller(kKeyBlock, end - j);
        times_columns(rows, count, head.dim, memory.scores, kScoreStride, memory.q, head.padded, 1,
                      memory.k_columns + j * head.padded);
        change.template change<true>(memory.scores, memory.slopes, rows, i, first_key + j, count);
        mask_scores(memory.scores, rows, j, count, keys, some.begin);
        times_columns(rows, count, head.dim, memory.products, kScoreStride, memory.dout, head.padded, 1,
                      memory.v_columns + j * head.padded);
        if (change.has_slopes()) {
          score_gradients<true>(memory.scores, memory.products, memory.slopes, rows, count, change.factor(scale), from);
        } else {
          score_gradients<false>(memory.scores, memory.products, nullptr, rows, count, change.factor(scale), from);
        }
        const int64_t before = larger(begin - j, 0);  // keys that no row sees
        const float *const p = memory.scores + before, *const ds = memory.products + before;
        const int64_t at = j + before, some_keys = count - before;
        if (first) {
          times_row_panels<Into::kSet>(rows, some_keys, memory.dq, ds, kScoreStride, 1, memory.k_panels, keys_here, at,
                                       head);
        } else {
          times_row_panels<Into::kAdd>(rows, some_keys, memory.dq, ds, kScoreStride, 1, memory.k_panels, keys_here, at,
                                       head);
        }
        times_rows<Into::kAdd>(some_keys, head.padded, rows, memory.dk + at * head.padded, head.padded, ds, 1,
                               kScoreStride, memory.q, head.padded);
        times_rows<Into::kAdd>(some_keys, head.padded, rows, memory.dv + at * head.padded, head.padded, p, 1,
                               kScoreStride, memory.dout, head.padded);
        first = false;
      }
      finish(h, i, rows, memory.dq);
    }
  }
}

// ---- the items of a call ----

// Sequences laid end to end: those of cu_seqlens, kept inside [0, total] whatever it holds, or equal ones.
struct Sequences {
  const int32_t* cu_seqlens;  // null: all have `length` rows
  int64_t batch, total, length;
  int64_t begin(int64_t b) const {
    if (cu_seqlens == nullptr) return b * length;
    return smaller(larger(cu_seqlens[b], 0), total);
  }
  int64_t rows(int64_t b) const { return larger(begin(b + 1) - begin(b), 0); }
};

// Items of a call: a sequence, a key head, and a part of its queries or keys where there would be few items else. The cut
// follows from the problem alone, so results do not depend on threads.
constexpr int64_t kForwardItems = 64, kBackwardItems = 32;  // backward adds the parts of dq up
WARPFORM_INLINE int64_t parts_of(int64_t whole_items, int64_t items, int64_t most_parts) {
  return whole_items == 0 ? 0 : larger(1, smaller(ceil_div(items, whole_items), most_parts));
}
// Queries times heads, and keys, of a part at least: it packs k and v, or q, again.
constexpr int64_t kLeastPartQueries = 192, kLeastPartKeys = 512;
// Bytes of dq that parts of keys may take together.
constexpr int64_t kMostPartialBytes = int64_t{128} << 20;

// The rows [first, last) of part `part` of `parts`, cut at multiples of `step`.
struct Part {
  int64_t first, last;
  Part(int64_t rows, int64_t part, int64_t parts, int64_t step) {
    const int64_t each = round_up(ceil_div(rows, parts), step);
    first = smaller(part * each, rows), last = smaller(first + each, rows);
  }
};

// Item `item` of a call whose item 0 is something else: a sequence, of those in order, a key head and a part.
struct AttentionItem {
  int64_t at;  // of the sequence in the order
  int64_t key_head, part;
  AttentionItem(int64_t item, int64_t key_heads, int64_t parts)
      : at((item - 1) / (key_heads * parts)), key_head((item - 1) % key_heads), part((item - 1) / key_heads % parts) {}
};

// The order in which a call takes its sequences: by work, the most first, to a factor of 2; else by their numbers. The last
// item that a thread takes is a small one.
class LongestFirst {
 public:
  static int64_t bytes(int64_t batch) { return Scratch::bytes_of<int32_t>(larger(batch, 1)); }
  LongestFirst(Scratch& scratch, const Sequences& queries, const Sequences& keys)
      : order_(scratch.next<int32_t>(larger(queries.batch, 1))) {
    int64_t starts[65] = {};
    const auto size = [&](int64_t b) {
      const auto work = static_cast<uint64_t>((queries.rows(b) + 16) * (keys.rows(b) + 16));
      return __builtin_clzll(work);  // of more work fewer zeros
    };
    for (int64_t b = 0; b < queries.batch; ++b) {
      ++starts[size(b) + 1];
      most_queries_ = larger(most_queries_, queries.rows(b));
      most_keys_ = larger(most_keys_, keys.rows(b));
    }
    for (int i = 0; i < 64; ++i) starts[i + 1] += starts[i];
    for (int64_t b = 0; b < queries.batch; ++b) order_[starts[size(b)]++] = static_cast<int32_t>(b);
  }
  int64_t operator[](int64_t i) const { return order_[i]; }
  int64_t most_queries() const { return most_queries_; }
  int64_t most_keys() const { return most_keys_; }

 private:
  int32_t* const order_;
  int64_t most_queries_ = 0, most_keys_ = 0;
};

}  // namespace
}  // namespace warpform::cpu::WARPFORM_CPU_ISA
