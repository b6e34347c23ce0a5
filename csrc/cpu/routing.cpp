// Hidden routing: masks, the plan, products that touch a token's groups alone, and the gradient of their weight.
//
// Floor: for up to kFewTokens tokens the bytes of the weight's rows or columns in use, each read once; for more, 2 FLOPs
// for each token, group in use, weight. The plan puts tokens with like masks beside each other: a tile of them is taken
// at a time, and a group is multiplied for those strips of rows that have a token of it. The gradient of the weight goes
// group by group over the tokens that use the group, so that every element is summed in one order.
//
// Measured on two threads of an AMD EPYC with AVX2, float32, whose MKL runs products at 128 GFLOP/s, 8 of 16 groups: 2048
// tokens and d = 1024 95 % of that where groups are read, and as fast where they are written, forward and backward; 8192
// tokens and d = 2048 91 to 104 %. One token and d = 2048: 0.2 ms, faster than a copy of the weights that it reads.
#include "families.h"
#include "panels.h"
#include "simd.h"
#include "threads.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

constexpr int64_t kFewTokens = 8;
// Tokens that are taken at a time.
constexpr int64_t kChunk = 96;
constexpr int64_t kGradientChunk = 192;
// Rows of a tile of a product.
constexpr int64_t kStrip = tile_rows(kTileVectors);
constexpr int64_t kMaskItem = 4096;

WARPFORM_INLINE bool uses(uint64_t mask, int64_t group) { return (mask >> group & 1) != 0; }
constexpr uint64_t all_groups(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// ---- masks ----

template <class Index>
void masks(const RoutingMaskParams& p, const Host& host) {
  const auto* const idx = static_cast<const Index*>(p.idx);
  over(host, ceil_div(p.tokens, kMaskItem), [&](Items& items) {
    for (int64_t item; items.next(item);) {
      for (int64_t t = item * kMaskItem; t < smaller(p.tokens, (item + 1) * kMaskItem); ++t) {
        uint64_t mask = all_groups(p.num_shared);
        for (int64_t c = 0; c < p.choices; ++c) {
          const int64_t group = idx[t * p.choices + c];
          if (group >= 0 && group < p.num_groups) mask |= uint64_t{1} << group;
        }
        p.group_mask[t] = static_cast<int64_t>(mask);
      }
    }
  });
}

// ---- the plan ----

// Sorts `order`, numbers of tokens, by their masks as unsigned numbers; equal ones keep their order. A byte that all masks
// share needs no pass. The result is in `order` or in `other`, which is returned.
int32_t* sort_by_mask(const int64_t* masks, int64_t tokens, int32_t* order, int32_t* other) {
  uint64_t ones = 0, zeros = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    ones |= static_cast<uint64_t>(masks[t]);
    zeros |= ~static_cast<uint64_t>(masks[t]);
    order[t] = static_cast<int32_t>(t);
  }
  const uint64_t differ = ones & zeros;
  for (int shift = 0; shift < 64; shift += 8) {
    if ((differ >> shift & 255) == 0) continue;
    const auto digit = [&](int32_t t) { return static_cast<uint64_t>(masks[t]) >> shift & 255; };
    int32_t places[256] = {};
    for (int64_t t = 0; t < tokens; ++t) ++places[digit(order[t])];
    int32_t before = 0;
    for (int32_t& place : places) {
      const int32_t count = place;
      place = before;
      before += count;
    }
    for (int64_t t = 0; t < tokens; ++t) other[places[digit(order[t])]++] = order[t];
    int32_t* const sorted = other;
    other = order;
    order = sorted;
  }
  return order;
}

