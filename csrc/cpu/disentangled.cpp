// Disentangled attention (DeBERTa, He et al., arXiv 2006.03654) and its backward:
//
//   score(i, j) = softmax_scale * (q_i . k_j + q_i . pos_key[r(i - j)] + k_j . pos_query[r(i - j)])
//
// Distances  The tables are laid out by distance, once an item: columns of consecutive distances, so that the terms of 16
//            queries with 256 keys are one product of 16 rows with 271 columns. From row to row the columns that count move
//            by one. C is therefore stored with rows one element further apart than scores are: that puts every product
//            where its score is, and what is left over at both ends into the gap between two rows of scores.
// Terms      q . pos_key is stored so into the scores themselves, which q k^T is then added to. k . pos_query goes the
//            same way into a tile of its own, [keys][queries], for 256 keys and up to 192 queries; it is added by
//            transposes of 16 x 16 in registers.
// Backward   The gradient of such a product is read by the same trick: the gradients of scores with a row stride that is
//            one larger, zeros in the gaps. Gradients of the tables are summed by distance and at the end of an item by
//            the table's rows, into shares of the item, which the last item of a head adds up in order.
// Holes      Where positions of a sequence are not consecutive, pairs have any distances: there both terms are products of
//            rows, pair by pair, of the tables as they lie.
// Items      A head and some of the sequences; forward some of their blocks of queries.
// Bounds     Products: 8 pairs head_dim FLOPs a head forward, 22 backward, of which 4 and 12 are those of the tables; what
//            groups meet beside their pairs adds 6 % of those of pos_key and 8 % of those of pos_query in long sequences,
//            and half of both in sequences of 32. Bytes are few beside them.
// Measured   Skylake-SP, AVX-512, one thread, a loaded machine, float32, 12 heads of 64, 256 buckets to distance 512:
//            4 x 256 tokens 31 ms forward, 52 of the 84 GFLOP/s of MKL's products, and 97 ms backward, 46 GFLOP/s; 4 of up
//            to 347 tokens 42 ms, 50 GFLOP/s, and 137 ms, 41 GFLOP/s; 8 of up to 126 tokens 14 ms and 39 ms, 26 GFLOP/s:
//            their groups meet many columns beside their pairs, and the tables are laid out for few products.
//            Two threads of an AMD EPYC with AVX2: 86 to 97 % of MKL's speed forward, 77 to 95 % backward.
#include "attention.h"
#include "families.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Rows whose terms are one product.
constexpr int64_t kGroup = 16;
// Queries whose terms with pos_query are made at once.
constexpr int64_t kQueries = 4 * kQueryBlock;
constexpr int64_t kTermStride = kQueries + kGroup;
// The most columns that a group meets.
constexpr int64_t kWidest = larger(kKeyBlock, kQueries) + kGroup;
static_assert(kScoreStride >= kKeyBlock + kGroup, "what is left over of a group's products has room between two rows");
static_assert(kGroup % kLanes == 0 && kPanel % kGroup == 0 && kQueryBlock % kGroup == 0 && kKeyBlock % kGroup == 0);

// Fewer items than that are cut.
constexpr int64_t kDisentangledItems = 32;
// Pairs of an item that is cut, at least: each lays the tables out again, rows that are far apart in memory.
constexpr int64_t kLeastCut = 1 << 16;

// The columns of a table by distance: consecutive ones, as many as windows of the longest sequence reach. Distances that
// are past `reach`, from where the table's row stays the same, share columns of their own at both ends.
class Columns {
 public:
  Columns(int64_t longest, int64_t reach)
      : reach_(reach),
        offset_(round_up(smaller(longest, reach + kWidest + kGroup), kGroup) - 1),
        count_(round_up(2 * (offset_ + 1) + 2 * kGroup, kPanel)) {}

  int64_t count() const { return count_; }
  int64_t distance(int64_t column) const { return smaller(larger(column - offset_, -reach_), reach_); }
  // Where `width` columns begin whose first is of `distance`. A window past the last column has the same row of the
  // table everywhere, and so has the last window.
  int64_t window(int64_t distance, int64_t width) const {
    return smaller(larger(distance + offset_, 0), count_ - width);
  }

 private:
  int64_t reach_, offset_, count_;
};

// One head of a table.
template <class T>
struct Table {
  HeadRows<T> rows;  // null: there is none
  const int32_t* row_of_distance;
  bool given() const { return rows.data != nullptr; }
  int64_t index(int64_t distance) const { return row_of_distance[distance]; }
  const T* row(int64_t distance) const { return rows.row(index(distance)); }
};

template <class T>
Table<T> table_of(const HeadsView& view, const RelativeTables& tables, int64_t head) {
  if (view.data == nullptr) return {{nullptr, 0}, nullptr};
  return {{static_cast<const T*>(view.data) + head * view.head_stride, view.row_stride},
          tables.row_of_distance + tables.reach};
}

