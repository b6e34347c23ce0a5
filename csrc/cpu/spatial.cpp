// pool_mixer, depthwise_conv2d and their backwards: stencils over [batch, height, width, channels].
//
// Floor: bytes. pool_mixer reads x twice and writes out, and its backward reads dout and x twice and writes dx; in
// each of them the second read comes from a cache, since an image's second pass follows its first (over_stages). The
// convolution reads x and writes out; its backward reads dout and x and writes dx, and makes the convolution again.
// It is bound by arithmetic where it has an erf: some 30 operations an element beside 2 k^2.
//
// Measured on two threads of an AMD EPYC with AVX2, float32: pool_mixer at 8 x 56 x 56 x 64 forward 1.41 ms, with the
// backward 4.64 ms; depthwise_conv2d with GELU at 128 x 128 x 128 3.08 ms and 14.9 ms, where torch's eager convolution
// takes 11.3 ms with its backward: what makes the gradients of the taps is the part to look at.
//
// An item is some rows of one image by a block of channels. It goes down its rows and keeps the k that a window needs
// as float32, one after another, so that strides between pixels and 16-bit numbers are met once (Ring). What is
// computed from them is a row of float32 again, [width][wide], and another pass over it, which stays in L1, reads and
// writes tensors. Along a row a vector of channels goes from pixel to pixel: a convolution gives each pixel to the k
// outputs that it belongs to, which are in registers; pooling adds up the window's columns, and its last k columns
// are in registers.
#include <sched.h>

#include "families.h"
#include "gelu.h"
#include "rows.h"
#include "simd.h"
#include "threads.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// ---- how the work is cut ----

// The floats that the rows of an item may take: half of the L2 of most CPUs, beside what is read and written.
constexpr int64_t kRingFloats = 16384;
constexpr int64_t kPieceElements = 65536;
constexpr int64_t kBlockStep = 16;  // a cache line of float32

// Some rows of an image by some of its channels.
struct Piece {
  int64_t chunk;        // the number of these rows
  int64_t first, last;  // rows
  int64_t channel;      // the first
  int64_t channels;     // how many
  int64_t wide;         // channels, rounded up to vectors
};

// The pieces of an image. The shape alone decides them.
struct Cut {
  int64_t rows, chunks, block, blocks, height, channels;

  // lines: how many rows an item keeps.
  Cut(const SpatialShape& s, int64_t lines) : height(s.height), channels(s.channels) {
    const int64_t fit = kRingFloats / (lines * larger(1, s.width)) / kBlockStep * kBlockStep;
    blocks = ceil_div(channels, larger(kBlockStep, fit));
    block = round_up(ceil_div(channels, larger(1, blocks)), kBlockStep);
    chunks = ceil_div(height, larger(lines, ceil_div(kPieceElements, larger(1, s.width * block))));
    rows = ceil_div(height, larger(1, chunks));
  }
  int64_t count() const { return chunks * blocks; }
  // Channels of all blocks: sums of a piece may be stored as vectors.
  int64_t room() const { return blocks * block; }
  Piece operator[](int64_t i) const {
    const int64_t chunk = i / blocks, channel = i % blocks * block;
    const int64_t n = smaller(block, channels - channel);
    return {chunk, chunk * rows, smaller(height, (chunk + 1) * rows), channel, n, round_up(n, kLanes)};
  }
};

// The host, or its calling thread alone where a parallel region would cost more than the work.
inline Host host_for(const Host& host, const SpatialShape& s) {
  Host found = host;
  if (s.batch * s.height * s.width * s.channels < kItemElements / 2) found.threads = [] { return int64_t{1}; };
  return found;
}

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

// ---- rows of an image as float32 ----

// The last kCount rows that were put in, each [width][wide]; row h is in place h % kCount.
template <int kCount>
class Ring {
 public:
  static int64_t bytes(const SpatialShape& s, int64_t block) {
    return Scratch::bytes_of<float>(kCount * s.width * block);
  }
  Ring(Scratch& memory, const SpatialShape& s, int64_t block)
      : data_(memory.next<float>(kCount * s.width * block)), line_(s.width * block) {}

