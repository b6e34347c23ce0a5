// Products with block-diagonal and Monarch matrices, the gated MLP of two block-diagonal factors, and their gradients.
//
// Floor: arithmetic, 2 FLOPs a weight and row in the forward and 4 more in the backward, which makes what lies between
// two factors again. Weights are packed into panels once a call; rows then go by some at a time, so that what lies
// between the factors stays in L2.
//
// Measured in float32 on one thread of a Skylake-SP beside other processes, AVX-512: 2.1 times as fast as two batched
// products of torch at blocks of 32 x 32, 1.4 times at 64 x 64 (3.9 and 5 times with the backward), and as fast at blocks
// of 192 to 256 columns; the gated MLP 1.2 times. Larger float32 blocks are torch's (csrc/torch/monarch.cpp has the rule).
// Two threads of an AMD EPYC with AVX2, the faster of eager and compiled batched products: 3.6 times at 32 x 32, 2.5 at
// 64 x 64 and 1.1 to 1.3 at 192 to 256 columns forward, 3.8, 3.5 and 0.8 to 1.1 with the backward, which multiplies by the first factor once more than autograd does.
//
// Gradients of weights are sums over shares of the rows, cut by the sizes alone and added in order.
#include "families.h"
#include "gelu.h"
#include "panels.h"
#include "simd.h"
#include "threads.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Rows that are taken at a time: what belongs to them stays in L2.
constexpr int64_t kBlockdiagRows = 64;
constexpr int64_t monarch_rows(int64_t between) { return between <= 1024 ? 64 : 48; }
constexpr int64_t kGluRows = 64;
constexpr int64_t kGradientRows = 192;
// Weights of an item, at least.
constexpr int64_t kItemWeights = 1 << 14;
// Weights that are packed, or gradients that are added, in one thread.
constexpr int64_t kAlone = 1 << 17;

template <class T>
const T* weight_block(const BlockFactor& f, int64_t block) {
  return static_cast<const T*>(f.w) + block * f.rows * f.cols;
}

// Panels of all blocks: of a product with their transposes, as forward has it, or with the blocks as they are.
template <class T>
void pack(const Host& host, const BlockFactor& f, bool transposed, float* panels, int64_t panel) {
  const auto block = [&](int64_t b) {
    const T* const w = weight_block<T>(f, b);
    const auto row = [&](int64_t i) { return w + i * f.cols; };
    if (transposed) {
      pack_columns<T>(panels + b * panel, f.rows, f.cols, row);
    } else {
      pack_rows<T>(panels + b * panel, f.rows, f.cols, row);
    }
  };
  if (f.count * f.rows * f.cols < kAlone) {
    for (int64_t b = 0; b < f.count; ++b) block(b);
    return;
  }
  over(host, f.count, [&](Items& items) {
    for (int64_t b; items.next(b);) block(b);
  });
}

// ---- shares of the rows ----

// Gradients of weights are sums over `count` shares of `rows` rows each, the last one's perhaps fewer, of which `step` are
// taken at a time.
struct Shares {
  int64_t count;
  int64_t rows;
  int64_t step;

  // For sums of `size` elements each. Shares are as even as they can be: threads wait for the longest.
  static Shares of(int64_t rows, int64_t size) {
    constexpr int64_t kLeast = 256, kMost = 16, kRoom = 1 << 23;
    const int64_t wanted = smaller(kMost, ceil_div(rows, kLeast));
    const int64_t count = larger(1, smaller(wanted, kRoom / larger(size, 1)));
    const int64_t each = larger(1, ceil_div(rows, count));
    return {ceil_div(rows, each), each, ceil_div(each, ceil_div(each, kGradientRows))};
  }
  int64_t first(int64_t share) const { return share * rows; }
};

// to [rows, cols] = the sum of the shares' parts [rows, stride], `between` elements from one share to the next.
template <class T>
void add_shares(const Host& host, const Shares& shares, const float* parts, int64_t between, int64_t stride, T* to,
                int64_t rows, int64_t cols) {
  const auto add = [&](int64_t row) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      Vec sum{};
      for (int64_t s = 0; s < shares.count; ++s) sum += load(parts + s * between + row * stride + c);
      store_first(to + row * cols + c, sum, cols - c);
    }
  };
  if (rows * cols * shares.count < kAlone) {
    for (int64_t row = 0; row < rows; ++row) add(row);
    return;
  }
  const int64_t each = ceil_div(kItemWeights, cols);
  over(host, ceil_div(rows, each), [&](Items& items) {
    for (int64_t item; items.next(item);) {
      for (int64_t row = item * each; row < smaller(rows, (item + 1) * each); ++row) add(row);
    }
  });
}