void plan(const RoutingPlanParams& p, const Host& host) {
  const int64_t tokens = p.tokens, tile = p.tile, places = int64_t{p.tiles} * tile;
  Scratch memory(host, 2 * Scratch::bytes_of<int32_t>(tokens) + Scratch::bytes_of<int64_t>(p.num_classes));
  int32_t* const room = memory.next<int32_t>(tokens);
  int32_t* const other = memory.next<int32_t>(tokens);
  int64_t* const next = memory.next<int64_t>(p.num_classes);
  const int32_t* const order = sort_by_mask(p.group_mask, tokens, room, other);
  const auto class_of = [&](int64_t t) {
    if (p.token_class == nullptr) return int64_t{0};
    const int64_t c = p.token_class[t];
    return c < 0 ? int64_t{0} : c < p.num_classes ? c : int64_t{p.num_classes} - 1;
  };
  std::memset(next, 0, static_cast<size_t>(p.num_classes) * sizeof(int64_t));
  for (int64_t t = 0; t < tokens; ++t) ++next[class_of(t)];
  // A class begins at a tile of its own.
  int64_t tiles = 0;
  for (int64_t c = 0; c < p.num_classes; ++c) {
    const int64_t mine = ceil_div(next[c], tile);
    next[c] = tiles * tile;
    for (int64_t i = 0; i < mine; ++i) p.tile_class[tiles++] = static_cast<int32_t>(c);
  }
  for (int64_t i = tiles; i < p.tiles; ++i) p.tile_class[i] = 0;
  std::memset(p.perm, 255, static_cast<size_t>(places) * sizeof(int32_t));
  std::memset(p.tile_mask, 0, static_cast<size_t>(p.tiles) * sizeof(int64_t));
  for (int64_t i = 0; i < tokens; ++i) {
    const int32_t t = order[i];
    const int64_t place = next[class_of(t)]++;
    p.perm[place] = t;
    p.inverse[t] = static_cast<int32_t>(place);
    p.tile_mask[place / tile] |= p.group_mask[t];
  }
  const uint64_t all = all_groups(p.num_groups);
  int64_t used = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const uint64_t mask = static_cast<uint64_t>(p.tile_mask[i]) & all;
    p.tile_mask[i] = static_cast<int64_t>(mask);
    used += __builtin_popcountll(mask);
  }
  // Where most pairs of tile and group are in use, all are.
  if (20 * used > 17 * p.num_groups * tiles) {
    for (int64_t i = 0; i < tiles; ++i) p.tile_mask[i] = static_cast<int64_t>(all);
  }
}

// ---- tiles of tokens ----

// A part of a tile: tokens of one class. A tile without tokens has none.
struct Chunk {
  const int32_t* tokens;
  int64_t count;
  int64_t token_class;

  static int64_t each(const RoutedProductParams& p) { return smaller(kChunk, p.tile); }
  static int64_t number(const RoutedProductParams& p) { return p.tile > 0 ? p.tiles * ceil_div(p.tile, each(p)) : 0; }
  static Chunk at(const RoutedProductParams& p, int64_t item) {
    const int64_t in_tile = ceil_div(p.tile, each(p)), tile = item / in_tile, first = item % in_tile * each(p);
    Chunk chunk{p.perm + tile * p.tile + first, smaller(each(p), p.tile - first), p.tile_class[tile]};
    int64_t count = 0;
    while (count < chunk.count && chunk.tokens[count] >= 0 && chunk.tokens[count] < p.tokens) ++count;
    if (chunk.token_class < 0 || chunk.token_class >= p.num_classes) count = 0;  // no plan of ours
    chunk.count = count;
    return chunk;
  }
  uint64_t mask(const RoutedProductParams& p, int64_t row) const {
    return static_cast<uint64_t>(p.group_mask[tokens[row]]);
  }
  // Calls f(first row, rows) for runs of strips that have a token of the group.
  template <class F>
  WARPFORM_INLINE void runs(const RoutedProductParams& p, int64_t group, const F& f) const {
    int64_t first = -1;
    for (int64_t row = 0; row <= count; row += kStrip) {
      bool used = false;
      for (int64_t r = row; r < smaller(count, row + kStrip); ++r) used |= uses(mask(p, r), group);
      if (used && first < 0) first = row;
      if (!used && first >= 0) {
        f(first, row - first);
        first = -1;
      }
    }
    if (first >= 0) f(first, count - first);
  }
};

// Zeros in rows that no chunk has: a plan that was changed may leave tokens out. `to` may be null.
template <class T>
void clear_what_is_left_out(const RoutedProductParams& p, T* to, int64_t cols) {
  int64_t met = 0;
  for (int64_t item = 0; item < Chunk::number(p); ++item) met += Chunk::at(p, item).count;
  if (met == p.tokens || to == nullptr) return;
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(p.tokens * cols) * sizeof(T));
}

WARPFORM_INLINE bool sees(const RoutedProductParams& p, int64_t part, int64_t group) {
  return p.out_mask == nullptr || uses(static_cast<uint64_t>(p.out_mask[part]), group);
}
uint64_t groups_in_use(const RoutedProductParams& p) {
  uint64_t any = 0;
  for (int64_t t = 0; t < p.tokens; ++t) any |= static_cast<uint64_t>(p.group_mask[t]);
  return any & all_groups(p.num_groups);
}

