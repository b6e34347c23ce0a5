// pool_mixer and its backward: PoolFormer's norm, pooling, layer scale and residual, by the formula in
// csrc/kernels/spatial/launch.h.
//
// Floor: bytes. The forward reads x twice and writes out, and the backward reads dout and x twice and writes dx; in
// each of them the second read comes from a cache, since an image's second pass follows its first (over_stages). The
// window's columns are added up, and its last k columns are in registers. How rows are read: stencil.h.
//
// Measured on two threads of an AMD EPYC with AVX2, float32, 8 x 56 x 56 x 64: forward 1.41 ms, with the backward
// 4.64 ms.
#include <sched.h>

#include "stencil.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Two stages of each group, in one parallel region: calls first(group, i) for i < firsts, and when all of a group's
// have returned then(group, i) for i < seconds. The second stage of a group is handed out behind the first stage of
// the next one, so that threads seldom wait, and a thread waits for items alone that another one is at work on.
template <class Worker>
void over_stages(const Host& host, int64_t groups, int64_t firsts, int64_t seconds, const Worker& worker) {
  if (groups <= 0) return;
  Scratch memory(host, Scratch::bytes_of<int64_t>(groups));
  auto* const done = memory.next<int64_t>(groups);
  for (int64_t g = 0; g < groups; ++g) done[g] = 0;
  over(host, groups * (firsts + seconds), [&](Items& items) {
    worker([&](const auto& first, const auto& then) {
      for (int64_t item; items.next(item);) {
        // Turns: the first stage of group 0; of group t, and the second one of t - 1; the second one of the last group.
        const int64_t behind = item - firsts, turn = behind < 0 ? 0 : 1 + behind / (firsts + seconds);
        const int64_t i = behind < 0 ? item : behind % (firsts + seconds);
        if (turn < groups && i < firsts) {
          first(turn, i);
          __atomic_fetch_add(&done[turn], 1, __ATOMIC_RELEASE);
          continue;
        }
        const int64_t group = turn - 1;
        while (__atomic_load_n(&done[group], __ATOMIC_ACQUIRE) < firsts) sched_yield();
        then(group, turn < groups ? i - firsts : i);
      }
    });
  });
}

// ---- passes between a row of float32 and tensors ----

// line = x * gain * inverse; `gain` is of channels, `inverse` of pixels.
__attribute__((noinline)) void read_scaled(DType type, const void* x, const Row& row, const float* gain,
                                           const float* inverse, float* line) {
  with_element(type, [&]<class T>(T*) {
    const T* const from = static_cast<const T*>(x);
    each_pixel(row, [&](int64_t t, int64_t l, int64_t c, int64_t w, auto lanes) __attribute__((always_inline)) {
      store(line + l, lanes.read(from + t) * load(gain + c) * inverse[w]);
    });
  });
}

// out = x + gain * line
__attribute__((noinline)) void add_scaled(DType type, const void* x, const Row& row, const float* gain,
                                          const float* line, void* out) {
  with_element(type, [&]<class T>(T*) {
    const T* const from = static_cast<const T*>(x);
    each_pixel(row, [&](int64_t t, int64_t l, int64_t c, int64_t, auto lanes) __attribute__((always_inline)) {
      lanes.write(static_cast<T*>(out) + t, lanes.read(from + t) + load(gain + c) * load(line + l));
    });
  });
}

// sums += factor * (sums over pixels of x * line)
__attribute__((noinline)) void add_products(DType type, const void* x, const Row& row, const float* line, float factor,
                                            float* sums) {
  with_element(type, [&]<class T>(T*) {
    const T* const from = static_cast<const T*>(x) + row.at;
    each_vector(0, row.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      Vec sum{};
      for (int64_t w = 0; w < row.width; ++w) {
        sum += lanes.read(from + w * row.stride + c) * load(line + w * row.wide + c);
      }
      store(sums + c, load(sums + c) + sum * factor);
    });
  });
}

// sums += sums over pixels of the line
WARPFORM_INLINE void add_pixels(const Row& row, const float* line, float* sums) {
  for (int64_t c = 0; c < row.wide; c += kLanes) {
    Vec sum{};
    for (int64_t w = 0; w < row.width; ++w) sum += load(line + w * row.wide + c);
    store(sums + c, load(sums + c) + sum);
  }
}

// dx = dout + (line - dout * gain) + slope * (x - mean - correction)
__attribute__((noinline)) void write_gradient(DType type, const void* dout, const void* x, const Row& row,
                                              const float* gain, const float* line, float mean, float correction,
                                              float slope, void* dx) {
  with_element(type, [&]<class T>(T*) {
    const T *const gradient = static_cast<const T*>(dout), *const from = static_cast<const T*>(x);
    each_pixel(row, [&](int64_t t, int64_t l, int64_t c, int64_t, auto lanes) __attribute__((always_inline)) {
      const Vec d = lanes.read(gradient + t);
      const Vec of_pool = load(line + l) - d * load(gain + c);
      lanes.write(static_cast<T*>(dx) + t, d + of_pool + (lanes.read(from + t) - mean - correction) * slope);
    });
  });
}