// The table that a distance belongs to. Keys go along rows of scores from the first, so a column of pos_key has the
// distance with the other sign.
enum class Side : int64_t { kKey = -1, kQuery = 1 };

// C [m, width] = A [m, depth] times packed columns [first, first + width), multiples of kGroup.
WARPFORM_INLINE void times_window(int64_t m, int64_t width, int64_t depth, float* c, int64_t c_stride, const float* a,
                                  int64_t a_row, const float* panels, int64_t first) {
  const int64_t panel_rows = round_up(depth, kLanes);
  for (int64_t x = 0; x < width;) {
    const int64_t column = first + x, in_panel = column % kPanel;
    const int64_t columns = smaller(kPanel - in_panel, width - x);
    const float* const b = panels + (column - in_panel) * panel_rows + in_panel;
    for (int64_t d = 0; d < depth; d += kChain) {
      const int64_t inner = smaller(depth - d, kChain);
      if (d == 0) {
        gemm<Into::kSet>(m, columns / kLanes, c + x, c_stride, a, a_row, 1, b, kPanel, inner);
      } else {
        gemm<Into::kAdd>(m, columns / kLanes, c + x, c_stride, a + d, a_row, 1, b + d * kPanel, kPanel, inner);
      }
    }
    x += columns;
  }
}

// Where a group's window is in the columns, and how wide.
struct Window {
  int64_t first, width;
  // Of `others` consecutive tokens from the one that the group's first row is at `distance` from.
  Window(const Columns& columns, int64_t distance, int64_t others) : width(round_up(others + kGroup - 1, kGroup)) {
    first = columns.window(distance - (kGroup - 1), width);
  }
};

// c, whose rows are `stride` apart: row r's products of a [rows][padded] with the columns of the distances of `others`
// tokens. `distance`: of the first row and the first of the others.
WARPFORM_INLINE void relative_products(float* c, int64_t stride, const float* a, int64_t rows, int64_t others,
                                       int64_t distance, const Columns& columns, const float* panels,
                                       const HeadDim& head) {
  for (int64_t g = 0; g < rows; g += kGroup) {
    const Window window(columns, distance - g, others);
    times_window(smaller(rows - g, kGroup), window.width, head.dim, c + g * stride - (kGroup - 1), stride + 1,
                 a + g * head.padded, head.padded, panels, window.first);
  }
}

// scores [rows][keys] += factor * terms^T, terms [keys][kTermStride].
WARPFORM_INLINE void add_transposed(float* scores, int64_t rows, int64_t keys, const float* terms, float factor) {
  for (int64_t j = 0; j < keys; j += kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) block[l] = load(terms + (j + l) * kTermStride + r);
      transpose(block);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        float* const at = scores + (r + l) * kScoreStride + j;
        store(at, load(at) + block[l] * factor);
      }
    }
  }
}

// terms [keys][kTermStride] = scores^T, and 0 where `rows` end: what is read of them by rows that are one further apart.
WARPFORM_INLINE void set_transposed(float* terms, const float* scores, int64_t rows, int64_t keys) {
  for (int64_t j = 0; j < keys; j += kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        block[l] = r + l < rows ? load(scores + (r + l) * kScoreStride + j) : Vec{};
      }
      transpose(block);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) store(terms + (j + l) * kTermStride + r, block[l]);
    }
    for (int64_t r = round_up(rows, kLanes); r < round_up(rows, kLanes) + kGroup; r += kLanes) {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) store(terms + (j + l) * kTermStride + r, Vec{});
    }
  }
}

// The positions of a sequence's tokens; null where they are consecutive.
class Places {
 public:
  Places(const int64_t* positions, int64_t rows, int64_t reach) : positions_(positions), reach_(reach) {
    if (positions == nullptr) return;
    for (int64_t i = 1; i < rows; ++i) {
      if (difference(i, i - 1) != 1) return;
    }
    positions_ = nullptr;
  }
  bool consecutive() const { return positions_ == nullptr; }
  int64_t distance(int64_t i, int64_t j) const { return smaller(larger(difference(i, j), -reach_), reach_); }

 private:
  // Wraps around as torch's does.
  int64_t difference(int64_t i, int64_t j) const {
    return static_cast<int64_t>(static_cast<uint64_t>(positions_[i]) - static_cast<uint64_t>(positions_[j]));
  }
  const int64_t* positions_;
  int64_t reach_;
};

// What an item keeps of its head.
template <class T>
struct HeadOf {
  Table<T> pos_key, pos_query;
  const Columns& columns;
  float *key_columns, *query_columns;  // packed, by distance

