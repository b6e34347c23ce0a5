// varlen_attention and its backward.
//
// Floor     Forward two products, 4 head_dim FLOP a pair of a query and a key that it sees, backward five, 10 head_dim.
//           Below about 100 keys the bytes of q, k, v and out count for more: 16 head_dim a token and head of float32.
// Measured  One thread of a Skylake-SP server with AVX-512, whose MKL runs products at 84 GFLOP/s; float32, heads of 64.
//           2048 tokens: forward 88 GFLOP/s, backward 91; causal 78 and 83. Lengths of 51 to 256: 67 and 67. Lengths of
//           16 to 64: 25 and 25, where the time goes into reading and packing rows that lie far apart.
//           Two threads of an AMD EPYC with AVX2, whose MKL runs 128 GFLOP/s: 95 to 115 % of that at 2048 tokens, 65 and 82 %
//           at 51 to 256, 32 and 37 % at 16 to 64.
// Threads   Backward makes dq within an item, so the keys of a few long sequences are cut into parts whose dq are added
//           in order. There are no atomics, and results are the same bits in every run, whatever the threads are.
#include "attention.h"

#include "families.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// The sequences of a problem and the keys that queries see: masks are aligned at the end.
struct Packed {
  Sequences queries, keys;
  explicit Packed(const AttentionProblem& p)
      : queries{p.cu_seqlens_q, p.batch, p.total_q, 0}, keys{p.cu_seqlens_k, p.batch, p.total_k, 0} {}
};

class SeenFromEnd {
 public:
  SeenFromEnd(const AttentionProblem& p, int64_t q_length, int64_t k_length)
      : limit_(smaller(k_length, p.max_seqlen_k)),
        first_(p.window_left < 0 ? -kFar : k_length - q_length - p.window_left),
        last_(p.window_right < 0 ? kFar : k_length - q_length + p.window_right + 1) {}
  WARPFORM_INLINE void operator()(int64_t i, int32_t& first, int32_t& last) const {
    first = static_cast<int32_t>(smaller(larger(i + first_, 0), limit_));
    last = static_cast<int32_t>(smaller(larger(i + last_, 0), limit_));
  }

 private:
  static constexpr int64_t kFar = int64_t{1} << 40;
  int64_t limit_, first_, last_;
};

template <class T>
HeadRows<T> rows_of(const HeadsView& view, int64_t row, int64_t head) {
  return {static_cast<const T*>(view.data) + row * view.row_stride + head * view.head_stride, view.row_stride};
}

// f(a function that makes what a head's scores go through).
template <class F>
WARPFORM_INLINE void with_scores(const AttentionProblem& p, const F& f) {
  if (p.softcap == 0.f && p.alibi_slopes == nullptr) {
    f([](int64_t, int64_t, int64_t) { return PlainScores{}; });
  } else {
    f([&p](int64_t sequence, int64_t head, int64_t offset) {
      const float slope = p.alibi_slopes ? p.alibi_slopes[sequence * p.alibi_batch_stride + head] * kLog2e : 0.f;
      return CappedScores{ScoreScale(p.softmax_scale).exponent, p.softcap, slope, offset};
    });
  }
}

// ---- forward ----

