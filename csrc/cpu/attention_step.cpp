// attention_step and its backward: attention of a block of queries to a block of keys, masked by positions, added to a
// state in float32.
//
// The floor is that of attention.cpp and the bytes of the state: forward 8 head_dim + 8 a query and head, backward 8
// head_dim a query and 16 head_dim a key. The state is merged when all keys of a block of queries are done. Rows that see
// no key are copied, bit for bit.
//
// Measured on two threads of an AMD EPYC with AVX2, 512 queries and keys, 4 heads of 64 with 2 of k and v: 97 % of the speed
// of MKL's products forward, 95 % backward.
#include "attention.h"

#include "families.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

class SeenByPosition {
 public:
  SeenByPosition(const StepPositions& positions, int64_t keys) : s_(positions), keys_(keys) {}
  WARPFORM_INLINE void operator()(int64_t i, int32_t& first, int32_t& last) const {
    const int64_t at = i * s_.q_stride;
    first = static_cast<int32_t>(smaller(larger(at + s_.first_key, 0) / s_.k_stride, keys_));
    last = static_cast<int32_t>(smaller(larger(at + s_.last_key, 0) / s_.k_stride, keys_));
  }

 private:
  const StepPositions& s_;
  int64_t keys_;
};

// The rows of a sequence from its begin on, of tensors and of numbers for each query.
struct StepRows {
  const StepLayout& layout;
  int64_t sequence, begin;

  template <class T>
  HeadRows<T> operands(const HeadsView& view, int64_t head, int64_t batch_offset) const {
    return {
        static_cast<const T*>(view.data) + begin * view.row_stride + head * view.head_stride + sequence * batch_offset,
        view.row_stride};
  }
  // Null where the state is.
  const float* state(const StateView& view, int64_t head, int64_t i) const {
    if (view.data == nullptr) return nullptr;
    return view.data + (begin + i) * view.row_stride + head * view.head_stride + sequence * view.batch_offset;
  }
  // Where lse and delta have query i.
  int64_t number(int64_t head, int64_t i) const {
    return begin + i + head * layout.head_rows + sequence * layout.sequence_rows;
  }
};

Sequences queries_of(const AttentionProblem& p) { return {p.cu_seqlens_q, p.batch, p.total_q, p.max_seqlen_q}; }
Sequences keys_of(const AttentionProblem& p) { return {p.cu_seqlens_k, p.batch, p.total_k, p.max_seqlen_k}; }

// A row of the state goes on as it is.
WARPFORM_INLINE void carry(float* to, const float* before, int64_t dim) {
  if (before == nullptr) {
    std::memset(to, 0, static_cast<size_t>(dim) * sizeof(float));
  } else {
    std::memcpy(to, before, static_cast<size_t>(dim) * sizeof(float));
  }
}

PlainScores plain_scores(int64_t) { return {}; }

// ---- forward ----