  static int64_t bytes(const RelativeTables& tables, const Columns& columns, const HeadDim& head) {
    const int64_t each = Scratch::bytes_of<float>(packed_columns(columns.count(), head.dim));
    return (tables.pos_key.data ? each : 0) + (tables.pos_query.data ? each : 0);
  }
  HeadOf(Scratch& scratch, const RelativeTables& tables, const Columns& all, int64_t number, const HeadDim& head)
      : pos_key(table_of<T>(tables.pos_key, tables, number)),
        pos_query(table_of<T>(tables.pos_query, tables, number)),
        columns(all),
        key_columns(pack(scratch, pos_key, Side::kKey, head)),
        query_columns(pack(scratch, pos_query, Side::kQuery, head)) {}

 private:
  float* pack(Scratch& scratch, const Table<T>& table, Side side, const HeadDim& head) const {
    if (!table.given()) return nullptr;
    float* const packed = scratch.next<float>(packed_columns(columns.count(), head.dim));
    pack_columns<T>(
        packed, columns.count(), head.dim,
        [&](int64_t column) { return table.row(static_cast<int64_t>(side) * columns.distance(column)); }, head.dim);
    return packed;
  }
};

// Scores += both terms, pair by pair: q [rows][padded] the queries from i on, k [keys][padded] the keys
// from j on.
template <class T>
void add_by_pair(float* scores, const float* q, const float* k, int64_t rows, int64_t keys, int64_t i, int64_t j,
                 const Places& places, const HeadOf<T>& of, float factor, const HeadDim& head) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* const query = q + r * head.padded;
    for (int64_t c = 0; c < keys; c += kLanes) {
      Vec terms[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        Vec to_position{}, from_position{};
        if (c + l < keys) {
          const int64_t distance = places.distance(i + r, j + c + l);
          if (of.pos_key.given()) {
            const T* const row = of.pos_key.row(distance);
            for (int64_t d = 0; d < head.dim; d += kLanes) {
              to_position += load(query + d) * load_first(row + d, head.dim - d);
            }
          }
          if (of.pos_query.given()) {
            const T* const row = of.pos_query.row(distance);
            const float* const key = k + (c + l) * head.padded;
            for (int64_t d = 0; d < head.dim; d += kLanes) {
              from_position += load(key + d) * load_first(row + d, head.dim - d);
            }
          }
        }
        terms[l] = to_position + from_position * factor;
      }
      transpose(terms);
      Vec sum = terms[0];
      for (int l = 1; l < kLanes; ++l) sum += terms[l];
      float* const at = scores + r * kScoreStride + c;
      store(at, load(at) + sum);
    }
  }
}

// Scores of a block of queries, their numbers from i on, with the keys [j, j + keys): everything but the mask. `terms`
// holds k . pos_query of the block's first query.
template <class T>
WARPFORM_INLINE void scores_of(float* scores, const float* q, int64_t rows, int64_t i, const float* k_columns,
                               const float* k_rows, int64_t j, int64_t keys, const float* terms, const Places& places,
                               const HeadOf<T>& of, float factor, const HeadDim& head) {
  const float* const columns = k_columns + j * head.padded;
  if (places.consecutive() && of.pos_key.given()) {
    relative_products(scores, kScoreStride, q, rows, keys, j - i, of.columns, of.key_columns, head);
    times_columns<Into::kAdd>(rows, keys, head.dim, scores, kScoreStride, q, head.padded, 1, columns);
  } else {
    times_columns(rows, keys, head.dim, scores, kScoreStride, q, head.padded, 1, columns);
  }
  if (!places.consecutive()) {
    add_by_pair(scores, q, k_rows + j * head.padded, rows, keys, i, j, places, of, factor, head);
  } else if (of.pos_query.given()) {
    add_transposed(scores, rows, keys, terms, factor);
  }
}

// Where `keys` end, scores are -inf up to a whole vector, so that probabilities are 0.
WARPFORM_INLINE void mask_end(float* scores, int64_t rows, int64_t keys) {
  if (keys % kLanes == 0) return;
  for (int64_t r = 0; r < rows; ++r) mask_row(scores + r * kScoreStride, round_up(keys, kLanes), 0, keys);
}

// Products may write the 16 elements before a block.
WARPFORM_INLINE int64_t score_floats() { return kGroup + kQueryBlock * kScoreStride; }
WARPFORM_INLINE int64_t term_floats() { return kGroup + kKeyBlock * kTermStride; }

// A call: its sequences and how they are dealt to items.
struct Call {
  const AttentionProblem& p;
  Sequences sequences;
  HeadDim head;
  ScoreScale scale;
  int64_t longest = 0, parts = 1;
  double work = 0;