// Panels [classes, groups, parts] of the weight, each of `outputs` columns and `depth` rows. Those of groups that no token
// uses are left out.
template <class T>
void pack_routed(const RoutedProductParams& p, const Host& host, bool scatter, float* panels, int64_t panel) {
  const int64_t outputs = scatter ? p.width : p.dense_width, depth = scatter ? p.dense_width : p.width;
  const uint64_t any = groups_in_use(p);
  const auto* const w = static_cast<const T*>(p.w);
  over(host, p.num_classes * p.num_groups, [&](Items& items) {
    for (int64_t item; items.next(item);) {
      const int64_t group = item % p.num_groups;
      if (!uses(any, group)) continue;
      for (int64_t part = 0; part < p.num_out; ++part) {
        if (!sees(p, part, group)) continue;
        const int64_t first_out = scatter ? group * p.width : part * p.dense_width;
        const int64_t first_in = scatter ? part * p.dense_width : group * p.width;
        const T* const block =
            w + item / p.num_groups * p.class_stride + first_out * p.out_stride + first_in * p.in_stride;
        float* const to = panels + (item * p.num_out + part) * panel;
        if (p.in_stride == 1) {
          pack_columns<T>(to, outputs, depth, [&](int64_t i) { return block + i * p.out_stride; });
        } else {
          pack_rows<T>(to, depth, outputs, [&](int64_t i) { return block + i * p.in_stride; });
        }
      }
    }
  });
}

template <class T>
WARPFORM_INLINE const T* bias_of(const RoutedProductParams& p, int64_t token_class) {
  return p.bias ? static_cast<const T*>(p.bias) + token_class * p.bias_stride : nullptr;
}

// ---- many tokens ----

template <class T>
WARPFORM_INLINE float dot_of(const T* a, const T* b, int64_t n) {
  Vec sum{};
  for (int64_t c = 0; c < n; c += kLanes) sum += load_first(a + c, n - c) * load_first(b + c, n - c);
  return sum_of_lanes(sum);
}

// dots[t, g] = x[t, g] dot_with[t, g], 0 where the token does not use the group.
template <class T>
void group_dots(const RoutedProductParams& p, const T* x, const Host& host) {
  const auto* const with = static_cast<const T*>(p.dot_with);
  over(host, ceil_div(p.tokens, kChunk), [&](Items& items) {
    for (int64_t item; items.next(item);) {
      for (int64_t t = item * kChunk; t < smaller(p.tokens, (item + 1) * kChunk); ++t) {
        for (int64_t g = 0; g < p.num_groups; ++g) {
          const bool used = uses(static_cast<uint64_t>(p.group_mask[t]), g);
          p.dots[t * p.num_groups + g] =
              used ? dot_of(x + t * p.x_stride + g * p.width, with + t * p.dot_stride + g * p.width, p.width) : 0.f;
        }
      }
    }
  });
}