// ---- block-diagonal ----

template <class T>
void blockdiag(const BlockProductParams& p, const Host& host) {
  const BlockFactor& f = p.first;
  const auto* const x = static_cast<const T*>(p.x);
  const auto* const bias = static_cast<const T*>(p.bias);
  auto* const out = static_cast<T*>(p.out);
  const int64_t panel = packed_columns(f.rows, f.cols), width = f.count * f.rows;
  Scratch memory(host, Scratch::bytes_of<float>(f.count * panel));
  float* const panels = memory.next<float>(f.count * panel);
  pack<T>(host, f, true, panels, panel);
  const int64_t each = ceil_div(kItemWeights, larger(1, f.rows * f.cols)), chunks = ceil_div(p.rows, kBlockdiagRows);
  const int64_t in_room = row_room(f.cols), out_room = row_room(f.rows);
  const int64_t groups = ceil_div(f.count, each);
  // All blocks of some rows follow each other, while the rows' pages are in cache.
  over(host, groups * chunks, [&](Items& items) {
    Scratch own(
        host, Scratch::bytes_of<float>(kBlockdiagRows * in_room) + Scratch::bytes_of<float>(kBlockdiagRows * out_room));
    float* const in = own.next<float>(kBlockdiagRows * in_room);
    float* const result = own.next<float>(kBlockdiagRows * out_room);
    for (int64_t item; items.next(item);) {
      const int64_t first = item / groups * kBlockdiagRows, m = smaller(kBlockdiagRows, p.rows - first);
      const int64_t group = item % groups;
      for (int64_t b = group * each; b < smaller(f.count, (group + 1) * each); ++b) {
        const T* const from = x + first * p.x_stride + b * f.cols;
        T* const to = out + first * width + b * f.rows;
        if constexpr (sizeof(T) == sizeof(float)) {
          // The product reads and writes whole rows where they lie, unless something is added behind it.
          if (bias == nullptr && f.rows % kLanes == 0) {
            product(m, f.rows, f.cols, to, width, from, p.x_stride, panels + b * panel);
            continue;
          }
        }
        load_rows(in, in_room, from, p.x_stride, m, f.cols);
        product(m, f.rows, f.cols, result, out_room, in, in_room, panels + b * panel);
        store_rows(to, width, result, out_room, m, f.rows, bias ? bias + b * f.rows : nullptr);
      }
    }
  });
}

template <class T>
void blockdiag_gradient(const BlockProductParams& p, const Host& host) {
  const BlockFactor& f = p.first;
  const auto* const x = static_cast<const T*>(p.x);
  const auto* const dout = static_cast<const T*>(p.dout);
  auto* const dx = static_cast<T*>(p.dx);
  const int64_t panel = packed_columns(f.cols, f.rows), in_width = f.count * f.cols;
  const int64_t in_room = row_room(f.cols), out_room = row_room(f.rows);
  const int64_t dw_block = f.rows * in_room, dw_all = f.count * dw_block, bias_all = f.count * out_room;
  const Shares shares = Shares::of(p.rows, dw_all);
  Scratch memory(
      host, Scratch::bytes_of<float>(f.count * panel) + Scratch::bytes_of<float>(shares.count * (dw_all + bias_all)));
  float* const panels = memory.next<float>(f.count * panel);
  float* const sums = memory.next<float>(shares.count * (dw_all + bias_all));
  float* const bias_sums = sums + shares.count * dw_all;
  pack<T>(host, f, false, panels, panel);
  const int64_t each = ceil_div(kItemWeights, larger(1, f.rows * f.cols));
  over(host, ceil_div(f.count, each) * shares.count, [&](Items& items) {
    Scratch own(host, 2 * Scratch::bytes_of<float>(kGradientRows * in_room) +
                          Scratch::bytes_of<float>(kGradientRows * out_room));
    float* const in = own.next<float>(kGradientRows * in_room);
    float* const din = own.next<float>(kGradientRows * in_room);
    float* const result = own.next<float>(kGradientRows * out_room);
    for (int64_t item; items.next(item);) {
      const int64_t share = item % shares.count, group = item / shares.count;
      const int64_t begin = shares.first(share), end = smaller(p.rows, begin + shares.rows);
      for (int64_t b = group * each; b < smaller(f.count, (group + 1) * each); ++b) {
        float* const dw = sums + share * dw_all + b * dw_block;
        float* const dbias = bias_sums + share * bias_all + b * out_room;
        std::memset(dbias, 0, static_cast<size_t>(out_room) * sizeof(float));
        for (int64_t row = begin; row < end; row += shares.step) {
          const int64_t m = smaller(shares.step, end - row);
          load_rows(result, out_room, dout + row * p.dout_stride + b * f.rows, p.dout_stride, m, f.rows);
          load_rows(in, in_room, x + row * p.x_stride + b * f.cols, p.x_stride, m, f.cols);
          transposed_product(row > begin, f.rows, f.cols, m, dw, in_room, result, out_room, in, in_room);
          if (p.dbias != nullptr) add_rows(dbias, result, out_room, m, f.rows);
          product(m, f.cols, f.rows, din, in_room, result, out_room, panels + b * panel);
          store_rows(dx + row * in_width + b * f.cols, in_width, din, in_room, m, f.cols);
        }
      }
    }
  });
  add_shares(host, shares, sums, dw_all, in_room, static_cast<T*>(f.dw), f.count * f.rows, f.cols);
  if (p.dbias != nullptr) {
    for (int64_t b = 0; b < f.count; ++b) {
      add_shares(host, shares, bias_sums + b * out_room, bias_all, out_room, static_cast<T*>(p.dbias) + b * f.rows, 1,
                 f.rows);
    }
  }
}