  float* place(int64_t h) { return data_ + h % kCount * line_; }
  // The rows of the window around row h, null where the image has none.
  WARPFORM_INLINE void window(int64_t h, int64_t height, const float* (&rows)[kCount]) {
    for (int i = 0; i < kCount; ++i) {
      const int64_t at = h + i - kCount / 2;
      rows[i] = at >= 0 && at < height ? place(at) : nullptr;
    }
  }

 private:
  float* const data_;
  const int64_t line_;
};

// A row of a piece: where its first pixel is in a tensor, in elements, and how far apart its pixels are there and in
// rows of float32.
struct Row {
  int64_t at, width, stride, channels, wide;
  Row(const SpatialShape& s, int64_t b, int64_t h, const Piece& piece)
      : at((b * s.height + h) * s.width * s.channels + piece.channel),
        width(s.width),
        stride(s.channels),
        channels(piece.channels),
        wide(piece.wide) {}
};

// Calls f(t, l, c, w, lanes) for all vectors of a row: places in the tensor and in a row of float32, channel and pixel.
template <class F>
WARPFORM_INLINE void each_pixel(const Row& row, const F& f) {
  for (int64_t w = 0; w < row.width; ++w) {
    const int64_t t = row.at + w * row.stride, l = w * row.wide;
    each_vector(0, row.channels,
                [&](int64_t c, auto lanes) __attribute__((always_inline)) { f(t + c, l + c, c, w, lanes); });
  }
}

// Passes between a row of float32 and tensors of `type`. They are functions of their own, and so compiled once for all
// sizes of windows.

// line = x - mean
__attribute__((noinline)) void read_row(DType type, const void* x, const Row& row, float mean, float* line) {
  with_element(type, [&]<class T>(T*) {
    const T* const from = static_cast<const T*>(x);
    each_pixel(row, [&](int64_t t, int64_t l, int64_t, int64_t, auto lanes)
                        __attribute__((always_inline)) { store(line + l, lanes.read(from + t) - mean); });
  });
}

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

template <Activation kActivation>
WARPFORM_INLINE Vec activated(Vec pre) {
  if constexpr (kActivation == Activation::kGelu) return gelu<false>(pre);
  if constexpr (kActivation == Activation::kRelu) return max(Vec{}, pre);
  return pre;
}

// As torch has it, NaN lets the gradient through.
template <Activation kActivation>
WARPFORM_INLINE Vec slope_of(Vec pre) {
  if constexpr (kActivation == Activation::kGelu) return gelu_slope<false>(pre);
  return pre <= 0.f ? Vec{} : broadcast(1.f);
}

template <class F>
WARPFORM_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kLinear: f.template operator()<Activation::kLinear>(); break;
    case Activation::kGelu: f.template operator()<Activation::kGelu>(); break;
    case Activation::kRelu: f.template operator()<Activation::kRelu>(); break;
  }
}

// out = activation(line)
__attribute__((noinline)) void write_row(DType type, const float* line, const Row& row, Activation activation,
                                         void* out) {
  with_element(type, [&]<class T>(T*) {
    with_activation(activation, [&]<Activation kActivation>() {
      each_pixel(row, [&](int64_t t, int64_t l, int64_t, int64_t, auto lanes) __attribute__((always_inline)) {
        lanes.write(static_cast<T*>(out) + t, activated<kActivation>(load(line + l)));
      });
    });
  });
}

// line = dout * activation'(line), or dout where there is none
__attribute__((noinline)) void read_slopes(DType type, const void* dout, const Row& row, Activation activation,
                                           float* line) {
  if (activation == Activation::kLinear) return read_row(type, dout, row, 0.f, line);
  with_element(type, [&]<class T>(T*) {
    with_activation(activation, [&]<Activation kActivation>() {
      each_pixel(row, [&](int64_t t, int64_t l, int64_t, int64_t, auto lanes) __attribute__((always_inline)) {
        store(line + l, lanes.read(static_cast<const T*>(dout) + t) * slope_of<kActivation>(load(line + l)));
      });
    });
  });
}

// Calls put(h) for the rows that windows of the rows [first, last) reach, and row(h) as soon as those of its window are
// there.
template <int kSize, class Put, class F>
WARPFORM_INLINE void down_the_rows(int64_t first, int64_t last, int64_t height, const Put& put, const F& row) {
  constexpr int64_t kReach = kSize / 2;
  for (int64_t h = larger(0, first - kReach); h < last + kReach; ++h) {
    if (h < height) put(h);
    if (h - kReach >= first) row(h - kReach);
  }
}