template <class T>
void gather(const RoutedProductParams& p, const Host& host) {
  const auto* const x = static_cast<const T*>(p.x);
  auto* const out = static_cast<T*>(p.out);
  const int64_t panel = packed_columns(p.dense_width, p.width), outputs = p.num_out * p.dense_width;
  const int64_t all = p.num_classes * p.num_groups * p.num_out * panel;
  const int64_t in_room = row_room(p.width), out_room = row_room(p.dense_width);
  Scratch memory(host, Scratch::bytes_of<float>(all));
  float* const panels = memory.next<float>(all);
  pack_routed<T>(p, host, false, panels, panel);
  clear_what_is_left_out(p, out, outputs);
  over(host, Chunk::number(p), [&](Items& items) {
    Scratch own(
        host, Scratch::bytes_of<float>(p.num_groups * kChunk * in_room) + Scratch::bytes_of<float>(kChunk * out_room));
    float* const in = own.next<float>(p.num_groups * kChunk * in_room);
    float* const sums = own.next<float>(kChunk * out_room);
    for (int64_t item; items.next(item);) {
      const Chunk chunk = Chunk::at(p, item);
      if (chunk.count == 0) continue;
      uint64_t any = 0;
      for (int64_t r = 0; r < chunk.count; ++r) any |= chunk.mask(p, r);
      for (int64_t g = 0; g < p.num_groups; ++g) {
        if (!uses(any, g)) continue;
        for (int64_t r = 0; r < chunk.count; ++r) {
          const int64_t t = chunk.tokens[r];
          float* const to = in + (g * kChunk + r) * in_room;
          if (!uses(chunk.mask(p, r), g)) {
            std::memset(to, 0, static_cast<size_t>(in_room) * sizeof(float));
            continue;
          }
          const T* const from = x + t * p.x_stride + g * p.width;
          const float gate = p.gates ? p.gates[t * p.num_groups + g] : 1.f;
          for (int64_t c = 0; c < p.width; c += kLanes) store(to + c, load_first(from + c, p.width - c) * gate);
        }
      }
      const T* const bias = bias_of<T>(p, chunk.token_class);
      for (int64_t part = 0; part < p.num_out; ++part) {
        for (int64_t j = 0; j < p.dense_width; j += kPanel) {
          const int64_t columns = smaller(kPanel, p.dense_width - j), vectors = ceil_div(columns, kLanes);
          for (int64_t r = 0; r < chunk.count; ++r) {
            std::memset(sums + r * out_room + j, 0, static_cast<size_t>(vectors * kLanes) * sizeof(float));
          }
          for (int64_t g = 0; g < p.num_groups; ++g) {
            if (!uses(any, g) || !sees(p, part, g)) continue;
            const float* const b = panels + ((chunk.token_class * p.num_groups + g) * p.num_out + part) * panel +
                                   j * round_up(p.width, kLanes);
            chunk.runs(p, g, [&](int64_t first, int64_t rows) {
              for (int64_t d = 0; d < p.width; d += kChain) {
                gemm<Into::kAdd>(rows, vectors, sums + first * out_room + j, out_room,
                                 in + (g * kChunk + first) * in_room + d, in_room, 1, b + d * kPanel, kPanel,
                                 smaller(kChain, p.width - d));
              }
            });
          }
        }
        for (int64_t r = 0; r < chunk.count; ++r) {
          store_rows(out + chunk.tokens[r] * outputs + part * p.dense_width, 0, sums + r * out_room, 0, 1,
                     p.dense_width, bias ? bias + part * p.dense_width : nullptr);
        }
      }
    }
  });
}

template <class T>
void scatter(const RoutedProductParams& p, const Host& host) {
  const auto* const x = static_cast<const T*>(p.x);
  const auto* const with = static_cast<const T*>(p.dot_with);
  auto *const out = static_cast<T*>(p.out), *const ungated = static_cast<T*>(p.ungated);
  const int64_t panel = packed_columns(p.width, p.dense_width), outputs = p.num_groups * p.width;
  const int64_t all = p.num_classes * p.num_groups * p.num_out * panel;
  const int64_t in_room = row_room(p.dense_width), out_room = row_room(p.width);
  Scratch memory(host, Scratch::bytes_of<float>(all));
  float* const panels = memory.next<float>(all);
  pack_routed<T>(p, host, true, panels, panel);
  clear_what_is_left_out(p, out, outputs);
  clear_what_is_left_out(p, ungated, outputs);
  over(host, Chunk::number(p), [&](Items& items) {
    Scratch own(host,
                Scratch::bytes_of<float>(p.num_out * kChunk * in_room) + Scratch::bytes_of<float>(kChunk * out_room));
    float* const in = own.next<float>(p.num_out * kChunk * in_room);
    float* const z = own.next<float>(kChunk * out_room);
    for (int64_t item; items.next(item);) {
      const Chunk chunk = Chunk::at(p, item);
      if (chunk.count == 0) continue;
      for (int64_t part = 0; part < p.num_out; ++part) {
        for (int64_t r = 0; r < chunk.count; ++r) {
          load_rows(in + (part * kChunk + r) * in_room, 0, x + chunk.tokens[r] * p.x_stride + part * p.dense_width, 0,
                    1, p.dense_width);
        }
      }
      const T* const bias = bias_of<T>(p, chunk.token_class);
      for (int64_t g = 0; g < p.num_groups; ++g) {
        const float* const b = panels + (chunk.token_class * p.num_groups + g) * p.num_out * panel;
        chunk.runs(p, g, [&](int64_t first, int64_t rows) {
          bool add = false;
          for (int64_t part = 0; part < p.num_out; ++part) {
            if (!sees(p, part, g)) continue;
            const float* const a = in + (part * kChunk + first) * in_room;
            float* const c = z + first * out_room;
            if (add) {
              times_columns<Into::kAdd>(rows, p.width, p.dense_width, c, out_room, a, in_room, 1, b + part * panel);
            } else {
              product(rows, p.width, p.dense_width, c, out_room, a, in_room, b + part * panel);
            }
            add = true;
          }
          if (!add) product(rows, p.width, 0, z + first * out_room, out_room, z, out_room, b);
        });
        for (int64_t r = 0; r < chunk.count; ++r) {
          const int64_t t = chunk.tokens[r], at = t * outputs + g * p.width;
          const bool used = uses(chunk.mask(p, r), g);
          const float gate = used && p.gates ? p.gates[t * p.num_groups + g] : 1.f;
          const T* const other = with ? with + t * p.dot_stride + g * p.width : nullptr;
          Vec dot{};
          for (int64_t c = 0; c < p.width; c += kLanes) {
            const int64_t left = p.width - c;
            Vec v{};
            if (used) {
              v = load(z + r * out_room + c);
              if (bias) v += load_first(bias + g * p.width + c, left);
              // Lanes past the width hold anything.
              if (other)
                dot += left >= kLanes      ? v * load(other + c)
                       : first_lanes(left) ? v * load_first(other + c, left)
                                           : Vec{};
            }
            if (ungated) store_first(ungated + at + c, v, left);
            store_first(out + at + c, used ? v * gate : v, left);
          }
          if (with) p.dots[t * p.num_groups + g] = used ? sum_of_lanes(dot) : 0.f;
        }
      }
    }
  });
}