// ---- Monarch ----

// One step of a shuffle of n vectors as one row of n * kLanes elements: the second half goes between the elements of the
// first. After log2(n) steps element j of vector i is at j * n + i; after log2(kLanes) steps element j * n + i is at
// j of vector i.
template <int kCount, int kSteps>
WARPFORM_INLINE void shuffle(Vec (&v)[kCount]) {
#pragma GCC unroll 8
  for (int step = 0; step < kSteps; ++step) {
    if constexpr (kCount > 1) {
      Vec mixed[kCount];
#pragma GCC unroll 16
      for (int i = 0; i < kCount / 2; ++i) {
        mixed[2 * i] = zip_low(v[i], v[i + kCount / 2]);
        mixed[2 * i + 1] = zip_high(v[i], v[i + kCount / 2]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) v[i] = mixed[i];
    }
  }
}
constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// Rows [rows, inner * count] hold element i of part j at i * count + j. A few parts at a time are taken out of them, or
// put in, as [parts, rows, room]: as many as a vector has lanes, or all where there are few.
constexpr int64_t parts_at_a_time(int64_t count) { return smaller(count, kLanes); }

template <int kCount, class T>
WARPFORM_INLINE void split_few(float* to, int64_t room, const T* from, int64_t stride, int64_t rows, int64_t inner) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* const row = from + r * stride;
    for (int64_t i = 0; i < inner; i += kLanes) {
      Vec v[kCount];
#pragma GCC unroll 16
      for (int n = 0; n < kCount; ++n) {
        const int64_t at = i * kCount + n * kLanes, left = inner * kCount - at;
        v[n] = left > 0 ? load_first(row + at, left) : Vec{};
      }
      shuffle<kCount, log2_of(kLanes)>(v);
#pragma GCC unroll 16
      for (int n = 0; n < kCount; ++n) store(to + (n * rows + r) * room + i, v[n]);
    }
  }
}
template <int kCount, class T>
WARPFORM_INLINE void join_few(T* to, int64_t stride, const float* from, int64_t room, int64_t rows, int64_t inner) {
  for (int64_t r = 0; r < rows; ++r) {
    T* const row = to + r * stride;
    for (int64_t i = 0; i < inner; i += kLanes) {
      Vec v[kCount];
#pragma GCC unroll 16
      for (int n = 0; n < kCount; ++n) v[n] = load(from + (n * rows + r) * room + i);
      shuffle<kCount, log2_of(kCount)>(v);
#pragma GCC unroll 16
      for (int n = 0; n < kCount; ++n) {
        const int64_t at = i * kCount + n * kLanes, left = inner * kCount - at;
        if (left > 0) store_first(row + at, v[n], left);
      }
    }
  }
}