  explicit Call(const AttentionProblem& problem)
      : p(problem),
        sequences{problem.cu_seqlens_q, problem.batch, problem.total_q, 0},
        head(problem.head_dim),
        scale(problem.softmax_scale) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t n = sequences.rows(b);
      longest = larger(longest, n);
      work += static_cast<double>(n) * static_cast<double>(n);
    }
    const auto most = static_cast<int64_t>(work / kLeastCut);
    parts = larger(1, smaller(ceil_div(kDisentangledItems, larger(p.heads_q, 1)), most));
  }
  // The part of what begins after `before` of the work.
  int64_t part(double before) const {
    return smaller(static_cast<int64_t>(before / work * static_cast<double>(parts)), parts - 1);
  }

  Places places(const RelativeTables& tables, int64_t begin, int64_t rows) const {
    return {tables.positions ? tables.positions + begin : nullptr, rows, tables.reach};
  }
};

template <class T>
HeadRows<T> rows_of(const HeadsView& view, int64_t row, int64_t head) {
  return {static_cast<const T*>(view.data) + row * view.row_stride + head * view.head_stride, view.row_stride};
}

// ---- forward ----

struct Memory {
  float *k_columns, *k_rows, *v_panels, *q, *scores, *terms, *out;
  Softmax* softmax;

  static int64_t bytes(int64_t longest, const HeadDim& head) {
    return Scratch::bytes_of<float>(packed_columns(longest, head.dim)) +
           Scratch::bytes_of<float>(longest * head.padded) + Scratch::bytes_of<float>(row_panels(longest, head)) +
           2 * Scratch::bytes_of<float>(kQueries * head.padded) + Scratch::bytes_of<float>(score_floats()) +
           Scratch::bytes_of<float>(term_floats()) + Scratch::bytes_of<Softmax>(kQueries / kQueryBlock);
  }
  Memory(Scratch& scratch, int64_t longest, const HeadDim& head)
      : k_columns(scratch.next<float>(packed_columns(longest, head.dim))),
        k_rows(scratch.next<float>(longest * head.padded)),
        v_panels(scratch.next<float>(row_panels(longest, head))),
        q(scratch.next<float>(kQueries * head.padded)),
        scores(scratch.next<float>(score_floats()) + kGroup),
        terms(scratch.next<float>(term_floats()) + kGroup),
        out(scratch.next<float>(kQueries * head.padded)),
        softmax(scratch.next<Softmax>(kQueries / kQueryBlock)) {}
};

// Queries [first, last) of a sequence, at most kQueries, whose k and v are packed.
template <class T>
WARPFORM_INLINE void attend_queries(const Memory& memory, const Call& call, const HeadOf<T>& of, const Places& places,
                                    const HeadRows<T>& q, int64_t first, int64_t last, int64_t n) {
  const HeadDim& head = call.head;
  const int64_t queries = last - first;
  pack_rows(memory.q, HeadRows<T>{q.row(first), q.stride}, queries, head, call.scale.sign);
  for (int64_t j = 0; j < n; j += kKeyBlock) {
    const int64_t keys = smaller(kKeyBlock, n - j);
    if (places.consecutive() && of.pos_query.given()) {
      relative_products(memory.terms, kTermStride, memory.k_rows + j * head.padded, keys, queries, first - j,
                        of.columns, of.query_columns, head);
    }
    for (int64_t x = 0; x < queries; x += kQueryBlock) {
      const int64_t rows = smaller(kQueryBlock, queries - x);
      scores_of(memory.scores, memory.q + x * head.padded, rows, first + x, memory.k_columns, memory.k_rows, j, keys,
                memory.terms + x, places, of, call.scale.sign, head);
      mask_end(memory.scores, rows, keys);
      Softmax& softmax = memory.softmax[x / kQueryBlock];
      softmax.factor = call.scale.exponent;
      softmax.unit = call.scale.size;
      softmax.add(memory.scores, rows, keys, j == 0);
      float* const out = memory.out + x * head.padded;
      if (j == 0) {
        times_row_panels<Into::kSet>(rows, keys, out, memory.scores, kScoreStride, 1, memory.v_panels, n, j, head);
      } else {
        times_row_panels<Into::kScaled>(rows, keys, out, memory.scores, kScoreStride, 1, memory.v_panels, n, j, head,
                                        softmax.scale);
      }
    }
  }
}