// ---- few tokens ----

// sums[t] of kRows rows of the weight, each read once: += w[r] x[t] over n elements.
template <int kRows, int kTokens, class T>
WARPFORM_INLINE void dot_rows(Vec (&sums)[kRows][kTokens], const T* w, int64_t w_stride, const float* x,
                              int64_t x_stride, int64_t n) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Vec v[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) v[t] = load(x + t * x_stride + c);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec row = load(w + r * w_stride + c);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sums[r][t] += row * v[t];
    }
  }
  if (c < n) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec row = load_first(w + r * w_stride + c, n - c);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sums[r][t] += row * load(x + t * x_stride + c);
    }
  }
}

// Rows of the weight that an item has.
constexpr int64_t kFewRows = 32;

// f(row, rows, token, tokens) for blocks of at most 4 rows and 2 tokens of an item's rows.
template <class F>
WARPFORM_INLINE void few(int64_t begin, int64_t end, int64_t tokens, const F& f) {
  for (int64_t row = begin; row < end;) {
    const int64_t rows = end - row >= 4 ? 4 : 1;
    for (int64_t t = 0; t < tokens;) {
      const int64_t some = tokens - t >= 2 ? 2 : 1;
      if (rows == 4 && some == 2) f.template operator()<4, 2>(row, t);
      if (rows == 4 && some == 1) f.template operator()<4, 1>(row, t);
      if (rows == 1 && some == 2) f.template operator()<1, 2>(row, t);
      if (rows == 1 && some == 1) f.template operator()<1, 1>(row, t);
      t += some;
    }
    row += rows;
  }
}