template <int kSize>
WARPFORM_INLINE bool all_there(const float* const (&rows)[kSize]) {
  bool all = true;
  for (int i = 0; i < kSize; ++i) all &= rows[i] != nullptr;
  return all;
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

// ---- convolution ----

// The taps of a piece's channels as float32, [size * size][wide], and its bias or zeros, [wide].
template <int kSize>
class Taps {
 public:
  static constexpr int kCount = kSize * kSize;
  static int64_t bytes(int64_t block) {
    return 2 * Scratch::bytes_of<float>(kCount * block) + Scratch::bytes_of<float>(block);
  }
  Taps(Scratch& memory, int64_t block)
      : taps_(memory.next<float>(kCount * block)),
        given_(memory.next<float>(kCount * block)),
        bias_(memory.next<float>(block)) {}

  void load_from(DType type, const void* weight, const void* bias, const Piece& piece) {
    with_element(type, [&]<class T>(T*) {
      const int64_t count = piece.channels * kCount;
      const T* const from = static_cast<const T*>(weight) + piece.channel * kCount;
      for (int64_t i = 0; i < count; i += kLanes) store_first(given_ + i, load_first(from + i, count - i), count - i);
      const T* const starts = static_cast<const T*>(bias) + piece.channel;
      for (int64_t c = 0; c < piece.wide; c += kLanes) {
        store(bias_ + c, bias == nullptr ? Vec{} : load_first(starts + c, piece.channels - c));
      }
    });
    for (int64_t t = 0; t < kCount; ++t) {
      float* const to = taps_ + t * piece.wide;
      for (int64_t c = 0; c < piece.channels; ++c) to[c] = given_[c * kCount + t];
      for (int64_t c = piece.channels; c < piece.wide; ++c) to[c] = 0.f;
    }
  }
  const float* taps() const { return taps_; }
  const float* bias() const { return bias_; }

 private:
  float *const taps_, *const given_, *const bias_;
};

// The convolution along a row, for one vector of channels; what is null begins at 0 and `rows`, `taps`, `bias` and
// `out` at the vector. kTurned: the taps are turned about their center.
template <int kSize, bool kTurned, bool kAll>
WARPFORM_INLINE void convolve_vector(const float* const (&rows)[kSize], const float* taps, const float* bias,
                                     int64_t width, int64_t wide, float* out) {
  constexpr int kReach = kSize / 2, kCount = kSize * kSize;
  Vec filter[kCount];
#pragma GCC unroll 49
  for (int t = 0; t < kCount; ++t) filter[t] = load(taps + (kTurned ? kCount - 1 - t : t) * wide);
  const Vec start = bias == nullptr ? Vec{} : load(bias);
  // Of the outputs j - kReach to j + kReach.
  Vec sums[kSize];
  for (int m = 0; m < kSize; ++m) sums[m] = start;
  for (int64_t j = 0; j < width; ++j) {
#pragma GCC unroll 7
    for (int i = 0; i < kSize; ++i) {
      if (!kAll && rows[i] == nullptr) continue;
      const Vec x = load(rows[i] + j * wide);
#pragma GCC unroll 7
      for (int m = 0; m < kSize; ++m) sums[m] += filter[i * kSize + kSize - 1 - m] * x;
    }
    if (j >= kReach) store(out + (j - kReach) * wide, sums[0]);
#pragma GCC unroll 7
    for (int m = 0; m + 1 < kSize; ++m) sums[m] = sums[m + 1];
    sums[kSize - 1] = start;
  }
#pragma GCC unroll 3
  for (int m = 0; m < kReach; ++m) {
    const int64_t w = width - kReach + m;
    if (w >= 0) store(out + w * wide, sums[m]);
  }
}

// [width][wide] of float32.
template <int kSize, bool kTurned>
void convolve_row(const float* const (&rows)[kSize], const float* taps, const float* bias, int64_t width, int64_t wide,
                  float* out) {
  const bool all = all_there(rows);
  for (int64_t c = 0; c < wide; c += kLanes) {
    const float* at[kSize];
    for (int i = 0; i < kSize; ++i) at[i] = rows[i] == nullptr ? nullptr : rows[i] + c;
    const float* const b = bias == nullptr ? nullptr : bias + c;
    if (all) {
      convolve_vector<kSize, kTurned, true>(at, taps + c, b, width, wide, out + c);
    } else {
      convolve_vector<kSize, kTurned, false>(at, taps + c, b, width, wide, out + c);
    }
  }
}

template <int kSize>
void depthwise(const DepthwiseConv2dParams& p, const Host& host) {
  const SpatialShape& s = p.shape;
  const Cut cut(s, kSize + 1);
  over(host, s.width == 0 ? 0 : s.batch * cut.count(), [&](Items& items) {
    Scratch own(host, Ring<kSize>::bytes(s, cut.block) + Taps<kSize>::bytes(cut.block) +
                          Scratch::bytes_of<float>(s.width * cut.block));
    Ring<kSize> ring(own, s, cut.block);
    Taps<kSize> taps(own, cut.block);
    float* const line = own.next<float>(s.width * cut.block);
    for (int64_t item; items.next(item);) {
      const int64_t b = item / cut.count();
      const Piece piece = cut[item % cut.count()];
      taps.load_from(p.dtype, p.weight, p.bias, piece);
      down_the_rows<kSize>(
          piece.first, piece.last, s.height,
          [&](int64_t h) { read_row(p.dtype, p.x, Row(s, b, h, piece), 0.f, ring.place(h)); },
          [&](int64_t h) {
            const float* rows[kSize];
            ring.window(h, s.height, rows);
            convolve_row<kSize, false>(rows, taps.taps(), taps.bias(), s.width, piece.wide, line);
            write_row(p.dtype, line, Row(s, b, h, piece), p.activation, p.out);
          });
    }
  });
}

// sums [size * size][wide] += over w of slopes [width][wide] times the pixels of each tap, and behind them the sums
// of the slopes. Each row's sum is made by itself, so that none is long.
template <int kSize>
void add_tap_gradients(const float* const (&rows)[kSize], const float* slopes, int64_t width, int64_t wide,
                       float* sums) {
  constexpr int kReach = kSize / 2;
  for (int64_t c = 0; c < wide; c += kLanes) {
    for (int i = 0; i < kSize; ++i) {
      if (rows[i] == nullptr) continue;
      const float* const row = rows[i] + c;
      Vec of_taps[kSize] = {};
      const auto add = [&](int64_t w, int first, int last) __attribute__((always_inline)) {
        const Vec d = load(slopes + w * wide + c);
        for (int j = first; j < last; ++j) of_taps[j] += d * load(row + (w + j - kReach) * wide);
      };
      const auto at_an_edge = [&](int64_t w) {
        add(w, static_cast<int>(larger(0, kReach - w)), static_cast<int>(smaller(kSize, width - w + kReach)));
      };
      int64_t w = 0;
      for (; w < smaller(kReach, width); ++w) at_an_edge(w);
      for (; w < width - kReach; ++w) {
        const Vec d = load(slopes + w * wide + c);
#pragma GCC unroll 7
        for (int j = 0; j < kSize; ++j) of_taps[j] += d * load(row + (w + j - kReach) * wide);
      }
      for (; w < width; ++w) at_an_edge(w);
      for (int j = 0; j < kSize; ++j) {
        float* const to = sums + (i * kSize + j) * wide + c;
        store(to, load(to) + of_taps[j]);
      }
    }
    Vec of_bias{};
    for (int64_t w = 0; w < width; ++w) of_bias += load(slopes + w * wide + c);
    float* const to = sums + kSize * kSize * wide + c;
    store(to, load(to) + of_bias);
  }
}

template <int kSize>
void depthwise_backward(const DepthwiseConv2dBackwardParams& p, const Host& host) {
  constexpr int64_t kReach = kSize / 2, kSums = kSize * kSize + 1;
  const SpatialShape& s = p.shape;
  const Cut cut(s, 2 * kSize + 1);
  const int64_t shares = s.width * s.channels == 0 ? 0 : s.batch * cut.chunks, room = cut.room();
  Scratch memory(host, Scratch::bytes_of<float>(shares * kSums * room) + Scratch::bytes_of<float>(room));
  float* const all = memory.next<float>(shares * kSums * room);
  float* const total = memory.next<float>(room);
  over(host, shares * cut.blocks, [&](Items& items) {
    Scratch own(host, 2 * Ring<kSize>::bytes(s, cut.block) + Taps<kSize>::bytes(cut.block) +
                          Scratch::bytes_of<float>(s.width * cut.block) + Scratch::bytes_of<float>(kSums * cut.block));
    Ring<kSize> ring(own, s, cut.block), slopes(own, s, cut.block);
    Taps<kSize> taps(own, cut.block);
    float* const line = own.next<float>(s.width * cut.block);
    float* const sums = own.next<float>(kSums * cut.block);
    for (int64_t item; items.next(item);) {
      const int64_t b = item / cut.count();
      const Piece piece = cut[item % cut.count()];
      taps.load_from(p.dtype, p.weight, p.bias, piece);
      std::memset(sums, 0, static_cast<size_t>(kSums * piece.wide) * sizeof(float));
      const auto write_dx = [&](int64_t h) {
        const float* rows[kSize];
        slopes.window(h, s.height, rows);
        convolve_row<kSize, true>(rows, taps.taps(), nullptr, s.width, piece.wide, line);
        write_row(p.dtype, line, Row(s, b, h, piece), Activation::kLinear, p.dx);
      };
      // The rows of dpre that windows of the piece's rows reach.
      const int64_t first = larger(0, piece.first - kReach), last = smaller(s.height, piece.last + kReach);
      down_the_rows<kSize>(
          first, last, s.height, [&](int64_t h) { read_row(p.dtype, p.x, Row(s, b, h, piece), 0.f, ring.place(h)); },
          [&](int64_t h) {
            const float* rows[kSize];
            ring.window(h, s.height, rows);
            float* const dpre = slopes.place(h);
            if (p.activation != Activation::kLinear) {
              convolve_row<kSize, false>(rows, taps.taps(), taps.bias(), s.width, piece.wide, dpre);
            }
            read_slopes(p.dtype, p.dout, Row(s, b, h, piece), p.activation, dpre);
            if (h >= piece.first && h < piece.last) add_tap_gradients<kSize>(rows, dpre, s.width, piece.wide, sums);
            if (h - kReach >= piece.first) write_dx(h - kReach);
          });
      for (int64_t h = larger(piece.first, last - kReach); h < piece.last; ++h) write_dx(h);
      float* const share = all + (b * cut.chunks + piece.chunk) * kSums * room + piece.channel;
      for (int64_t t = 0; t < kSums; ++t) {
        std::memcpy(share + t * room, sums + t * piece.wide, static_cast<size_t>(piece.wide) * sizeof(float));
      }
    }
  });
  with_element(p.dtype, [&]<class T>(T*) {
    for (int64_t t = 0; t < kSize * kSize; ++t) {
      add_shares(total, DType::kFloat32, all + t * room, shares, kSums * room, s.channels);
      T* const to = static_cast<T*>(p.dweight) + t;
      for (int64_t c = 0; c < s.channels; ++c) to[c * kSize * kSize] = from_float<T>(total[c]);
    }
  });
  if (p.bias != nullptr) {
    add_shares(p.dbias, p.dtype, all + (kSums - 1) * room, shares, kSums * room, s.channels);
  }
}

template <class F>
WARPFORM_INLINE void with_size(int size, const F& f) {
  switch (size) {
    case 3: f.template operator()<3>(); break;
    case 5: f.template operator()<5>(); break;
    case 7: f.template operator()<7>(); break;
  }
}

}  // namespace

void pool_mixer(const PoolMixerParams& params, const Host& host) {
  with_size(params.pool_size, [&]<int kSize>() { pool_mixer_of<kSize>(params, host_for(host, params.shape)); });
}

void pool_mixer_backward(const PoolMixerBackwardParams& params, const Host& host) {
  with_size(params.pool_size,
            [&]<int kSize>() { pool_mixer_backward_of<kSize>(params, host_for(host, params.shape)); });
}

void depthwise_conv2d(const DepthwiseConv2dParams& params, const Host& host) {
  with_size(params.kernel_size, [&]<int kSize>() { depthwise<kSize>(params, host_for(host, params.shape)); });
}

void depthwise_conv2d_backward(const DepthwiseConv2dBackwardParams& params, const Host& host) {
  with_size(params.kernel_size, [&]<int kSize>() { depthwise_backward<kSize>(params, host_for(host, params.shape)); });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