template <class T>
void forward(const DisentangledParams& params, const Host& host) {
  const Call call(params.attention.problem);
  const AttentionProblem& p = call.p;
  const HeadDim& head = call.head;
  const RelativeTables& tables = params.tables;
  const Columns columns(call.longest, tables.reach);
  const int64_t out_stride = static_cast<int64_t>(p.heads_q) * p.head_dim;
  auto* const out = static_cast<T*>(params.attention.out);
  float* const lse = params.attention.lse;
  over(host, p.heads_q * call.parts, [&](Items& items) {
    Scratch scratch(host, Memory::bytes(call.longest, head));
    const Memory memory(scratch, call.longest, head);
    for (int64_t item; items.next(item);) {
      const int64_t h = item / call.parts, part = item % call.parts;
      const auto clear = [&](int64_t row) {
        std::memset(out + row * out_stride + h * p.head_dim, 0, static_cast<size_t>(p.head_dim) * sizeof(T));
        lse[h * p.total_q + row] = kMinusInfinity;
      };
      if (part == 0) {  // the rows of no sequence
        for (int64_t row = 0; row < call.sequences.begin(0); ++row) clear(row);
        for (int64_t row = call.sequences.begin(p.batch); row < p.total_q; ++row) clear(row);
      }
      if (call.longest == 0) continue;
      Scratch of_head(host, HeadOf<T>::bytes(tables, columns, head));
      const HeadOf<T> of(of_head, tables, columns, h, head);
      double before = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t begin = call.sequences.begin(b), n = call.sequences.rows(b);
        const Places places = call.places(tables, begin, n);
        bool packed = false;
        for (int64_t i = 0; i < n; i += kQueries) {
          const int64_t last = smaller(i + kQueries, n);
          const bool mine = call.part(before) == part;
          before += static_cast<double>(n) * static_cast<double>(last - i);
          if (!mine) continue;
          if (!packed) {
            const HeadRows<T> k = rows_of<T>(p.k, begin, h);
            pack_key_columns(memory.k_columns, k, n, head);
            if (of.pos_query.given()) pack_rows(memory.k_rows, k, n, head, 1.f);
            pack_row_panels(memory.v_panels, rows_of<T>(p.v, begin, h), n, head);
            packed = true;
          }
          attend_queries(memory, call, of, places, rows_of<T>(p.q, begin, h), i, last, n);
          for (int64_t x = 0; x < last - i; x += kQueryBlock) {
            const Softmax& softmax = memory.softmax[x / kQueryBlock];
            const int64_t rows = smaller(kQueryBlock, last - i - x), row = begin + i + x;
            alignas(64) float some[kQueryBlock];
            softmax.log_sum_exp(some, rows);
            std::memcpy(lse + h * p.total_q + row, some, static_cast<size_t>(rows) * sizeof(float));
            for (int64_t r = 0; r < rows; ++r) {
              if (softmax.sum[r] == 0.f) {
                clear(row + r);
                continue;
              }
              store_row(out + (row + r) * out_stride + h * p.head_dim, memory.out + (x + r) * head.padded, head.dim,
                        1.f / softmax.sum[r]);
            }
          }
        }
      }
    }
  });
}

// ---- backward ----

// The gradient of one head of a table.
struct TableSums {
  float* rows;   // [columns][padded], the table by distance
  float* sums;   // the same shape: the gradient by distance
  float* share;  // [rows that distances reach][padded]: the item's part of the gradient
  int64_t first_row;

  float* share_of(int64_t index, const HeadDim& head) const { return share + (index - first_row) * head.padded; }
};

// The shares of all items: [heads][parts][tables][rows that distances reach][padded].
struct Shares {
  float* data;
  int64_t tables, first_row, rows, padded;
  Shares(const RelativeTables& all, const HeadDim& head)
      : data(nullptr),
        tables((all.pos_key.data ? 1 : 0) + (all.pos_query.data ? 1 : 0)),
        first_row(all.row_of_distance[0]),
        rows(all.row_of_distance[2 * all.reach] - first_row + 1),
        padded(head.padded) {}
  int64_t floats(int64_t items) const { return items * tables * rows * padded; }
  float* share(int64_t item, int64_t table) const { return data + (item * tables + table) * rows * padded; }
};

struct RelativeBackwardMemory {
  float *k_columns, *v_columns, *k_rows, *dk, *dv, *q, *dout, *dq, *scores, *dscores, *terms, *dterms;
  GradientRows* from;  // of kQueries
  float* table_floats;

  static int64_t bytes(int64_t longest, const Columns& columns, const HeadDim& head) {
    return 2 * Scratch::bytes_of<float>(packed_columns(longest, head.dim)) +
           3 * Scratch::bytes_of<float>(longest * head.padded) + 3 * Scratch::bytes_of<float>(kQueries * head.padded) +
           2 * Scratch::bytes_of<float>(score_floats()) + 2 * Scratch::bytes_of<float>(term_floats()) +
           Scratch::bytes_of<GradientRows>(kQueries / kQueryBlock) +
           Scratch::bytes_of<float>(4 * columns.count() * head.padded);
  }
  RelativeBackwardMemory(Scratch& scratch, int64_t longest, const Columns& columns, const HeadDim& head)
      : k_columns(scratch.next<float>(packed_columns(longest, head.dim))),
        v_columns(scratch.next<float>(packed_columns(longest, head.dim))),
        k_rows(scratch.next<float>(longest * head.padded)),
        dk(scratch.next<float>(longest * head.padded)),
        dv(scratch.next<float>(longest * head.padded)),
        q(scratch.next<float>(kQueries * head.padded)),
        dout(scratch.next<float>(kQueries * head.padded)),
        dq(scratch.next<float>(kQueries * head.padded)),
        scores(scratch.next<float>(score_floats()) + kGroup),
        dscores(scratch.next<float>(score_floats()) + kGroup),
        terms(scratch.next<float>(term_floats()) + kGroup),
        dterms(scratch.next<float>(term_floats()) + kGroup),
        from(scratch.next<GradientRows>(kQueries / kQueryBlock)),
        table_floats(scratch.next<float>(4 * columns.count() * head.padded)) {
    // The gaps between rows stay 0.
    std::memset(dscores - kGroup, 0, static_cast<size_t>(score_floats()) * sizeof(float));
    std::memset(dterms - kGroup, 0, static_cast<size_t>(term_floats()) * sizeof(float));
  }
};