template <class T>
void gather_few(const RoutedProductParams& p, const Host& host) {
  const auto *const x = static_cast<const T*>(p.x), *const w = static_cast<const T*>(p.w);
  auto* const out = static_cast<T*>(p.out);
  const int64_t outputs = p.num_out * p.dense_width, in_room = round_up(p.width, kLanes);
  const int64_t token_room = p.num_groups * in_room;
  const uint64_t any = groups_in_use(p);
  Scratch memory(host, Scratch::bytes_of<float>(p.tokens * token_room));
  float* const in = memory.next<float>(p.tokens * token_room);
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t g = 0; g < p.num_groups; ++g) {
      if (!uses(any, g)) continue;
      const bool used = uses(static_cast<uint64_t>(p.group_mask[t]), g);
      const float gate = used && p.gates ? p.gates[t * p.num_groups + g] : 1.f;
      for (int64_t c = 0; c < p.width; c += kLanes) {
        const Vec v = used ? load_first(x + t * p.x_stride + g * p.width + c, p.width - c) * gate : Vec{};
        store(in + t * token_room + g * in_room + c, v);
      }
    }
  }
  const T* const bias = static_cast<const T*>(p.bias);
  over(host, ceil_div(outputs, kFewRows), [&](Items& items) {
    for (int64_t item; items.next(item);) {
      few(item * kFewRows, smaller(outputs, (item + 1) * kFewRows), p.tokens,
          [&]<int kRows, int kTokens>(int64_t row, int64_t t) {
            uint64_t mask = 0;
            for (int i = 0; i < kTokens; ++i) mask |= static_cast<uint64_t>(p.group_mask[t + i]);
            Vec sums[kRows][kTokens] = {};
            for (int64_t g = 0; g < p.num_groups; ++g) {
              if (!uses(mask, g)) continue;
              dot_rows<kRows, kTokens>(sums, w + row * p.out_stride + g * p.width, p.out_stride,
                                       in + t * token_room + g * in_room, token_room, p.width);
            }
            for (int r = 0; r < kRows; ++r) {
              for (int i = 0; i < kTokens; ++i) {
                const float added = bias ? to_float(bias[row + r]) : 0.f;
                out[(t + i) * outputs + row + r] = from_float<T>(sum_of_lanes(sums[r][i]) + added);
              }
            }
          });
    }
  });
}

template <class T>
void scatter_few(const RoutedProductParams& p, const Host& host) {
  const auto *const x = static_cast<const T*>(p.x), *const w = static_cast<const T*>(p.w);
  auto *const out = static_cast<T*>(p.out), *const ungated = static_cast<T*>(p.ungated);
  const int64_t outputs = p.num_groups * p.width, room = round_up(p.dense_width, kLanes);
  const uint64_t any = groups_in_use(p);
  Scratch memory(host, Scratch::bytes_of<float>(p.tokens * room));
  float* const in = memory.next<float>(p.tokens * room);
  load_rows(in, room, x, p.x_stride, p.tokens, p.dense_width);
  const T* const bias = static_cast<const T*>(p.bias);
  const int64_t in_group = ceil_div(p.width, kFewRows);
  over(host, p.num_groups * in_group, [&](Items& items) {
    for (int64_t item; items.next(item);) {
      const int64_t g = item / in_group, begin = g * p.width + item % in_group * kFewRows;
      const int64_t end = smaller(begin + kFewRows, (g + 1) * p.width);
      few(begin, end, p.tokens, [&]<int kRows, int kTokens>(int64_t row, int64_t t) {
        Vec sums[kRows][kTokens] = {};
        uint64_t mask = 0;
        for (int i = 0; i < kTokens; ++i) mask |= static_cast<uint64_t>(p.group_mask[t + i]);
        if (uses(mask & any, g)) {
          dot_rows<kRows, kTokens>(sums, w + row * p.out_stride, p.out_stride, in + t * room, room, p.dense_width);
        }
        for (int r = 0; r < kRows; ++r) {
          for (int i = 0; i < kTokens; ++i) {
            const bool used = uses(static_cast<uint64_t>(p.group_mask[t + i]), g);
            const float added = bias ? to_float(bias[row + r]) : 0.f;
            const float z = used ? sum_of_lanes(sums[r][i]) + added : 0.f;
            const float gate = used && p.gates ? p.gates[(t + i) * p.num_groups + g] : 1.f;
            const int64_t at = (t + i) * outputs + row + r;
            if (ungated) ungated[at] = from_float<T>(z);
            out[at] = from_float<T>(used ? z * gate : 0.f);
          }
        }
      });
    }
  });
}

bool are_few(const RoutedProductParams& p) {
  return p.tokens <= kFewTokens && p.num_classes == 1 && p.out_mask == nullptr && p.in_stride == 1;
}

// ---- the gradient of the weight ----