template <class T, class ScoresOf>
void forward(const AttentionForwardParams& params, const Host& host, const ScoresOf& scores_of) {
  const AttentionProblem& p = params.problem;
  const Packed packed(p);
  const HeadDim head(p.head_dim);
  const ScoreScale scale(p.softmax_scale);
  const int64_t group = p.heads_q / p.heads_kv, out_stride = static_cast<int64_t>(p.heads_q) * p.head_dim;
  auto* const out = static_cast<T*>(params.out);
  Scratch shared(host, LongestFirst::bytes(p.batch));
  const LongestFirst order(shared, packed.queries, packed.keys);
  const int64_t whole = static_cast<int64_t>(p.batch) * p.heads_kv;
  const int64_t parts = parts_of(whole, kForwardItems, order.most_queries() * group / kLeastPartQueries);

  const auto clear = [&](int64_t row, int64_t rows, int64_t first_head, int64_t heads) {
    for (int64_t h = first_head; h < first_head + heads; ++h) {
      for (int64_t r = row; r < row + rows; ++r) {
        std::memset(out + r * out_stride + h * p.head_dim, 0, static_cast<size_t>(p.head_dim) * sizeof(T));
        params.lse[h * p.total_q + r] = kMinusInfinity;
      }
    }
  };
  // The first item has the rows of no sequence.
  over(host, 1 + whole * parts, [&](Items& items) {
    Scratch scratch(host, ForwardMemory::bytes(order.most_keys(), head));
    const ForwardMemory memory(scratch, order.most_keys(), head);
    for (int64_t item; items.next(item);) {
      if (item == 0) {
        const int64_t begin = packed.queries.begin(0), end = packed.queries.begin(p.batch);
        clear(0, begin, 0, p.heads_q);
        clear(end, p.total_q - end, 0, p.heads_q);
        continue;
      }
      const AttentionItem of(item, p.heads_kv, parts);
      const int64_t sequence = order[of.at], key_head = of.key_head, part = of.part;
      const int64_t q_begin = packed.queries.begin(sequence), q_length = packed.queries.rows(sequence);
      const int64_t k_begin = packed.keys.begin(sequence), k_length = packed.keys.rows(sequence);
      const auto [first, last] = Part(q_length, part, parts, kQueryBlock);
      const int64_t attending = smaller(last, p.max_seqlen_q);
      const int64_t first_head = key_head * group;
      if (attending < last) {
        clear(q_begin + larger(first, attending), last - larger(first, attending), first_head, group);
      }
      if (first >= attending) continue;
      const SequenceHeads<T> x{.q = rows_of<T>(p.q, q_begin, first_head),
                               .q_head_stride = p.q.head_stride,
                               .heads = group,
                               .k = rows_of<T>(p.k, k_begin, key_head),
                               .v = rows_of<T>(p.v, k_begin, key_head),
                               .q_rows = attending,
                               .k_rows = smaller(k_length, p.max_seqlen_k)};
      attend(
          memory, x, first, attending, head, scale, SeenFromEnd(p, q_length, k_length),
          [&](int64_t h) { return scores_of(sequence, first_head + h, k_length - q_length); },
          [&](int64_t h, int64_t i, int64_t rows, const float* sums, const Softmax& softmax) {
            alignas(64) float lse[kQueryBlock];
            softmax.log_sum_exp(lse, rows);
            float* const to_lse = params.lse + (first_head + h) * p.total_q + q_begin + i;
            for (int64_t r = 0; r < rows; ++r) {
              to_lse[r] = lse[r];
              if (softmax.sum[r] == 0.f) {
                clear(q_begin + i + r, 1, first_head + h, 1);
                continue;
              }
              store_row(out + (q_begin + i + r) * out_stride + (first_head + h) * p.head_dim, sums + r * head.padded,
                        head.dim, 1.f / softmax.sum[r]);
            }
          },
          [&](int64_t h, int64_t i, int64_t rows) { clear(q_begin + i, rows, first_head + h, 1); });
    }
  });
}

// ---- backward ----

// Where dq goes: to its tensor, or, where the keys of a sequence are cut into parts, to a float32 copy for each part.
template <class T>
struct QueryGradients {
  T* dq;            // [total, heads, dim]
  float* partials;  // [parts][total, heads, padded], or null
  int64_t total, heads;
  HeadDim head;