// Zeros after the gradients of the keys: what is read of them by rows that are one further apart.
WARPFORM_INLINE void clear_end(float* gradients, int64_t rows, int64_t keys) {
  for (int64_t r = 0; r < rows; ++r) {
    float* const end = gradients + r * kScoreStride + round_up(keys, kLanes);
    for (int64_t c = 0; c < kGroup; c += kLanes) store(end + c, Vec{});
  }
}

// The gradients through the products of relative_products. gradients: of those, rows `stride` apart, [rows][others], with
// zeros in the gaps; a [rows][padded] as there, da its gradient.
WARPFORM_INLINE void relative_gradients(const float* gradients, int64_t stride, const float* a, float* da, int64_t rows,
                                        int64_t others, int64_t distance, const Columns& columns,
                                        const TableSums& table, const HeadDim& head) {
  const int64_t met = others + kGroup - 1;
  for (int64_t g = 0; g < rows; g += kGroup) {
    const int64_t at = Window(columns, distance - g, others).first * head.padded, m = smaller(rows - g, kGroup);
    const float* const view = gradients + g * stride - (kGroup - 1);
    times_rows<Into::kAdd>(m, head.padded, met, da + g * head.padded, head.padded, view, stride + 1, 1, table.rows + at,
                           head.padded);
    times_rows<Into::kAdd>(met, head.padded, m, table.sums + at, head.padded, view, 1, stride + 1, a + g * head.padded,
                           head.padded);
  }
}

// to += factor * from, [padded] += [dim].
template <class T>
WARPFORM_INLINE void add_row(float* to, const T* from, float factor, const HeadDim& head) {
  for (int64_t d = 0; d < head.dim; d += kLanes) {
    store(to + d, load(to + d) + load_first(from + d, head.dim - d) * factor);
  }
}

// The gradients through the terms of add_by_pair.
template <class T>
void gradients_by_pair(const float* gradients, const float* q, const float* k, float* dq, float* dk, int64_t rows,
                       int64_t keys, int64_t i, int64_t j, const Places& places, const HeadOf<T>& of,
                       const TableSums& key, const TableSums& query, float factor, const HeadDim& head) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < keys; ++c) {
      const float gradient = gradients[r * kScoreStride + c];
      const int64_t distance = places.distance(i + r, j + c);
      if (of.pos_key.given()) {
        const int64_t index = of.pos_key.index(distance);
        add_row(dq + r * head.padded, of.pos_key.rows.row(index), gradient, head);
        add_row(key.share_of(index, head), q + r * head.padded, gradient, head);
      }
      if (of.pos_query.given()) {
        const int64_t index = of.pos_query.index(distance);
        add_row(dk + c * head.padded, of.pos_query.rows.row(index), gradient * factor, head);
        add_row(query.share_of(index, head), k + c * head.padded, gradient, head);
      }
    }
  }
}