// Parts first to first + parts.
template <class T>
void split(float* to, int64_t room, const T* from, int64_t stride, int64_t rows, int64_t inner, int64_t count,
           int64_t first, int64_t parts) {
  if (parts == count) {
    if (count == 1) return split_few<1>(to, room, from, stride, rows, inner);
    if (count == 2) return split_few<2>(to, room, from, stride, rows, inner);
    if (count == 4) return split_few<4>(to, room, from, stride, rows, inner);
    if constexpr (kLanes > 8) {
      if (count == 8) return split_few<8>(to, room, from, stride, rows, inner);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* const row = from + r * stride + first;
    for (int64_t i = 0; i < inner; i += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) v[n] = i + n < inner ? load_first(row + (i + n) * count, parts) : Vec{};
      transpose(v);
      for (int64_t n = 0; n < parts; ++n) store(to + (n * rows + r) * room + i, v[n]);
    }
  }
}
template <class T>
void join(T* to, int64_t stride, const float* from, int64_t room, int64_t rows, int64_t inner, int64_t count,
          int64_t first, int64_t parts) {
  if (parts == count) {
    if (count == 1) return join_few<1>(to, stride, from, room, rows, inner);
    if (count == 2) return join_few<2>(to, stride, from, room, rows, inner);
    if (count == 4) return join_few<4>(to, stride, from, room, rows, inner);
    if constexpr (kLanes > 8) {
      if (count == 8) return join_few<8>(to, stride, from, room, rows, inner);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* const row = to + r * stride + first;
    for (int64_t i = 0; i < inner; i += kLanes) {
      Vec v[kLanes];
      for (int64_t n = 0; n < kLanes; ++n) v[n] = n < parts ? load(from + (n * rows + r) * room + i) : Vec{};
      transpose(v);
      const int64_t last = smaller(kLanes, inner - i);
      for (int64_t n = 0; n < last; ++n) store_first(row + (i + n) * count, v[n], parts);
    }
  }
}

template <class T>
void monarch(const BlockProductParams& p, const Host& host) {
  const BlockFactor &f = p.first, &s = p.second;
  const auto* const x = static_cast<const T*>(p.x);
  auto* const out = static_cast<T*>(p.out);
  const int64_t panel1 = packed_columns(f.rows, f.cols), panel2 = packed_columns(s.rows, s.cols);
  Scratch memory(host, Scratch::bytes_of<float>(f.count * panel1) + Scratch::bytes_of<float>(s.count * panel2));
  float* const panels1 = memory.next<float>(f.count * panel1);
  float* const panels2 = memory.next<float>(s.count * panel2);
  pack<T>(host, f, true, panels1, panel1);
  pack<T>(host, s, true, panels2, panel2);
  const int64_t width = s.count * s.rows, at_a_time = parts_at_a_time(s.count);
  // A block of h is written in whole vectors, which the next one overwrites.
  const int64_t in_room = row_room(f.cols), h_room = row_room(f.count * f.rows + kLanes);
  const int64_t g_room = row_room(s.cols), y_room = row_room(s.rows);
  const int64_t rows = monarch_rows(f.count * f.rows);
  over(host, ceil_div(p.rows, rows), [&](Items& items) {
    Scratch own(host, Scratch::bytes_of<float>(rows * in_room) + Scratch::bytes_of<float>(rows * h_room) +
                          Scratch::bytes_of<float>(rows * at_a_time * g_room) +
                          Scratch::bytes_of<float>(rows * at_a_time * y_room));
    float* const in = own.next<float>(rows * in_room);
    float* const h = own.next<float>(rows * h_room);
    float* const g = own.next<float>(rows * at_a_time * g_room);
    float* const y = own.next<float>(rows * at_a_time * y_room);
    for (int64_t item; items.next(item);) {
      const int64_t row = item * rows, m = smaller(rows, p.rows - row);
      for (int64_t b = 0; b < f.count; ++b) {
        load_rows(in, in_room, x + row * p.x_stride + b * f.cols, p.x_stride, m, f.cols);
        product(m, f.rows, f.cols, h + b * f.rows, h_room, in, in_room, panels1 + b * panel1);
      }
      for (int64_t first = 0; first < s.count; first += at_a_time) {
        const int64_t parts = smaller(at_a_time, s.count - first);
        split(g, g_room, h, h_room, m, s.cols, s.count, first, parts);
        for (int64_t b = 0; b < parts; ++b) {
          product(m, s.rows, s.cols, y + b * m * y_room, y_room, g + b * m * g_room, g_room,
                  panels2 + (first + b) * panel2);
        }
        join(out + row * width, width, y, y_room, m, s.rows, s.count, first, parts);
      }
    }
  });
}

template <class T>
void monarch_gradient(const BlockProductParams& p, const Host& host) {
  const BlockFactor &f = p.first, &s = p.second;
  const auto* const x = static_cast<const T*>(p.x);
  const auto* const dout = static_cast<const T*>(p.dout);
  auto* const dx = static_cast<T*>(p.dx);
  const int64_t panel1 = packed_columns(f.rows, f.cols), back1 = packed_columns(f.cols, f.rows);
  const int64_t back2 = packed_columns(s.cols, s.rows);
  const int64_t width = f.count * f.cols, at_a_time = parts_at_a_time(s.count);
  const int64_t in_room = row_room(f.cols), h_room = row_room(f.count * f.rows + kLanes);
  const int64_t g_room = row_room(s.cols), y_room = row_room(s.rows);
  const int64_t dw1_all = f.count * f.rows * in_room, dw2_all = s.count * s.rows * g_room;
  const int64_t dw_all = dw1_all + dw2_all;
  const Shares shares = Shares::of(p.rows, dw_all);
  Scratch memory(host, Scratch::bytes_of<float>(f.count * panel1) + Scratch::bytes_of<float>(f.count * back1) +
                           Scratch::bytes_of<float>(s.count * back2) + Scratch::bytes_of<float>(shares.count * dw_all));
  float* const panels1 = memory.next<float>(f.count * panel1);
  float* const backwards1 = memory.next<float>(f.count * back1);
  float* const backwards2 = memory.next<float>(s.count * back2);
  float* const sums = memory.next<float>(shares.count * dw_all);
  pack<T>(host, f, true, panels1, panel1);
  pack<T>(host, f, false, backwards1, back1);
  pack<T>(host, s, false, backwards2, back2);
  constexpr int64_t kRows = kGradientRows;
  over(host, shares.count, [&](Items& items) {
    Scratch own(host, Scratch::bytes_of<float>(kRows * f.count * in_room) + Scratch::bytes_of<float>(kRows * in_room) +
                          Scratch::bytes_of<float>(kRows * h_room) +
                          2 * Scratch::bytes_of<float>(kRows * at_a_time * g_room) +
                          Scratch::bytes_of<float>(kRows * at_a_time * y_room));
    float* const in = own.next<float>(kRows * f.count * in_room);
    float* const din = own.next<float>(kRows * in_room);
    float* const h = own.next<float>(kRows * h_room);
    float* const g = own.next<float>(kRows * at_a_time * g_room);
    float* const dg = own.next<float>(kRows * at_a_time * g_room);
    float* const dy = own.next<float>(kRows * at_a_time * y_room);
    for (int64_t share; items.next(share);) {
      float *const dw1 = sums + share * dw_all, *const dw2 = dw1 + dw1_all;
      const int64_t begin = shares.first(share), end = smaller(p.rows, begin + shares.rows);
      for (int64_t row = begin; row < end; row += shares.step) {
        const int64_t m = smaller(shares.step, end - row);
        const bool add = row > begin;
        for (int64_t b = 0; b < f.count; ++b) {
          float* const block = in + b * m * in_room;
          load_rows(block, in_room, x + row * p.x_stride + b * f.cols, p.x_stride, m, f.cols);
          product(m, f.rows, f.cols, h + b * f.rows, h_room, block, in_room, panels1 + b * panel1);
        }
        for (int64_t first = 0; first < s.count; first += at_a_time) {
          const int64_t parts = smaller(at_a_time, s.count - first);
          split(g, g_room, h, h_room, m, s.cols, s.count, first, parts);
          split(dy, y_room, dout + row * p.dout_stride, p.dout_stride, m, s.rows, s.count, first, parts);
          for (int64_t b = 0; b < parts; ++b) {
            const float* const dy_block = dy + b * m * y_room;
            transposed_product(add, s.rows, s.cols, m, dw2 + (first + b) * s.rows * g_room, g_room, dy_block, y_room,
                               g + b * m * g_room, g_room);
            product(m, s.cols, s.rows, dg + b * m * g_room, g_room, dy_block, y_room, backwards2 + (first + b) * back2);
          }
          // From here on these parts of h are those of its gradient.
          join(h, h_room, dg, g_room, m, s.cols, s.count, first, parts);
        }
        for (int64_t b = 0; b < f.count; ++b) {
          transposed_product(add, f.rows, f.cols, m, dw1 + b * f.rows * in_room, in_room, h + b * f.rows, h_room,
                             in + b * m * in_room, in_room);
          product(m, f.cols, f.rows, din, in_room, h + b * f.rows, h_room, backwards1 + b * back1);
          store_rows(dx + row * width + b * f.cols, width, din, in_room, m, f.cols);
        }
      }
    }
  });
  add_shares(host, shares, sums, dw_all, in_room, static_cast<T*>(f.dw), f.count * f.rows, f.cols);
  add_shares(host, shares, sums + dw1_all, dw_all, g_room, static_cast<T*>(s.dw), s.count * s.rows, s.cols);
}

// ---- gated MLP ----

// At most kPanel columns of z's left half, and those of the right half that they are multiplied by, all in one block each;
// their product is in one block of the second factor, too.
struct GatedColumns {
  int64_t count;
  int64_t left_block, left_row;
  int64_t right_block, right_row;
  int64_t down_block, down_column;

  // The next ones from column `from` of the halves on.
  static GatedColumns at(int64_t from, const BlockFactor& up, const BlockFactor& down) {
    const int64_t half = down.count * down.cols, right = half + from;
    GatedColumns found{.count = 0,
                       .left_block = from / up.rows,
                       .left_row = from % up.rows,
                       .right_block = right / up.rows,
                       .right_row = right % up.rows,
                       .down_block = from / down.cols,
                       .down_column = from % down.cols};
    found.count = smaller(smaller(kPanel, down.cols - found.down_column),
                          smaller(up.rows - found.left_row, up.rows - found.right_row));
    return found;
  }
};

// All of them: next() as long as there are some.
class GatedWalk {
 public:
  GatedWalk(const BlockFactor& up, const BlockFactor& down) : up_(up), down_(down) {}
  bool next(GatedColumns& columns) {
    if (from_ >= down_.count * down_.cols) return false;
    columns = GatedColumns::at(from_, up_, down_);
    from_ += columns.count;
    return true;
  }
  static int64_t count(const BlockFactor& up, const BlockFactor& down) {
    int64_t n = 0;
    GatedWalk walk(up, down);
    for (GatedColumns columns; walk.next(columns);) ++n;
    return n;
  }

 private:
  const BlockFactor &up_, &down_;
  int64_t from_ = 0;
};

// The panels of one GatedColumns, each of kPanel columns or of as many rows.
struct GatedPanels {
  int64_t up, up_back, down, down_back, all;
  GatedPanels(const BlockFactor& u, const BlockFactor& d, bool gradient)
      : up(packed_columns(kPanel, u.cols)),
        up_back(gradient ? packed_columns(u.cols, kPanel) : 0),
        down(gradient ? 0 : packed_columns(d.rows, kPanel)),
        down_back(gradient ? packed_columns(kPanel, d.rows) : 0),
        all(2 * up + 2 * up_back + down + down_back) {}
};

template <class T>
void pack_gated(const BlockFactor& up, const BlockFactor& down, const GatedPanels& sizes, bool gradient,
                float* panels) {
  GatedWalk walk(up, down);
  for (GatedColumns c; walk.next(c); panels += sizes.all) {
    const T* const left = weight_block<T>(up, c.left_block) + c.left_row * up.cols;
    const T* const right = weight_block<T>(up, c.right_block) + c.right_row * up.cols;
    const T* const to = weight_block<T>(down, c.down_block) + c.down_column;
    const auto left_row = [&](int64_t i) { return left + i * up.cols; };
    const auto right_row = [&](int64_t i) { return right + i * up.cols; };
    const auto down_row = [&](int64_t i) { return to + i * down.cols; };
    pack_columns<T>(panels, c.count, up.cols, left_row);
    pack_columns<T>(panels + sizes.up, c.count, up.cols, right_row);
    float* const rest = panels + 2 * sizes.up;
    if (!gradient) {
      pack_columns<T>(rest, down.rows, c.count, down_row);
      continue;
    }
    pack_rows<T>(rest, c.count, up.cols, left_row);
    pack_rows<T>(rest + sizes.up_back, c.count, up.cols, right_row);
    pack_rows<T>(rest + 2 * sizes.up_back, down.rows, c.count, down_row);
  }
}

// c [m, n] += a [m, depth] times panels.
WARPFORM_INLINE void add_product(int64_t m, int64_t n, int64_t depth, float* c, int64_t c_stride, const float* a,
                                 int64_t a_stride, const float* panels) {
  times_columns<Into::kAdd>(m, n, depth, c, c_stride, a, a_stride, 1, panels);
}

// Columns of a tile of the halves of z.
constexpr int64_t kGateRoom = kPanel;

template <class T>
void glu(const BlockProductParams& p, const Host& host) {
  const BlockFactor &up = p.first, &down = p.second;
  const auto* const x = static_cast<const T*>(p.x);
  const auto* const bias = static_cast<const T*>(p.bias);
  auto* const out = static_cast<T*>(p.out);
  const GatedPanels sizes(up, down, false);
  const int64_t count = GatedWalk::count(up, down), width = down.count * down.rows;
  Scratch memory(host, Scratch::bytes_of<float>(count * sizes.all));
  float* const panels = memory.next<float>(count * sizes.all);
  pack_gated<T>(up, down, sizes, false, panels);
  const int64_t in_room = row_room(up.cols), out_room = row_room(down.rows);
  constexpr int64_t kRows = kGluRows;
  over(host, ceil_div(p.rows, kRows), [&](Items& items) {
    Scratch own(host, Scratch::bytes_of<float>(kRows * up.count * in_room) +
                          Scratch::bytes_of<float>(kRows * down.count * out_room) +
                          2 * Scratch::bytes_of<float>(kRows * kGateRoom));
    float* const in = own.next<float>(kRows * up.count * in_room);
    float* const y = own.next<float>(kRows * down.count * out_room);
    float* const left = own.next<float>(kRows * kGateRoom);
    float* const right = own.next<float>(kRows * kGateRoom);
    for (int64_t item; items.next(item);) {
      const int64_t row = item * kRows, m = smaller(kRows, p.rows - row);
      for (int64_t b = 0; b < up.count; ++b) {
        load_rows(in + b * m * in_room, in_room, x + row * p.x_stride + b * up.cols, p.x_stride, m, up.cols);
      }
      std::memset(y, 0, static_cast<size_t>(m * down.count * out_room) * sizeof(float));
      const float* mine = panels;
      GatedWalk walk(up, down);
      for (GatedColumns c; walk.next(c); mine += sizes.all) {
        product(m, c.count, up.cols, left, kGateRoom, in + c.left_block * m * in_room, in_room, mine);
        product(m, c.count, up.cols, right, kGateRoom, in + c.right_block * m * in_room, in_room, mine + sizes.up);
        for (int64_t r = 0; r < m; ++r) {
          for (int64_t i = r * kGateRoom; i < r * kGateRoom + c.count; i += kLanes) {
            store(left + i, gelu<false>(load(left + i)) * load(right + i));
          }
        }
        add_product(m, down.rows, c.count, y + c.down_block * m * out_room, out_room, left, kGateRoom,
                    mine + 2 * sizes.up);
      }
      for (int64_t b = 0; b < down.count; ++b) {
        store_rows(out + row * width + b * down.rows, width, y + b * m * out_room, out_room, m, down.rows,
                   bias ? bias + b * down.rows : nullptr);
      }
    }
  });
}

template <class T>
void glu_gradient(const BlockProductParams& p, const Host& host) {
  const BlockFactor &up = p.first, &down = p.second;
  const auto* const x = static_cast<const T*>(p.x);
  const auto* const dout = static_cast<const T*>(p.dout);
  auto* const dx = static_cast<T*>(p.dx);
  const GatedPanels sizes(up, down, true);
  const int64_t count = GatedWalk::count(up, down), width = up.count * up.cols;
  const int64_t in_room = row_room(up.cols), out_room = row_room(down.rows);
  // Gradients of columns of w_down are written in whole vectors: each tile of the gate has its own room.
  const int64_t up_all = up.count * up.rows * in_room, down_tile = down.rows * kGateRoom;
  const int64_t bias_all = down.count * out_room, dw_all = up_all + count * down_tile + bias_all;
  const Shares shares = Shares::of(p.rows, dw_all);
  Scratch memory(host, Scratch::bytes_of<float>(count * sizes.all) + Scratch::bytes_of<float>(shares.count * dw_all));
  float* const panels = memory.next<float>(count * sizes.all);
  float* const sums = memory.next<float>(shares.count * dw_all);
  pack_gated<T>(up, down, sizes, true, panels);
  constexpr int64_t kRows = kGradientRows;
  over(host, shares.count, [&](Items& items) {
    Scratch own(host, 2 * Scratch::bytes_of<float>(kRows * up.count * in_room) +
                          Scratch::bytes_of<float>(kRows * down.count * out_room) +
                          3 * Scratch::bytes_of<float>(kRows * kGateRoom));
    float* const in = own.next<float>(kRows * up.count * in_room);
    float* const din = own.next<float>(kRows * up.count * in_room);
    float* const dy = own.next<float>(kRows * down.count * out_room);
    float* const left = own.next<float>(kRows * kGateRoom);
    float* const right = own.next<float>(kRows * kGateRoom);
    float* const da = own.next<float>(kRows * kGateRoom);
    for (int64_t share; items.next(share);) {
      float *const dw_up = sums + share * dw_all, *const dbias = dw_up + up_all + count * down_tile;
      std::memset(dbias, 0, static_cast<size_t>(bias_all) * sizeof(float));
      const int64_t begin = shares.first(share), end = smaller(p.rows, begin + shares.rows);
      for (int64_t row = begin; row < end; row += shares.step) {
        const int64_t m = smaller(shares.step, end - row);
        const bool add = row > begin;
        for (int64_t b = 0; b < up.count; ++b) {
          load_rows(in + b * m * in_room, in_room, x + row * p.x_stride + b * up.cols, p.x_stride, m, up.cols);
        }
        for (int64_t b = 0; b < down.count; ++b) {
          float* const block = dy + b * m * out_room;
          load_rows(block, out_room, dout + row * p.dout_stride + b * down.rows, p.dout_stride, m, down.rows);
          if (p.dbias != nullptr) add_rows(dbias + b * out_room, block, out_room, m, down.rows);
        }
        std::memset(din, 0, static_cast<size_t>(m * up.count * in_room) * sizeof(float));
        const float* mine = panels;
        float* dw_down = dw_up + up_all;
        GatedWalk walk(up, down);
        for (GatedColumns c; walk.next(c); mine += sizes.all, dw_down += down_tile) {
          const float *const in_left = in + c.left_block * m * in_room, *const in_right =
                                                                            in + c.right_block * m * in_room;
          const float *const dy_block = dy + c.down_block * m * out_room, *const backwards = mine + 2 * sizes.up;
          product(m, c.count, up.cols, left, kGateRoom, in_left, in_room, mine);
          product(m, c.count, up.cols, right, kGateRoom, in_right, in_room, mine + sizes.up);
          product(m, c.count, down.rows, da, kGateRoom, dy_block, out_room, backwards + 2 * sizes.up_back);
          for (int64_t r = 0; r < m; ++r) {
            for (int64_t i = r * kGateRoom; i < r * kGateRoom + c.count; i += kLanes) {
              const Vec a = load(left + i), b = load(right + i), d = load(da + i);
              const Vec cdf = normal_cdf(a), gate = a * cdf;
              store(da + i, gate * b);
              store(left + i, d * b * (cdf + a * bell(a) * kDensity));
              store(right + i, d * gate);
            }
          }
          transposed_product(add, down.rows, c.count, m, dw_down, kGateRoom, dy_block, out_room, da, kGateRoom);
          transposed_product(add, c.count, up.cols, m, dw_up + (c.left_block * up.rows + c.left_row) * in_room, in_room,
                             left, kGateRoom, in_left, in_room);
          transposed_product(add, c.count, up.cols, m, dw_up + (c.right_block * up.rows + c.right_row) * in_room,
                             in_room, right, kGateRoom, in_right, in_room);
          add_product(m, up.cols, c.count, din + c.left_block * m * in_room, in_room, left, kGateRoom, backwards);
          add_product(m, up.cols, c.count, din + c.right_block * m * in_room, in_room, right, kGateRoom,
                      backwards + sizes.up_back);
        }
        for (int64_t b = 0; b < up.count; ++b) {
          store_rows(dx + row * width + b * up.cols, width, din + b * m * in_room, in_room, m, up.cols);
        }
      }
    }
  });
  add_shares(host, shares, sums, dw_all, in_room, static_cast<T*>(up.dw), up.count * up.rows, up.cols);
  const float* part = sums + up_all;
  GatedWalk walk(up, down);
  for (GatedColumns c; walk.next(c); part += down_tile) {
    T* const to = static_cast<T*>(down.dw) + c.down_block * down.rows * down.cols + c.down_column;
    for (int64_t r = 0; r < down.rows; ++r) {
      add_shares(host, shares, part + r * kGateRoom, dw_all, kGateRoom, to + r * down.cols, 1, c.count);
    }
  }
  if (p.dbias != nullptr) {
    for (int64_t b = 0; b < down.count; ++b) {
      add_shares(host, shares, part + b * out_room, dw_all, out_room, static_cast<T*>(p.dbias) + b * down.rows, 1,
                 down.rows);
    }
  }
}

}  // namespace

void blockdiag_multiply(const BlockProductParams& params, const Host& host) {
  with_element(params.dtype, [&]<class T>(T*) { blockdiag<T>(params, host); });
}
void blockdiag_multiply_backward(const BlockProductParams& params, const Host& host) {
  with_element(params.dtype, [&]<class T>(T*) { blockdiag_gradient<T>(params, host); });
}
void monarch_multiply(const BlockProductParams& params, const Host& host) {
  with_element(params.dtype, [&]<class T>(T*) { monarch<T>(params, host); });
}
void monarch_multiply_backward(const BlockProductParams& params, const Host& host) {
  with_element(params.dtype, [&]<class T>(T*) { monarch_gradient<T>(params, host); });
}
void blockdiag_glu(const BlockProductParams& params, const Host& host) {
  with_element(params.dtype, [&]<class T>(T*) { glu<T>(params, host); });
}
void blockdiag_glu_backward(const BlockProductParams& params, const Host& host) {
  with_element(params.dtype, [&]<class T>(T*) { glu_gradient<T>(params, host); });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