// ---- pooling ----

// Sums over the window of each pixel of a row, for one vector of channels; `rows` and `out` begin at the vector. With
// kMinusIdentity the means, by `inverse`, less the pixel itself.
template <int kSize, bool kMinusIdentity, bool kAll>
WARPFORM_INLINE void pool_vector(const float* const (&rows)[kSize], const float* inverse, int64_t width, int64_t wide,
                                 float* out) {
  constexpr int kReach = kSize / 2;
  Vec columns[kSize] = {};
  for (int64_t j = 0; j < width + kReach; ++j) {
    Vec column{};
    if (j < width) {
#pragma GCC unroll 7
      for (int i = 0; i < kSize; ++i) {
        if (kAll || rows[i] != nullptr) column += load(rows[i] + j * wide);
      }
    }
#pragma GCC unroll 7
    for (int i = 0; i + 1 < kSize; ++i) columns[i] = columns[i + 1];
    columns[kSize - 1] = column;
    if (j < kReach) continue;
    Vec sum = columns[0];
#pragma GCC unroll 7
    for (int i = 1; i < kSize; ++i) sum += columns[i];
    const int64_t w = j - kReach;
    if constexpr (kMinusIdentity) sum = sum * inverse[w] - load(rows[kReach] + w * wide);
    store(out + w * wide, sum);
  }
}

template <int kSize, bool kMinusIdentity>
void pool_row(const float* const (&rows)[kSize], const float* inverse, int64_t width, int64_t wide, float* out) {
  const bool all = all_there(rows);
  for (int64_t c = 0; c < wide; c += kLanes) {
    const float* at[kSize];
    for (int i = 0; i < kSize; ++i) at[i] = rows[i] == nullptr ? nullptr : rows[i] + c;
    if (all) {
      pool_vector<kSize, kMinusIdentity, true>(at, inverse, width, wide, out + c);
    } else {
      pool_vector<kSize, kMinusIdentity, false>(at, inverse, width, wide, out + c);
    }
  }
}

// 1 / count of the neighbours that a pixel has.
template <int kSize>
class Inverses {
 public:
  static int64_t bytes(int64_t width) { return Scratch::bytes_of<float>((kSize + 1) * width); }
  Inverses(Scratch& memory, const SpatialShape& s)
      : data_(memory.next<float>((kSize + 1) * s.width)), height_(s.height), width_(s.width) {
    for (int64_t rows = 1; rows <= kSize; ++rows) {
      for (int64_t w = 0; w < width_; ++w) {
        data_[rows * width_ + w] = 1.f / static_cast<float>(rows * neighbours(w, width_));
      }
    }
  }
  // Of row h, [width].
  const float* operator[](int64_t h) const { return data_ + neighbours(h, height_) * width_; }

 private:
  static int64_t neighbours(int64_t at, int64_t count) {
    return smaller(count - 1, at + kSize / 2) - larger(0, at - kSize / 2) + 1;
  }
  float* const data_;
  const int64_t height_, width_;
};

// Moments of some elements of a sample.
struct Moments {
  int64_t count;
  double mean;
  double squares;  // of the differences from the mean
};

// Sums over elements [0, count): calls f(at, lanes, sum) as sum_columns does. A sum of float32 has 16 terms; the sums
// are added in float64, since the one number that a sample's variance is has no other numbers' errors beside it.
template <int kSums, class F>
WARPFORM_INLINE void exact_sums(double (&total)[kSums], int64_t count, const F& f) {
  constexpr int64_t kTerms = 16 * 4 * kLanes;
  for (double& sum : total) sum = 0;
  for (int64_t first = 0; first < count; first += kTerms) {
    float some[kSums];
    sum_columns<4>(some, smaller(kTerms, count - first),
                   [&](int64_t at, auto lanes, Vec(&sum)[kSums])
                       __attribute__((always_inline)) { f(first + at, lanes, sum); });
    for (int k = 0; k < kSums; ++k) total[k] += some[k];
  }
}