template <class T>
void forward(const AttentionStepParams& params, const Host& host) {
  const AttentionProblem& p = params.problem;
  const Sequences queries = queries_of(p), keys = keys_of(p);
  const HeadDim head(p.head_dim);
  const ScoreScale scale(p.softmax_scale);
  const int64_t group = p.heads_q / p.heads_kv, out_stride = static_cast<int64_t>(p.heads_q) * p.head_dim;
  Scratch shared(host, LongestFirst::bytes(p.batch));
  const LongestFirst order(shared, queries, keys);
  const int64_t whole = static_cast<int64_t>(p.batch) * p.heads_kv;
  const int64_t parts = parts_of(whole, kForwardItems, order.most_queries() * group / kLeastPartQueries);

  const auto carry_rows = [&](const StepRows& at, int64_t i, int64_t rows, int64_t first_head, int64_t heads) {
    for (int64_t h = first_head; h < first_head + heads; ++h) {
      for (int64_t r = i; r < i + rows; ++r) {
        carry(params.out + (at.begin + r) * out_stride + h * p.head_dim, at.state(params.out_before, h, r), p.head_dim);
        const int64_t number = at.number(h, r);
        params.lse[number] = params.lse_before != nullptr ? params.lse_before[number] : kMinusInfinity;
      }
    }
  };
  // The first item has the rows of no sequence.
  over(host, 1 + whole * parts, [&](Items& items) {
    Scratch scratch(host, ForwardMemory::bytes(order.most_keys(), head));
    const ForwardMemory memory(scratch, order.most_keys(), head);
    for (int64_t item; items.next(item);) {
      if (item == 0) {
        if (p.cu_seqlens_q == nullptr) continue;
        const int64_t begin = queries.begin(0), end = queries.begin(p.batch);
        carry_rows({params.step, 0, 0}, 0, begin, 0, p.heads_q);
        carry_rows({params.step, 0, end}, 0, p.total_q - end, 0, p.heads_q);
        continue;
      }
      const AttentionItem of(item, p.heads_kv, parts);
      const int64_t sequence = order[of.at], key_head = of.key_head, part = of.part;
      const StepRows of_queries{params.step, sequence, queries.begin(sequence)};
      const StepRows of_keys{params.step, sequence, keys.begin(sequence)};
      const auto [first, last] = Part(queries.rows(sequence), part, parts, kQueryBlock);
      if (first >= last) continue;
      const int64_t first_head = key_head * group;
      const SequenceHeads<T> x{.q = of_queries.operands<T>(p.q, first_head, params.step.q_batch_offset),
                               .q_head_stride = p.q.head_stride,
                               .heads = group,
                               .k = of_keys.operands<T>(p.k, key_head, params.step.k_batch_offset),
                               .v = of_keys.operands<T>(p.v, key_head, params.step.v_batch_offset),
                               .q_rows = last,
                               .k_rows = keys.rows(sequence)};
      attend(
          memory, x, first, last, head, scale, SeenByPosition(params.step.positions, x.k_rows), plain_scores,
          [&](int64_t h, int64_t i, int64_t rows, const float* sums, const Softmax& softmax) {
            alignas(64) float lse[kQueryBlock], before[kQueryBlock], kept[kQueryBlock], added[kQueryBlock];
            softmax.log_sum_exp(lse, rows);
            const int64_t number = of_queries.number(first_head + h, i);
            for (int64_t r = 0; r < rows; ++r) {
              before[r] = params.lse_before != nullptr ? params.lse_before[number + r] : kMinusInfinity;
            }
            for (int64_t r = 0; r < rows; r += kLanes) {
              const Vec a = load(before + r), b = load(lse + r), larger_one = max(a, b);
              const Vec base = larger_one == kMinusInfinity ? Vec{} : larger_one;
              const Vec of_before = exp2((a - base) * kLog2e), of_step = exp2((b - base) * kLog2e);
              const Vec total = of_before + of_step;
              // A row that sees nothing here keeps the bits of its lse.
              store(lse + r, of_step == 0.f ? a : base + log(total));
              store(kept + r, of_before / total);
              store(added + r, of_step / total);
            }
            for (int64_t r = 0; r < rows; ++r) {
              params.lse[number + r] = lse[r];
              if (softmax.sum[r] == 0.f) {
                carry_rows(of_queries, i + r, 1, first_head + h, 1);
                continue;
              }
              float* const to = params.out + (of_queries.begin + i + r) * out_stride + (first_head + h) * p.head_dim;
              const float* const from = sums + r * head.padded;
              const float factor = added[r] / softmax.sum[r];
              const float* const state = of_queries.state(params.out_before, first_head + h, i + r);
              if (state == nullptr) {
                store_row(to, from, head.dim, factor);
                continue;
              }
              for (int64_t d = 0; d < head.dim; d += kLanes) {
                const int64_t n = head.dim - d;
                store_first(to + d, load_first(state + d, n) * kept[r] + load(from + d) * factor, n);
              }
            }
          },
          [&](int64_t h, int64_t i, int64_t rows) { carry_rows(of_queries, i, rows, first_head + h, 1); });
    }
  });
}

// ---- backward ----