  void clear(int64_t part, int64_t row, int64_t h) const {
    if (partials != nullptr) {
      std::memset(partial(part, row, h), 0, static_cast<size_t>(head.padded) * sizeof(float));
    } else {
      std::memset(dq + (row * heads + h) * head.dim, 0, static_cast<size_t>(head.dim) * sizeof(T));
    }
  }
  void set(int64_t part, int64_t row, int64_t h, const float* sums, float factor) const {
    if (partials != nullptr) {
      store_row(partial(part, row, h), sums, head.padded, factor);
    } else {
      store_row(dq + (row * heads + h) * head.dim, sums, head.dim, factor);
    }
  }
  // Adds the parts of all heads of a row, in order.
  void add_parts(int64_t row, int64_t parts) const {
    for (int64_t h = 0; h < heads; ++h) {
      float* const sum = partial(0, row, h);
      for (int64_t part = 1; part < parts; ++part) store_sum(sum, sum, partial(part, row, h), head.padded, 1.f);
      store_row(dq + (row * heads + h) * head.dim, sum, head.dim, 1.f);
    }
  }

 private:
  float* partial(int64_t part, int64_t row, int64_t h) const {
    return partials + ((part * total + row) * heads + h) * head.padded;
  }
};

template <class T, class ScoresOf>
void backward(const AttentionBackwardParams& params, const Host& host, const ScoresOf& scores_of) {
  const AttentionProblem& p = params.problem;
  const Packed packed(p);
  const HeadDim head(p.head_dim);
  const ScoreScale scale(p.softmax_scale);
  const int64_t group = p.heads_q / p.heads_kv, k_stride = static_cast<int64_t>(p.heads_kv) * p.head_dim;
  auto *const dk = static_cast<T*>(params.dk), *const dv = static_cast<T*>(params.dv);
  Scratch shared(host, LongestFirst::bytes(p.batch));
  const LongestFirst order(shared, packed.queries, packed.keys);
  const int64_t whole = static_cast<int64_t>(p.batch) * p.heads_kv;
  const int64_t partial = static_cast<int64_t>(p.total_q) * p.heads_q * head.padded;
  const int64_t parts = parts_of(whole, kBackwardItems,
                                 smaller(order.most_keys() / kLeastPartKeys,
                                         kMostPartialBytes / larger(1, partial * static_cast<int64_t>(sizeof(float)))));
  const int64_t most_keys = round_up(ceil_div(order.most_keys(), larger(1, parts)), kPanel);  // of an item
  Scratch of_parts(host, Scratch::bytes_of<float>(parts > 1 ? parts * partial : 1));
  const QueryGradients<T> dq{static_cast<T*>(params.dq), parts > 1 ? of_parts.next<float>(parts * partial) : nullptr,
                             p.total_q, p.heads_q, head};

  const auto clear_queries = [&](int64_t part, int64_t row, int64_t rows, int64_t first_head, int64_t heads) {
    for (int64_t r = row; r < row + rows; ++r) {
      for (int64_t h = first_head; h < first_head + heads; ++h) dq.clear(part, r, h);
    }
  };
  const auto clear_keys = [&](int64_t row, int64_t rows, int64_t first_head, int64_t heads) {
    const auto bytes = static_cast<size_t>(heads * p.head_dim) * sizeof(T);
    for (int64_t r = row; r < row + rows; ++r) {
      std::memset(dk + r * k_stride + first_head * p.head_dim, 0, bytes);
      std::memset(dv + r * k_stride + first_head * p.head_dim, 0, bytes);
    }
  };
  // The first item has the rows of no sequence.
  over(host, 1 + whole * parts, [&](Items& items) {
    Scratch scratch(host, BackwardMemory::bytes(most_keys, head));
    const BackwardMemory memory(scratch, most_keys, head);
    for (int64_t item; items.next(item);) {
      if (item == 0) {
        const int64_t begin = packed.queries.begin(0), end = packed.queries.begin(p.batch);
        const int64_t k_begin = packed.keys.begin(0), k_end = packed.keys.begin(p.batch);
        for (int64_t part = 0; part < larger(parts, 1); ++part) {
          clear_queries(part, 0, begin, 0, p.heads_q);
          clear_queries(part, end, p.total_q - end, 0, p.heads_q);
        }
        clear_keys(0, k_begin, 0, p.heads_kv);
        clear_keys(k_end, p.total_k - k_end, 0, p.heads_kv);
        continue;
      }
      const AttentionItem of(item, p.heads_kv, parts);
      const int64_t sequence = order[of.at], key_head = of.key_head, part = of.part;
      const int64_t q_begin = packed.queries.begin(sequence), q_length = packed.queries.rows(sequence);
      const int64_t k_begin = packed.keys.begin(sequence), k_length = packed.keys.rows(sequence);
      const int64_t attending = smaller(q_length, p.max_seqlen_q), attended = smaller(k_length, p.max_seqlen_k);
      const int64_t first_head = key_head * group;
      const auto [first_key, last_key] = Part(attended, part, parts, kPanel);
      clear_queries(part, q_begin + attending, q_length - attending, first_head, group);
      if (part == 0) clear_keys(k_begin + attended, k_length - attended, key_head, 1);
      const SequenceHeads<T> x{.q = rows_of<T>(p.q, q_begin, first_head),
                               .q_head_stride = p.q.head_stride,
                               .heads = group,
                               .k = rows_of<T>(p.k, k_begin, key_head),
                               .v = rows_of<T>(p.v, k_begin, key_head),
                               .q_rows = attending,
                               .k_rows = attended};
      const HeadRows<T> out = rows_of<T>(params.out, q_begin, first_head);
      attend_backward(
          memory, x, rows_of<T>(params.dout, q_begin, first_head), params.dout.head_stride, first_key, last_key, head,
          scale, SeenFromEnd(p, q_length, k_length),
          [&](int64_t h) { return scores_of(sequence, first_head + h, k_length - q_length); },
          [&](int64_t h, int64_t i, int64_t rows, const float* dout, GradientRows& from) {
            const int64_t at = (first_head + h) * p.total_q + q_begin + i;
            for (int64_t r = 0; r < rows; ++r) {
              const T* const row = out.row(i + r) + h * params.out.head_stride;
              Vec sum{};
              for (int64_t d = 0; d < head.padded; d += kLanes) {
                prefetch_next_head(row + d, head);
                sum += load(dout + r * head.padded + d) *
                       (d + kLanes <= head.dim ? load(row + d) : load_first(row + d, head.dim - d));
              }
              const float dlse = params.dlse != nullptr ? params.dlse[at + r] : 0.f;
              from.set(r, params.lse[at + r], sum_of_lanes(sum) - dlse);
            }
          },
          [&](int64_t h, int64_t i, int64_t rows, const float* sums) {
            for (int64_t r = 0; r < rows; ++r) {
              dq.set(part, q_begin + i + r, first_head + h, sums + r * head.padded, p.softmax_scale);
            }
          },
          [&](int64_t h, int64_t i, int64_t rows) { clear_queries(part, q_begin + i, rows, first_head + h, 1); });
      for (int64_t j = first_key; j < last_key; ++j) {
        const int64_t to = (k_begin + j) * k_stride + key_head * p.head_dim, from = (j - first_key) * head.padded;
        store_row(dk + to, memory.dk + from, head.dim, scale.size);
        store_row(dv + to, memory.dv + from, head.dim, 1.f);
      }
    }
  });
  if (parts <= 1) return;
  constexpr int64_t kRows = 32;
  over(host, ceil_div(p.total_q, kRows), [&](Items& items) {
    for (int64_t item; items.next(item);) {
      for (int64_t row = item * kRows; row < smaller((item + 1) * kRows, p.total_q); ++row) dq.add_parts(row, parts);
    }
  });
}

}  // namespace

void varlen_attention(const AttentionForwardParams& params, const Host& host) {
  with_element(params.problem.dtype, [&]<class T>(T*) {
    with_scores(params.problem, [&](const auto& scores_of) { forward<T>(params, host, scores_of); });
  });
}

void varlen_attention_backward(const AttentionBackwardParams& params, const Host& host) {
  with_element(params.problem.dtype, [&]<class T>(T*) {
    with_scores(params.problem, [&](const auto& scores_of) { backward<T>(params, host, scores_of); });
  });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