__attribute__((noinline)) Moments moments_of(DType type, const void* x, int64_t begin, int64_t count) {
  Moments found{count, 0, 0};
  with_element(type, [&]<class T>(T*) {
    const T* const from = static_cast<const T*>(x) + begin;
    double sum[1], rest[2];
    exact_sums(sum, count, [&](int64_t at, auto lanes, Vec(&part)[1]) __attribute__((always_inline)) {
      part[0] += lanes.read(from + at);
    });
    const auto near_mean = static_cast<float>(sum[0] / static_cast<double>(count));
    exact_sums(rest, count, [&](int64_t at, auto lanes, Vec(&part)[2]) __attribute__((always_inline)) {
      const Vec d = lanes.or_zero(lanes.read(from + at) - near_mean);
      part[0] += d;
      part[1] += d * d;
    });
    // The sum of the differences is what rounding left in near_mean.
    const double correction = rest[0] / static_cast<double>(count);
    found.mean = near_mean + correction;
    found.squares = rest[1] - rest[0] * correction;
  });
  return found;
}

struct Statistics {
  float mean, rstd;
};

// Of the moments of all parts of a sample, in their order.
inline Statistics merged(const Moments* parts, int64_t count, float eps) {
  double elements = 0, sum = 0, squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    elements += static_cast<double>(parts[i].count);
    sum += static_cast<double>(parts[i].count) * parts[i].mean;
  }
  const double mean = sum / elements;
  for (int64_t i = 0; i < count; ++i) {
    const double d = parts[i].mean - mean;
    squares += parts[i].squares + static_cast<double>(parts[i].count) * d * d;
  }
  const double variance = squares < 0 ? 0 : squares / elements;  // and NaN stays NaN
  return {static_cast<float>(mean), static_cast<float>(1 / __builtin_sqrt(variance + eps))};
}

// scale * weight, [wide]; `weight` and `scale` are float32, scale may be null.
inline void gain_of(const float* weight, const float* scale, const Piece& piece, float factor, float* gain) {
  for (int64_t c = 0; c < piece.wide; c += kLanes) {
    const int64_t at = piece.channel + c, n = piece.channels - c;
    const Vec w = load_first(weight + at, n);
    store(gain + c, (scale == nullptr ? w : w * load_first(scale + at, n)) * factor);
  }
}

// What a thread keeps while it pools.
template <int kSize>
struct PoolRoom {
  Scratch memory;
  Ring<kSize> ring;
  const Inverses<kSize> inverses;
  float* const gain;  // [block]
  float* const line;  // [width][block]

  PoolRoom(const Host& host, const SpatialShape& s, int64_t block)
      : memory(host, Ring<kSize>::bytes(s, block) + Inverses<kSize>::bytes(s.width) + Scratch::bytes_of<float>(block) +
                         Scratch::bytes_of<float>(s.width * block)),
        ring(memory, s, block),
        inverses(memory, s),
        gain(memory.next<float>(block)),
        line(memory.next<float>(s.width * block)) {}

  // Makes P x - x of each row of a piece in `line`, and calls use(row, centred), where x less the mean is.
  template <class F>
  void differences(DType type, const void* x, const SpatialShape& s, int64_t b, const Piece& piece, float mean,
                   const F& use) {
    down_the_rows<kSize>(
        piece.first, piece.last, s.height,
        [&](int64_t h) { read_row(type, x, Row(s, b, h, piece), mean, ring.place(h)); },
        [&](int64_t h) {
          const float* rows[kSize];
          ring.window(h, s.height, rows);
          pool_row<kSize, true>(rows, inverses[h], s.width, piece.wide, line);
          use(Row(s, b, h, piece), rows[kSize / 2]);
        });
  }
};

template <int kSize>
void pool_mixer_of(const PoolMixerParams& p, const Host& host) {
  const SpatialShape& s = p.shape;
  const int64_t elements = s.height * s.width * s.channels;
  if (s.batch * elements == 0) {
    for (int64_t b = 0; b < s.batch; ++b) p.mean[b] = p.rstd[b] = 0.f;
    return;
  }
  const DType type = p.float_parameters ? DType::kFloat32 : p.dtype;
  const int64_t parts = ceil_div(elements, kItemElements), wide = round_up(s.channels, kLanes);
  const Cut cut(s, kSize + 1);
  Scratch memory(host, 2 * Scratch::bytes_of<float>(wide) + Scratch::bytes_of<Moments>(s.batch * parts));
  const float* const weight = as_floats(p.weight, type, s.channels, memory.next<float>(wide));
  const float* const scale = as_floats(p.scale, type, s.channels, memory.next<float>(wide));
  auto* const moments = memory.next<Moments>(s.batch * parts);

  over_stages(host, s.batch, parts, cut.count(), [&](const auto& run) {
    PoolRoom<kSize> room(host, s, cut.block);
    run(
        [&](int64_t b, int64_t i) {
          const int64_t begin = i * kItemElements;
          moments[b * parts + i] =
              moments_of(p.dtype, p.x, b * elements + begin, smaller(kItemElements, elements - begin));
        },
        [&](int64_t b, int64_t i) {
          const Statistics found = merged(moments + b * parts, parts, p.eps);
          if (i == 0) {
            p.mean[b] = found.mean;
            p.rstd[b] = found.rstd;
          }
          const Piece piece = cut[i];
          gain_of(weight, scale, piece, found.rstd, room.gain);
          room.differences(p.dtype, p.x, s, b, piece, found.mean, [&](const Row& row, const float*) {
            add_scaled(p.dtype, p.x, row, room.gain, room.line, p.out);
          });
        });
  });
}