// Queries [first, last) of a sequence, at most kQueries, whose k and v are packed: adds to dk, dv and the tables' sums,
// and leaves dq over softmax_scale in the memory.
template <class T>
WARPFORM_INLINE void attend_queries_backward(const RelativeBackwardMemory& memory, const Call& call,
                                             const HeadOf<T>& of, const TableSums& key, const TableSums& query,
                                             const Places& places, int64_t first, int64_t last, int64_t n) {
  const HeadDim& head = call.head;
  const int64_t queries = last - first, padded = head.padded;
  const bool by_distance = places.consecutive();
  std::memset(memory.dq, 0, static_cast<size_t>(queries * padded) * sizeof(float));
  for (int64_t j = 0; j < n; j += kKeyBlock) {
    const int64_t keys = smaller(kKeyBlock, n - j);
    const float* const k = memory.k_rows + j * padded;
    float *const dk = memory.dk + j * padded, *const dv = memory.dv + j * padded;
    if (by_distance && of.pos_query.given()) {
      relative_products(memory.terms, kTermStride, k, keys, queries, first - j, of.columns, of.query_columns, head);
    }
    for (int64_t x = 0; x < queries; x += kQueryBlock) {
      const int64_t rows = smaller(kQueryBlock, queries - x);
      const float *const q = memory.q + x * padded, *const dout = memory.dout + x * padded;
      float* const dq = memory.dq + x * padded;
      scores_of(memory.scores, q, rows, first + x, memory.k_columns, memory.k_rows, j, keys, memory.terms + x, places,
                of, call.scale.sign, head);
      times_columns(rows, keys, head.dim, memory.dscores, kScoreStride, dout, padded, 1, memory.v_columns + j * padded);
      mask_end(memory.scores, rows, keys);
      score_gradients<false>(memory.scores, memory.dscores, nullptr, rows, keys, call.scale.exponent,
                             memory.from[x / kQueryBlock]);
      clear_end(memory.dscores, rows, keys);
      times_rows<Into::kAdd>(keys, padded, rows, dv, padded, memory.scores, 1, kScoreStride, dout, padded);
      times_rows<Into::kAdd>(keys, padded, rows, dk, padded, memory.dscores, 1, kScoreStride, q, padded);
      times_rows<Into::kAdd>(rows, padded, keys, dq, padded, memory.dscores, kScoreStride, 1, k, padded);
      if (!by_distance) {
        gradients_by_pair(memory.dscores, q, k, dq, dk, rows, keys, first + x, j, places, of, key, query,
                          call.scale.sign, head);
        continue;
      }
      if (of.pos_key.given()) {
        relative_gradients(memory.dscores, kScoreStride, q, dq, rows, keys, j - first - x, of.columns, key, head);
      }
      if (of.pos_query.given()) set_transposed(memory.dterms + x, memory.dscores, rows, keys);
    }
    if (by_distance && of.pos_query.given()) {
      relative_gradients(memory.dterms, kTermStride, k, dk, keys, queries, first - j, of.columns, query, head);
    }
  }
}