template <class T>
void backward(const AttentionStepBackwardParams& params, const Host& host) {
  const AttentionProblem& p = params.problem;
  const Sequences queries = queries_of(p), keys = keys_of(p);
  const HeadDim head(p.head_dim);
  const ScoreScale scale(p.softmax_scale);
  const int64_t group = p.heads_q / p.heads_kv;
  const int64_t q_stride = static_cast<int64_t>(p.heads_q) * p.head_dim;
  const int64_t k_stride = static_cast<int64_t>(p.heads_kv) * p.head_dim;
  Scratch shared(host, LongestFirst::bytes(p.batch));
  const LongestFirst order(shared, queries, keys);

  // to = before + sums * factor, or before alone.
  const auto store_state = [&](float* to, const float* before, const float* sums, float factor) {
    if (sums == nullptr) {
      carry(to, before, head.dim);
    } else if (before == nullptr) {
      store_row(to, sums, head.dim, factor);
    } else {
      store_sum(to, before, sums, head.dim, factor);
    }
  };
  const auto carry_queries = [&](const StepRows& at, int64_t i, int64_t rows, int64_t first_head, int64_t heads) {
    for (int64_t r = i; r < i + rows; ++r) {
      for (int64_t h = first_head; h < first_head + heads; ++h) {
        store_state(params.dq_accumulator + (at.begin + r) * q_stride + h * p.head_dim,
                    at.state(params.dq_before, h, r), nullptr, 0.f);
      }
    }
  };
  const auto carry_keys = [&](const StepRows& at, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < p.heads_kv; ++h) {
        const int64_t to = (at.begin + r) * k_stride + h * p.head_dim;
        store_state(params.dk + to, at.state(params.dk_before, h, r), nullptr, 0.f);
        store_state(params.dv + to, at.state(params.dv_before, h, r), nullptr, 0.f);
      }
    }
  };
  // The first item has the rows of no sequence.
  over(host, 1 + static_cast<int64_t>(p.batch) * p.heads_kv, [&](Items& items) {
    Scratch scratch(host, BackwardMemory::bytes(order.most_keys(), head));
    const BackwardMemory memory(scratch, order.most_keys(), head);
    for (int64_t item; items.next(item);) {
      if (item == 0) {
        if (p.cu_seqlens_q == nullptr) continue;
        const int64_t end = queries.begin(p.batch), k_end = keys.begin(p.batch);
        carry_queries({params.step, 0, 0}, 0, queries.begin(0), 0, p.heads_q);
        carry_queries({params.step, 0, end}, 0, p.total_q - end, 0, p.heads_q);
        carry_keys({params.step, 0, 0}, keys.begin(0));
        carry_keys({params.step, 0, k_end}, p.total_k - k_end);
        continue;
      }
      const int64_t sequence = order[(item - 1) / p.heads_kv], key_head = (item - 1) % p.heads_kv;
      const int64_t first_head = key_head * group;
      const StepRows of_queries{params.step, sequence, queries.begin(sequence)};
      const StepRows of_keys{params.step, sequence, keys.begin(sequence)};
      const SequenceHeads<T> x{.q = of_queries.operands<T>(p.q, first_head, params.step.q_batch_offset),
                               .q_head_stride = p.q.head_stride,
                               .heads = group,
                               .k = of_keys.operands<T>(p.k, key_head, params.step.k_batch_offset),
                               .v = of_keys.operands<T>(p.v, key_head, params.step.v_batch_offset),
                               .q_rows = queries.rows(sequence),
                               .k_rows = keys.rows(sequence)};
      attend_backward(
          memory, x, of_queries.operands<T>(params.dout, first_head, params.step.dout_batch_offset),
          params.dout.head_stride, 0, x.k_rows, head, scale, SeenByPosition(params.step.positions, x.k_rows),
          plain_scores,
          [&](int64_t h, int64_t i, int64_t rows, const float*, GradientRows& from) {
            const int64_t number = of_queries.number(first_head + h, i);
            for (int64_t r = 0; r < rows; ++r) from.set(r, params.lse[number + r], params.delta[number + r]);
          },
          [&](int64_t h, int64_t i, int64_t rows, const float* sums) {
            for (int64_t r = 0; r < rows; ++r) {
              store_state(params.dq_accumulator + (of_queries.begin + i + r) * q_stride + (first_head + h) * p.head_dim,
                          of_queries.state(params.dq_before, first_head + h, i + r), sums + r * head.padded,
                          p.softmax_scale);
            }
          },
          [&](int64_t h, int64_t i, int64_t rows) { carry_queries(of_queries, i, rows, first_head + h, 1); });
      for (int64_t j = 0; j < x.k_rows; ++j) {
        const int64_t to = (of_keys.begin + j) * k_stride + key_head * p.head_dim, from = j * head.padded;
        store_state(params.dk + to, of_keys.state(params.dk_before, key_head, j), memory.dk + from, scale.size);
        store_state(params.dv + to, of_keys.state(params.dv_before, key_head, j), memory.dv + from, 1.f);
      }
    }
  });
}

}  // namespace

void attention_step(const AttentionStepParams& params, const Host& host) {
  with_element(params.problem.dtype, [&]<class T>(T*) { forward<T>(params, host); });
}

void attention_step_backward(const AttentionStepBackwardParams& params, const Host& host) {
  with_element(params.problem.dtype, [&]<class T>(T*) { backward<T>(params, host); });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
