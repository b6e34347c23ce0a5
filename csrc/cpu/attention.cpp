// varlen_attention and its backward.
#include "attention.h"

#include "families.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Fewer items than that are cut, so that threads have something to share.
constexpr int64_t kItems = 16;
// Queries times heads of an item that is cut: packing k and v again costs a few percent of attending that often.
constexpr int64_t kLeastCut = 192;

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
      return CappedScores{p.softcap, slope, offset};
    });
  }
}

// ---- forward ----

template <class T, class ScoresOf>
void forward(const AttentionForwardParams& params, const Host& host, const ScoresOf& scores_of) {
  const AttentionProblem& p = params.problem;
  const Packed packed(p);
  const HeadDim head(p.head_dim);
  const int64_t group = p.heads_q / p.heads_kv, out_stride = static_cast<int64_t>(p.heads_q) * p.head_dim;
  auto* const out = static_cast<T*>(params.out);
  Scratch shared(host, LongestFirst::bytes(p.batch));
  const LongestFirst order(shared, packed.queries, packed.keys);
  const int64_t whole = static_cast<int64_t>(p.batch) * p.heads_kv;
  const int64_t parts =
      whole == 0 ? 0 : larger(1, smaller(ceil_div(kItems, whole), order.most_queries() * group / kLeastCut));

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
      const int64_t sequence = order[(item - 1) / (p.heads_kv * parts)];
      const int64_t key_head = (item - 1) % p.heads_kv, part = (item - 1) / p.heads_kv % parts;
      const int64_t q_begin = packed.queries.begin(sequence), q_length = packed.queries.rows(sequence);
      const int64_t k_begin = packed.keys.begin(sequence), k_length = packed.keys.rows(sequence);
      const int64_t each = round_up(ceil_div(q_length, parts), kQueryBlock);
      const int64_t first = smaller(part * each, q_length), last = smaller(first + each, q_length);
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
          memory, x, first, attending, head, p.softmax_scale, SeenFromEnd(p, q_length, k_length),
          [&](int64_t h) { return scores_of(sequence, first_head + h, k_length - q_length); },
          [&](int64_t h, int64_t i, int64_t rows, const float* sums, const Softmax& softmax) {
            alignas(64) float lse[kQueryBlock];
            softmax.log_sum_exp(lse, rows);
            std::memcpy(params.lse + (first_head + h) * p.total_q + q_begin + i, lse,
                        static_cast<size_t>(rows) * sizeof(float));
            for (int64_t r = 0; r < rows; ++r) {
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

}  // namespace

void varlen_attention(const AttentionForwardParams& params, const Host& host) {
  with_element(params.problem.dtype, [&]<class T>(T*) {
    with_scores(params.problem, [&](const auto& scores_of) { forward<T>(params, host, scores_of); });
  });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
