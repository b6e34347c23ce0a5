// window_attention_backward.
//
// Probabilities are made again from q and k, with their own sums: the output and the log-sum-exp of the forward are not
// read. Sums over windows are made in shares, which are added in order.
//
// Floor     10 tokens^2 head_dim FLOPs a window and head, and the bytes of qkv, dout and dqkv.
// Measured  As in window_forward.cpp, both ways together: windows of 49 tokens 45 to 76 GFLOP/s, of 64 tokens 80, of 144 and
//           more 95 to 103.
#include "families.h"
#include "window.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// The sums of each share: over the scores of a short window as they lie, [tokens, columns] a head, of a long one in the
// order of the reversed table; of logit_scale; over the padding, [3, heads, wide].
struct Sums {
  Sums(const WindowSizes& sizes, int64_t share_count) : z(sizes), shares(share_count) {
    const WindowProblem& p = z.problem;
    of_head = p.table == nullptr ? 0 : z.whole ? z.tokens * z.columns : round_up(p.table_entries + kLanes, kLanes);
    of_scale = p.logit_scale == nullptr ? 0 : z.heads;
    of_padding = p.qkv_bias == nullptr ? 0 : 3 * z.heads * z.wide;
  }
  template <class Take>
  void lay(const Take& take) {
    take(table, shares * z.heads * of_head);
    take(scale, shares * of_scale);
    take(padding, shares * of_padding);
  }
  float* table_of(int64_t share, int64_t head) const {
    return of_head == 0 ? nullptr : table + (share * z.heads + head) * of_head;
  }
  double* scale_of(int64_t share, int64_t head) const {
    return of_scale == 0 ? nullptr : scale + share * z.heads + head;
  }
  float* padding_of(int64_t share, int part, int64_t head) const {
    return of_padding == 0 ? nullptr : padding + share * of_padding + (part * z.heads + head) * z.wide;
  }
  void clear(int64_t share, int64_t head) const {
    if (float* const sum = table_of(share, head)) std::memset(sum, 0, static_cast<size_t>(of_head) * sizeof(float));
    if (double* const sum = scale_of(share, head)) *sum = 0;
    for (int part = 0; part < 3; ++part) {
      float* const sum = padding_of(share, part, head);
      if (sum != nullptr) std::memset(sum, 0, static_cast<size_t>(z.wide) * sizeof(float));
    }
  }

  const WindowSizes& z;
  const int64_t shares;
  int64_t of_head, of_scale, of_padding;  // elements
  float* table = nullptr;
  double* scale = nullptr;
  float* padding = nullptr;
};

// Memory of one thread.
struct Buffers {
  const WindowSizes& z;
  int64_t bias_room;
  float *q = nullptr, *k = nullptr, *dout = nullptr, *kt = nullptr, *vt = nullptr, *s = nullptr, *ds = nullptr;
  float *o = nullptr, *dk = nullptr, *dv = nullptr, *inverse = nullptr;
  float *q_lengths = nullptr, *k_lengths = nullptr, *bias = nullptr;
  Places places = {};
  template <class Take>
  void lay(const Take& take) {
    const int64_t all = z.tokens * z.wide;
    take(q, all);
    take(k, all);
    take(dout, all);
    take(kt, packed_columns(z.tokens, z.wide));
    take(vt, packed_columns(z.tokens, z.wide));
    take(s, z.queries * z.stride);
    take(ds, z.queries * z.stride + kLanes);
    take(o, z.queries * z.wide);
    take(dk, all);
    take(dv, all);
    take(inverse, z.queries);
    take(q_lengths, z.tokens);
    take(k_lengths, z.tokens);
    take(bias, bias_room);
    places.lay(z, take);
  }
};