template <int kSize>
void pool_mixer_backward_of(const PoolMixerBackwardParams& p, const Host& host) {
  const SpatialShape& s = p.shape;
  const int64_t elements = s.height * s.width * s.channels;
  const DType type = p.float_parameters ? DType::kFloat32 : p.dtype;
  const Cut cut(s, kSize + 1);
  const int64_t shares = elements == 0 ? 0 : s.batch * cut.chunks, wide = cut.room();
  Scratch memory(host, 3 * Scratch::bytes_of<float>(wide) + Scratch::bytes_of<float>(shares * 2 * wide));
  const float* const weight = as_floats(p.weight, type, s.channels, memory.next<float>(wide));
  const float* const scale = as_floats(p.scale, type, s.channels, memory.next<float>(wide));
  float* const sums = memory.next<float>(wide);
  float* const q = memory.next<float>(shares * 2 * wide);  // of each sample and chunk of its rows

  over_stages(host, shares == 0 ? 0 : s.batch, cut.count(), cut.count(), [&](const auto& run) {
    PoolRoom<kSize> room(host, s, cut.block);
    run(
        // q: sums of dout (P x - x) rstd, and behind them those of x - mean, since the mean was rounded
        [&](int64_t b, int64_t i) {
          const Piece piece = cut[i];
          float* const sum_of = q + (b * cut.chunks + piece.chunk) * 2 * wide + piece.channel;
          for (int64_t c = 0; c < piece.wide; c += kLanes) {
            store(sum_of + c, Vec{});
            store(sum_of + wide + c, Vec{});
          }
          room.differences(p.dtype, p.x, s, b, piece, p.mean[b], [&](const Row& row, const float* centred) {
            add_products(p.dtype, p.dout, row, room.line, p.rstd[b], sum_of);
            add_pixels(row, centred, sum_of + wide);
          });
        },
        // dx = dout + P^T z - z + slope (x - mean) with z = dout scale weight rstd
        [&](int64_t b, int64_t i) {
          const float rstd = p.rstd[b];
          float of_sample[2];
          sum_columns<1>(of_sample, s.channels,
                         [&](int64_t c, auto lanes, Vec(&part)[2]) __attribute__((always_inline)) {
                           Vec along{};
                           for (int64_t k = 0; k < cut.chunks; ++k) {
                             const float* const sum_of = q + (b * cut.chunks + k) * 2 * wide + c;
                             along += lanes.read(sum_of);
                             part[1] += lanes.read(sum_of + wide);
                           }
                           const Vec w = lanes.read(weight + c);
                           part[0] += along * (scale == nullptr ? w : w * lanes.read(scale + c));
                         });
          const float slope = -rstd * rstd * of_sample[0] / static_cast<float>(elements);
          const float correction = of_sample[1] / static_cast<float>(elements);
          const Piece piece = cut[i];
          gain_of(weight, scale, piece, rstd, room.gain);
          down_the_rows<kSize>(
              piece.first, piece.last, s.height,
              [&](int64_t h) {
                read_scaled(p.dtype, p.dout, Row(s, b, h, piece), room.gain, room.inverses[h], room.ring.place(h));
              },
              [&](int64_t h) {
                const float* rows[kSize];
                room.ring.window(h, s.height, rows);
                pool_row<kSize, false>(rows, nullptr, s.width, piece.wide, room.line);
                write_gradient(p.dtype, p.dout, p.x, Row(s, b, h, piece), room.gain, room.line, p.mean[b], correction,
                               slope, p.dx);
              });
        });
  });

  add_shares(sums, DType::kFloat32, q, shares, 2 * wide, s.channels);
  with_element(type, [&]<class P>(P*) {
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      const int64_t n = s.channels - c;
      const Vec sum = load_first(sums + c, n);
      store_first(static_cast<P*>(p.dweight) + c, scale == nullptr ? sum : sum * load_first(scale + c, n), n);
      if (scale != nullptr) store_first(static_cast<P*>(p.dscale) + c, sum * load_first(weight + c, n), n);
    }
  });
}

}  // namespace

void pool_mixer(const PoolMixerParams& params, const Host& host) {
  with_size(params.pool_size, [&]<int kSize>() { pool_mixer_of<kSize>(params, host_for(host, params.shape)); });
}

void pool_mixer_backward(const PoolMixerBackwardParams& params, const Host& host) {
  with_size(params.pool_size,
            [&]<int kSize>() { pool_mixer_backward_of<kSize>(params, host_for(host, params.shape)); });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