template <class T>
void weight_gradient(const RoutedProductParams& p, const Host& host) {
  const auto *const dense = static_cast<const T*>(p.x), *const routed = static_cast<const T*>(p.dot_with);
  auto* const dw = static_cast<float*>(p.out);
  const int64_t dense_all = p.num_out * p.dense_width, routed_all = p.num_groups * p.width;
  const int64_t places = p.tiles * p.tile;
  const int64_t dense_room = row_room(p.dense_width), routed_room = row_room(p.width);
  // The rows of a sum are a group's; where those of dw are the other dimension's, it is transposed at the end.
  const int64_t sum_rows = p.width, sum_cols = p.dense_width, sum_room = row_room(sum_cols);
  const int64_t dw_cols = p.routed_out ? dense_all : routed_all;
  over(host, p.num_classes * p.num_groups * p.num_out, [&](Items& items) {
    Scratch own(host, Scratch::bytes_of<float>(kGradientChunk * dense_room) +
                          Scratch::bytes_of<float>(kGradientChunk * routed_room) +
                          Scratch::bytes_of<float>(sum_rows * sum_room));
    float* const dense_rows = own.next<float>(kGradientChunk * dense_room);
    float* const routed_rows = own.next<float>(kGradientChunk * routed_room);
    float* const sums = own.next<float>(sum_rows * sum_room);
    for (int64_t item; items.next(item);) {
      const int64_t part = item % p.num_out, g = item / p.num_out % p.num_groups;
      const int64_t token_class = item / p.num_out / p.num_groups;
      bool add = false;
      int64_t m = 0;
      const auto multiply = [&] {
        transposed_product(add, sum_rows, sum_cols, m, sums, sum_room, routed_rows, routed_room, dense_rows,
                           dense_room);
        add = true;
        m = 0;
      };
      if (sees(p, part, g)) {
        for (int64_t place = 0; place < places; ++place) {
          const int64_t t = p.perm[place];
          if (t < 0 || t >= p.tokens || p.tile_class[place / p.tile] != token_class) continue;
          if (!uses(static_cast<uint64_t>(p.group_mask[t]), g)) continue;
          load_rows(dense_rows + m * dense_room, 0, dense + t * p.x_stride + part * p.dense_width, 0, 1, p.dense_width);
          const float gate = p.gates ? p.gates[t * p.num_groups + g] : 1.f;
          const T* const from = routed + t * p.dot_stride + g * p.width;
          for (int64_t c = 0; c < p.width; c += kLanes) {
            store(routed_rows + m * routed_room + c, load_first(from + c, p.width - c) * gate);
          }
          if (++m == kGradientChunk) multiply();
        }
        if (m > 0) multiply();
      }
      const int64_t row0 = p.routed_out ? g * p.width : part * p.dense_width;
      const int64_t col0 = p.routed_out ? part * p.dense_width : g * p.width;
      float* const to = dw + (token_class * (p.routed_out ? routed_all : dense_all) + row0) * dw_cols + col0;
      if (!add) {
        for (int64_t r = 0; r < sum_rows; ++r) std::memset(sums + r * sum_room, 0, static_cast<size_t>(sum_room) * 4);
      }
      if (p.routed_out) {
        store_rows(to, dw_cols, sums, sum_room, sum_rows, sum_cols);
        continue;
      }
      for (int64_t r = 0; r < sum_rows; r += kLanes) {
        for (int64_t c = 0; c < sum_cols; c += kLanes) {
          Vec block[kLanes];
          for (int64_t n = 0; n < kLanes; ++n)
            block[n] = r + n < sum_rows ? load(sums + (r + n) * sum_room + c) : Vec{};
          transpose(block);
          for (int64_t n = 0; n < smaller(kLanes, sum_cols - c); ++n) {
            store_first(to + (c + n) * dw_cols + r, block[n], sum_rows - r);
          }
        }
      }
    }
  });
}

}  // namespace

void routing_mask(const RoutingMaskParams& params, const Host& host) {
  params.wide ? masks<int64_t>(params, host) : masks<int32_t>(params, host);
}
void routing_plan(const RoutingPlanParams& params, const Host& host) { plan(params, host); }
void hidden_gather(const RoutedProductParams& params, const Host& host) {
  with_element(params.dtype, [&]<class T>(T*) {
    if (params.dots != nullptr) group_dots<T>(params, static_cast<const T*>(params.x), host);
    are_few(params) ? gather_few<T>(params, host) : gather<T>(params, host);
  });
}
void hidden_scatter(const RoutedProductParams& params, const Host& host) {
  with_element(params.dtype, [&]<class T>(T*) {
    are_few(params) && params.dots == nullptr ? scatter_few<T>(params, host) : scatter<T>(params, host);
  });
}
void hidden_weight_grad(const RoutedProductParams& params, const Host& host) {
  with_element(params.dtype, [&]<class T>(T*) { weight_gradient<T>(params, host); });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