// From powers of 2 and the gradients of probabilities, probabilities and the gradients of scores, which are added to
// `sum` where it is not null.
template <int kVectors>
__attribute__((noinline)) void score_gradients(float* s, float* ds, int64_t m, int64_t stride, int64_t columns,
                                               const float* inverse, float* sum) {
  for (int64_t i = 0; i < m; ++i, s += stride, ds += stride) {
    const float scale = inverse[i];
    Vec products{};
    if constexpr (kVectors > 0) {
      Vec p[kVectors], g[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        p[v] = load(s + v * kLanes) * scale;
        g[v] = load(ds + v * kLanes);
        products += p[v] * g[v];
      }
      const float delta = sum_of_lanes(products);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        g[v] = p[v] * (g[v] - delta);
        store(s + v * kLanes, p[v]);
        store(ds + v * kLanes, g[v]);
        if (sum != nullptr) store(sum + v * kLanes, load(sum + v * kLanes) + g[v]);
      }
    } else {
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec p = load(s + j) * scale;
        store(s + j, p);
        products += p * load(ds + j);
      }
      const float delta = sum_of_lanes(products);
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec g = load(s + j) * (load(ds + j) - delta);
        store(ds + j, g);
        if (sum != nullptr) store(sum + j, load(sum + j) + g);
      }
    }
    if (sum != nullptr) sum += columns;
  }
}

// Adds rows of gradients of scores to a line in the order of the reversed table.
__attribute__((noinline)) void add_to_line(float* line, const float* ds, int64_t first, int64_t m,
                                           const WindowSizes& z) {
  const int64_t run = z.problem.window[2];
  for (int64_t i = first; i < first + m; ++i, ds += z.stride) {
    WindowBias::for_each_run(z.problem, i, [&](int64_t j, int64_t at) {
      for (int64_t x = 0; x < run; x += kLanes) {
        const Vec some = first_lanes(run - x) ? load(ds + j + x) : Vec{};
        store(line + at + x, load(line + at + x) + some);
      }
    });
  }
}

// Gradients of unit vectors times `factor` become those of the vectors themselves: what lies along a unit vector changes
// nothing and is subtracted. Returns the sum of what lies along. Rows of `unit` are those of x.
WARPFORM_INLINE double through_unit(float* x, const float* unit, const float* inverse, int64_t m, float factor,
                                    const WindowSizes& z) {
  double sum = 0;  // its terms cancel
  for (int64_t i = 0; i < m; ++i, x += z.wide, unit += z.wide) {
    Vec products{};
    for (int64_t d = 0; d < z.wide; d += kLanes) products += load(x + d) * load(unit + d);
    const float along = sum_of_lanes(products);
    sum += static_cast<double>(along) * factor;
    for (int64_t d = 0; d < z.wide; d += kLanes) {
      store(x + d, (load(x + d) - load(unit + d) * along) * (factor * inverse[i]));
    }
  }
  return sum;
}