template <class T>
void backward(const DisentangledBackwardParams& params, const Host& host) {
  const AttentionBackwardParams& a = params.attention;
  const Call call(a.problem);
  const AttentionProblem& p = call.p;
  const HeadDim& head = call.head;
  const RelativeTables& tables = params.tables;
  const Columns columns(call.longest, tables.reach);
  const int64_t stride = static_cast<int64_t>(p.heads_q) * p.head_dim;
  const int64_t table_floats = columns.count() * head.padded;
  auto *const dq = static_cast<T*>(a.dq), *const dk = static_cast<T*>(a.dk), *const dv = static_cast<T*>(a.dv);

  Shares shares(tables, head);
  Scratch shared(
      host, Scratch::bytes_of<float>(shares.floats(p.heads_q * call.parts)) + Scratch::bytes_of<int32_t>(p.heads_q));
  shares.data = shared.next<float>(shares.floats(p.heads_q * call.parts));
  auto* const unfinished = shared.next<int32_t>(p.heads_q);  // items of a head
  for (int64_t h = 0; h < p.heads_q; ++h) unfinished[h] = static_cast<int32_t>(call.parts);

  // The gradient of one head of a table, of the shares of all of its items.
  const auto finish_table = [&](void* to, int64_t h, int64_t table, float factor) {
    auto* const rows = static_cast<T*>(to) + h * p.head_dim;
    for (int64_t row = 0; row < tables.rows; ++row) {
      const int64_t reached = row - shares.first_row;
      if (reached < 0 || reached >= shares.rows) {
        std::memset(rows + row * stride, 0, static_cast<size_t>(p.head_dim) * sizeof(T));
        continue;
      }
      float* const sum = shares.share(h * call.parts, table) + reached * head.padded;
      for (int64_t part = 1; part < call.parts; ++part) {
        const float* const share = shares.share(h * call.parts + part, table) + reached * head.padded;
        for (int64_t d = 0; d < head.padded; d += kLanes) store(sum + d, load(sum + d) + load(share + d));
      }
      store_row(rows + row * stride, sum, head.dim, factor);
    }
  };

  over(host, p.heads_q * call.parts, [&](Items& items) {
    Scratch scratch(host, RelativeBackwardMemory::bytes(call.longest, columns, head));
    const RelativeBackwardMemory memory(scratch, call.longest, columns, head);
    for (int64_t item; items.next(item);) {
      const int64_t h = item / call.parts, part = item % call.parts;
      const auto at = [&](int64_t row) { return row * stride + h * p.head_dim; };
      if (part == 0) {  // the rows of no sequence
        const auto clear = [&](int64_t row) {
          const auto bytes = static_cast<size_t>(p.head_dim) * sizeof(T);
          std::memset(dq + at(row), 0, bytes);
          std::memset(dk + at(row), 0, bytes);
          std::memset(dv + at(row), 0, bytes);
        };
        for (int64_t row = 0; row < call.sequences.begin(0); ++row) clear(row);
        for (int64_t row = call.sequences.begin(p.batch); row < p.total_q; ++row) clear(row);
      }
      Scratch of_head(host, HeadOf<T>::bytes(tables, columns, head));
      const HeadOf<T> of(of_head, tables, columns, h, head);
      const int64_t query_table = of.pos_key.given() ? 1 : 0;
      const TableSums key{memory.table_floats, memory.table_floats + table_floats, shares.share(item, 0),
                          shares.first_row};
      const TableSums query{memory.table_floats + 2 * table_floats, memory.table_floats + 3 * table_floats,
                            shares.share(item, query_table), shares.first_row};
      const auto begin_table = [&](const Table<T>& table, const TableSums& sums, Side side, float factor) {
        if (!table.given()) return;
        for (int64_t column = 0; column < columns.count(); ++column) {
          const T* const row = table.row(static_cast<int64_t>(side) * columns.distance(column));
          pack_rows(sums.rows + column * head.padded, HeadRows<T>{row, 0}, 1, head, factor);
        }
        std::memset(sums.sums, 0, static_cast<size_t>(table_floats) * sizeof(float));
        std::memset(sums.share, 0, static_cast<size_t>(shares.rows * head.padded) * sizeof(float));
      };
      // dk takes products with q and with pos_query, and the packed q has the sign.
      begin_table(of.pos_key, key, Side::kKey, 1.f);
      begin_table(of.pos_query, query, Side::kQuery, call.scale.sign);

      double before = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t begin = call.sequences.begin(b), n = call.sequences.rows(b);
        const bool mine = n > 0 && call.part(before) == part;
        before += static_cast<double>(n) * static_cast<double>(n);
        if (!mine) continue;
        const Places places = call.places(tables, begin, n);
        const HeadRows<T> k = rows_of<T>(p.k, begin, h), q = rows_of<T>(p.q, begin, h);
        const HeadRows<T> out = rows_of<T>(a.out, begin, h), dout = rows_of<T>(a.dout, begin, h);
        pack_key_columns(memory.k_columns, k, n, head);
        pack_key_columns(memory.v_columns, rows_of<T>(p.v, begin, h), n, head);
        pack_rows(memory.k_rows, k, n, head, 1.f);
        std::memset(memory.dk, 0, static_cast<size_t>(n * head.padded) * sizeof(float));
        std::memset(memory.dv, 0, static_cast<size_t>(n * head.padded) * sizeof(float));
        for (int64_t i = 0; i < n; i += kQueries) {
          const int64_t last = smaller(i + kQueries, n);
          pack_rows(memory.q, HeadRows<T>{q.row(i), q.stride}, last - i, head, call.scale.sign);
          pack_rows(memory.dout, HeadRows<T>{dout.row(i), dout.stride}, last - i, head, 1.f);
          for (int64_t r = 0; r < last - i; ++r) {
            const T* const row = out.row(i + r);
            Vec sum{};
            for (int64_t d = 0; d < head.dim; d += kLanes) {
              sum += load(memory.dout + r * head.padded + d) * load_first(row + d, head.dim - d);
            }
            const float lse = a.lse[h * p.total_q + begin + i + r];
            memory.from[r / kQueryBlock].set(r % kQueryBlock, lse, sum_of_lanes(sum));
          }
          attend_queries_backward(memory, call, of, key, query, places, i, last, n);
          for (int64_t r = 0; r < last - i; ++r) {
            store_row(dq + at(begin + i + r), memory.dq + r * head.padded, head.dim, p.softmax_scale);
          }
        }
        for (int64_t r = 0; r < n; ++r) {
          store_row(dk + at(begin + r), memory.dk + r * head.padded, head.dim, call.scale.size);
          store_row(dv + at(begin + r), memory.dv + r * head.padded, head.dim, 1.f);
        }
      }

      const auto end_table = [&](const Table<T>& table, const TableSums& sums, Side side) {
        if (!table.given()) return;
        for (int64_t column = 0; column < columns.count(); ++column) {
          const int64_t index = table.index(static_cast<int64_t>(side) * columns.distance(column));
          float *const to = sums.share_of(index, head), *const from = sums.sums + column * head.padded;
          for (int64_t d = 0; d < head.padded; d += kLanes) store(to + d, load(to + d) + load(from + d));
        }
      };
      end_table(of.pos_key, key, Side::kKey);
      end_table(of.pos_query, query, Side::kQuery);
      if (__atomic_sub_fetch(&unfinished[h], 1, __ATOMIC_ACQ_REL) > 0) continue;
      if (of.pos_key.given()) finish_table(params.dpos_key, h, 0, call.scale.size);
      if (of.pos_query.given()) finish_table(params.dpos_query, h, query_table, p.softmax_scale);
    }
  });
}

}  // namespace

void disentangled_attention(const DisentangledParams& params, const Host& host) {
  with_element(params.attention.problem.dtype, [&]<class T>(T*) { forward<T>(params, host); });
}

void disentangled_attention_backward(const DisentangledBackwardParams& params, const Host& host) {
  with_element(params.attention.problem.dtype, [&]<class T>(T*) { backward<T>(params, host); });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
