// window_attention.
//
// Floor     4 tokens^2 head_dim FLOPs a window and head, and the bytes of qkv and out. Rows of scores are whole vectors: with
//           AVX-512 49 of 64 columns count.
// Measured  Two threads of an AMD EPYC with AVX2, whose MKL runs products at 128 GFLOP/s; float32, heads of 32. Windows of
//           49 tokens: 43 to 65 GFLOP/s, the less, the larger the image. 64 tokens 69, 144 and more 86 to 104. With data in
//           cache half of the time of 49 tokens goes into products, a fifth into the softmax and a fifth into copies of
//           rows of 128 bytes; images that do not fit it add another fifth, which waits for those rows.
#include "families.h"
#include "window.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Memory of one thread.
struct Buffers {
  const WindowSizes& z;
  int64_t bias_room;
  bool cosine;
  float *q = nullptr, *k = nullptr, *v = nullptr, *kt = nullptr, *s = nullptr, *o = nullptr;
  float *inverse = nullptr, *lengths = nullptr, *bias = nullptr;
  Places places = {};
  template <class Take>
  void lay(const Take& take) {
    const int64_t all = z.tokens * z.wide;
    take(q, all);
    take(k, cosine ? all : 0);
    take(v, all);
    take(kt, packed_columns(z.tokens, z.wide));
    take(s, z.queries * z.stride);
    take(o, z.queries * z.wide);
    take(inverse, z.queries);
    take(lengths, cosine ? z.tokens : 0);
    take(bias, bias_room);
    places.lay(z, take);
  }
};

template <class T>
void forward_head(const WindowForwardParams& params, const WindowSizes& z, const WindowBias& bias, const Buffers& b,
                  int64_t window, int64_t head, const int64_t* rows, const float* parts, const NextHead& next,
                  float factor) {
  const WindowProblem& p = z.problem;
  copy_rows(b.q, z, part_rows<T>(p, 0, head, rows));
  copy_rows(b.v, z, part_rows<T>(p, 2, head, rows));
  const HeadRows<T> k = part_rows<T>(p, 1, head, rows);
  if (p.logit_scale != nullptr) {
    copy_rows(b.k, z, k);
    make_unit(b.q, z, b.lengths);
    make_unit(b.k, z, b.lengths);
    pack_columns<float>(b.kt, z.tokens, z.wide, [&](int64_t i) { return b.k + i * z.wide; });
  } else {
    pack_columns<T>(b.kt, z.tokens, z.depth, k);
  }
  auto* const out = static_cast<T*>(params.out) + head * z.depth;
  float* const lse = z.whole ? nullptr : params.lse + (window * z.heads + head) * z.tokens;
  for (int64_t first = 0; first < z.tokens; first += z.queries) {
    const int64_t m = smaller(z.queries, z.tokens - first);
    const float* const bias_rows = bias.rows(head, first, m, b.bias);
    for (int64_t r = 0, some; r < m; r += some) {
      some = z.scored_at_once(m - r);
      const int64_t at = first + r;
      prefetch_parts<T>(next, z, at, some);
      for (int64_t i = at; i < at + some; ++i) {
        if (rows[i] >= 0) prefetch_row<1>(out + rows[i] * p.width, z.depth);
      }
      const Added added(z, bias_rows + r * bias.stride(), bias.stride(), parts, at, factor);
      probabilities(b.s + r * z.stride, some, z, b.q + at * z.wide, b.kt, added, b.inverse + r,
                    lse == nullptr ? nullptr : lse + at);
    }
    times_rows(m, z.wide, z.tokens, b.o, z.wide, b.s, z.stride, 1, b.v, z.wide);
    for (int64_t i = 0; i < m; ++i) {
      if (b.inverse[i] != 0.f) continue;
      // No key is seen, whatever the values are.
      for (int64_t d = 0; d < z.wide; d += kLanes) store(b.o + i * z.wide + d, Vec{});
    }
    scatter_rows(out, p.width, rows + first, b.o, m, z, nullptr, [&](int64_t i) { return b.inverse[i]; });
  }
}

template <class T>
void forward(const WindowForwardParams& params, const Host& host) {
  const WindowSizes z(params.problem);
  if (z.windows * z.heads == 0) return;
  WindowBias bias(z);
  Scratch shared(host, bytes_of_layout(bias) + Scratch::bytes_of<float>(z.heads));
  place_layout(bias, shared);
  float* const factors = shared.next<float>(z.heads);
  bias.make();
  head_factors(z.problem, factors);
  const WindowItems cut(z, /*products=*/2, /*least_windows=*/1, /*most_shares=*/z.windows);
  over(host, cut.count(), [&](Items& items) {
    Buffers b{.z = z, .bias_room = bias.room(), .cosine = z.problem.logit_scale != nullptr};
    Scratch memory(host, bytes_of_layout(b));
    place_layout(b, memory);
    for (int64_t item; items.next(item);) {
      const int64_t share = item / cut.head_parts, head0 = item % cut.head_parts * cut.heads_each;
      const int64_t heads = smaller(z.heads, head0 + cut.heads_each);
      for_each_head(z, b.places, share * cut.share, smaller(z.windows, (share + 1) * cut.share), head0, heads,
                    [&](int64_t w, int64_t h, const int64_t* rows, const float* parts, const NextHead& next) {
                      forward_head<T>(params, z, bias, b, w, h, rows, parts, next, factors[h]);
                    });
    }
  });
}

}  // namespace

void window_attention(const WindowForwardParams& params, const Host& host) {
  with_element(params.problem.dtype, [&]<class T>(T*) { forward<T>(params, host); });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