template <class T>
void backward_head(const WindowBackwardParams& params, const WindowSizes& z, const WindowBias& bias, const Sums& sums,
                   const Buffers& b, int64_t share, int64_t head, const int64_t* rows, const float* parts,
                   const NextHead& next, float factor) {
  const WindowProblem& p = z.problem;
  const bool cosine = p.logit_scale != nullptr;
  const HeadRows<T> q = part_rows<T>(p, 0, head, rows), k = part_rows<T>(p, 1, head, rows),
                    v = part_rows<T>(p, 2, head, rows);
  const HeadRows<T> dout{static_cast<const T*>(params.dout) + head * z.depth, p.width, rows, nullptr};
  copy_rows(b.q, z, q);
  copy_rows(b.k, z, k);
  copy_rows(b.dout, z, dout);
  if (cosine) {
    make_unit(b.q, z, b.q_lengths);
    make_unit(b.k, z, b.k_lengths);
  }
  pack_columns<float>(b.kt, z.tokens, z.wide, [&](int64_t i) { return b.k + i * z.wide; });
  pack_columns<T>(b.vt, z.tokens, z.depth, v);
  T* const dqkv = static_cast<T*>(params.dqkv) + head * z.depth;
  float* const table_sum = sums.table_of(share, head);
  for (int64_t first = 0; first < z.tokens; first += z.queries) {
    const int64_t m = smaller(z.queries, z.tokens - first);
    float *const rows_q = b.q + first * z.wide, *const rows_dout = b.dout + first * z.wide;
    const float* const bias_rows = bias.rows(head, first, m, b.bias);
    for (int64_t r = 0, some; r < m; r += some) {
      some = z.scored_at_once(m - r);
      const int64_t at = first + r;
      prefetch_parts<T>(next, z, at, some);
      for (int64_t i = at; next.rows != nullptr && i < at + some; ++i) {
        const int64_t row = next.rows[i];
        if (row >= 0)
          prefetch_row<0>(static_cast<const T*>(params.dout) + row * p.width + next.head * z.depth, z.depth);
      }
      const Added added(z, bias_rows + r * bias.stride(), bias.stride(), parts, at, factor);
      probabilities(b.s + r * z.stride, some, z, b.q + at * z.wide, b.kt, added, b.inverse + r, nullptr);
    }
    times_columns(m, z.tokens, z.depth, b.ds, z.stride, rows_dout, z.wide, 1, b.vt);
    for (int64_t i = 0; i < m; ++i) {
      if (b.inverse[i] != 0.f) continue;
      // A query that sees no key has no gradients, whatever its dout and the values are.
      for (int64_t d = 0; d < z.wide; d += kLanes) store(rows_dout + i * z.wide + d, Vec{});
      for (int64_t j = 0; j < z.columns; j += kLanes) store(b.ds + i * z.stride + j, Vec{});
    }
    if (kRegisters == 32 && z.columns == kRowVectors * kLanes) {
      score_gradients<kRowVectors>(b.s, b.ds, m, z.stride, z.columns, b.inverse, table_sum);
    } else {
      score_gradients<0>(b.s, b.ds, m, z.stride, z.columns, b.inverse, z.whole ? table_sum : nullptr);
      if (!z.whole && table_sum != nullptr) add_to_line(table_sum, b.ds, first, m, z);
    }
    times_rows(m, z.wide, z.tokens, b.o, z.wide, b.ds, z.stride, 1, b.k, z.wide);
    if (cosine) *sums.scale_of(share, head) += through_unit(b.o, rows_q, b.q_lengths + first, m, factor, z);
    scatter_rows(dqkv, 3 * p.width, rows + first, b.o, m, z, sums.padding_of(share, 0, head),
                 [&](int64_t) { return cosine ? 1.f : factor; });
    if (first == 0) {
      times_rows(z.tokens, z.wide, m, b.dk, z.wide, b.ds, 1, z.stride, rows_q, z.wide);
      times_rows(z.tokens, z.wide, m, b.dv, z.wide, b.s, 1, z.stride, rows_dout, z.wide);
    } else {
      times_rows<Into::kAdd>(z.tokens, z.wide, m, b.dk, z.wide, b.ds, 1, z.stride, rows_q, z.wide);
      times_rows<Into::kAdd>(z.tokens, z.wide, m, b.dv, z.wide, b.s, 1, z.stride, rows_dout, z.wide);
    }
  }
  if (cosine) through_unit(b.dk, b.k, b.k_lengths, z.tokens, factor, z);
  scatter_rows(dqkv + p.width, 3 * p.width, rows, b.dk, z.tokens, z, sums.padding_of(share, 1, head),
               [&](int64_t) { return cosine ? 1.f : factor; });
  scatter_rows(dqkv + 2 * p.width, 3 * p.width, rows, b.dv, z.tokens, z, sums.padding_of(share, 2, head),
               [](int64_t) { return 1.f; });
}

// ---- the sums of all shares ----

void finish_table(const WindowBackwardParams& params, const Sums& sums, float* line, float* total) {
  const WindowSizes& z = sums.z;
  const WindowProblem& p = z.problem;
  for (int64_t h = 0; h < z.heads; ++h) {
    for (int64_t e = 0; e < sums.of_head; e += kLanes) {
      Vec sum{};
      for (int64_t share = 0; share < sums.shares; ++share) sum += load(sums.table_of(share, h) + e);
      store(total + e, sum);
    }
    const float* of_line = total;
    if (z.whole) {
      std::memset(line, 0, static_cast<size_t>(p.table_entries) * sizeof(float));
      for (int64_t i = 0; i < z.tokens; ++i) {
        WindowBias::for_each_run(p, i, [&](int64_t j, int64_t at) {
          for (int64_t x = 0; x < p.window[2]; ++x) line[at + x] += total[i * z.columns + j + x];
        });
      }
      of_line = line;
    }
    with_element(p.table_dtype, [&]<class E>(E*) {
      for (int64_t e = 0; e < p.table_entries; ++e) {
        static_cast<E*>(params.dtable)[e * z.heads + h] = from_float<E>(of_line[p.table_entries - 1 - e]);
      }
    });
  }
}

template <class T>
void backward(const WindowBackwardParams& params, const Host& host) {
  const WindowSizes z(params.problem);
  const WindowProblem& p = z.problem;
  if (z.heads == 0) return;
  WindowBias bias(z);
  // A share costs two passes over its sums.
  const WindowItems cut(z, /*products=*/5, /*least_windows=*/z.whole ? 4 : 1, /*most_shares=*/z.whole ? 32 : 64);
  Sums sums(z, cut.shares);
  const int64_t line = round_up(p.table_entries + kLanes, kLanes);
  Scratch shared(host, bytes_of_layout(bias) + bytes_of_layout(sums) + Scratch::bytes_of<float>(z.heads) +
                           Scratch::bytes_of<float>(line) + Scratch::bytes_of<float>(sums.of_head));
  place_layout(bias, shared);
  place_layout(sums, shared);
  float* const factors = shared.next<float>(z.heads);
  float* const line_room = shared.next<float>(line);
  float* const total_room = shared.next<float>(sums.of_head);
  bias.make();
  head_factors(p, factors);
  over(host, cut.count(), [&](Items& items) {
    Buffers b{.z = z, .bias_room = bias.room()};
    Scratch memory(host, bytes_of_layout(b));
    place_layout(b, memory);
    for (int64_t item; items.next(item);) {
      const int64_t share = item / cut.head_parts, head0 = item % cut.head_parts * cut.heads_each;
      const int64_t heads = smaller(z.heads, head0 + cut.heads_each);
      for (int64_t h = head0; h < heads; ++h) sums.clear(share, h);
      for_each_head(z, b.places, share * cut.share, smaller(z.windows, (share + 1) * cut.share), head0, heads,
                    [&](int64_t, int64_t h, const int64_t* rows, const float* parts, const NextHead& next) {
                      backward_head<T>(params, z, bias, sums, b, share, h, rows, parts, next, factors[h]);
                    });
    }
  });
  if (p.table != nullptr) finish_table(params, sums, line_room, total_room);
  if (p.logit_scale != nullptr) {
    with_element(p.logit_scale_dtype, [&]<class E>(E*) {
      for (int64_t h = 0; h < z.heads; ++h) {
        double sum = 0;
        for (int64_t share = 0; share < cut.shares; ++share) sum += *sums.scale_of(share, h);
        // Past the clamp nothing moves the factor.
        if (to_float(static_cast<const E*>(p.logit_scale)[h]) > kLargestLogitScale) sum = 0;
        static_cast<E*>(params.dlogit_scale)[h] = from_float<E>(static_cast<float>(sum));
      }
    });
  }
  if (p.qkv_bias != nullptr) {
    for (int part = 0; part < 3; ++part) {
      for (int64_t h = 0; h < z.heads; ++h) {
        T* const to = static_cast<T*>(params.dqkv_bias) + part * p.width + h * z.depth;
        for (int64_t d = 0; d < z.depth; d += kLanes) {
          Vec sum{};
          for (int64_t share = 0; share < cut.shares; ++share) sum += load(sums.padding_of(share, part, h) + d);
          store_first(to + d, sum, z.depth - d);
        }
      }
    }
  }
}

}  // namespace

void window_attention_backward(const WindowBackwardParams& params, const Host& host) {
  with_element(params.problem.dtype, [&]<class T>(T*) { backward<T>(params, host); });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
