// Mixing the tokens of windows by a matrix, with LayerNorm on the way in and a gate on the way out, and the gradients.
//
// Floor     Arithmetic: 2 tokens^2 channels FLOPs a window in the forward and three times as many in the backward,
//           which makes y again for the gradient of the gate. Windows lie beside each other in scratch, a row of it
//           for each place in a window, until a product has some 64 columns: its operands are whole vectors for any
//           number of channels, and the matrix is read from L2 once for several windows. A window has all of its
//           channels there, since LayerNorm's backward needs their sums: four floats an element. Few windows are work
//           for few threads.
// Measured  On an AMD EPYC with AVX2 beside other processes, at the levels of MAXIM-S at 256 x 256 (windows of 256
//           tokens with 32 and 64 channels, of 64 with 128, twice), in turns with torch's composition, the best of
//           each. float32, one thread, blocks: forward 15.3, 7.1, 1.27 and 0.30 ms, 53 to 75 GFLOP/s; with the
//           backward 57, 27, 4.8 and 1.1 ms. With blocks and grids it is 1.7 to 2.6 times as fast as torch, and 1.04
//           to 1.9 times with the backward. Two threads: forward 15.9, 5.4, 0.88 and 0.22 ms, 2.4 to 3.3 times; with
//           the backward 70, 30, 2.8 and 0.79 ms, 1.7 to 5 times. bfloat16, one thread: 66 times and more, 26 and
//           more with the backward: torch's products of bfloat16 are slow on this CPU. Some four fifths of the
//           backward's time are products. Rows of tokens lie up to some pages apart and are fetched ahead; the
//           forward took up to 28 % longer without that.
//
// Gradients of parameters are sums over shares of the windows, cut by the sizes alone and added in order.
#include "families.h"
#include "gemm.h"
#include "rows.h"
#include "simd.h"
#include "threads.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Columns of a product, at least, and elements of an item of work.
constexpr int64_t kColumns = 64;
constexpr int64_t kGroupElements = 8192;
// Shares of the windows, at most, and floats of all of their sums.
constexpr int64_t kMostMixShares = 16;
constexpr int64_t kShareRoom = int64_t{1} << 23;
// Sums of shares that are added in one thread.
constexpr int64_t kAddedAlone = int64_t{1} << 20;

// Elements between rows of n elements in scratch: an odd number of cache lines, so that the rows of a panel lie in all
// sets of the cache.
constexpr int64_t row_room(int64_t n) { return (ceil_div(n, 16) | 1) * 16; }

struct MixSizes {
  int64_t tokens;       // of a window
  int64_t channels;     // of a token
  int64_t wide;         // those in whole vectors
  int64_t windows;      // of all images
  int64_t each;         // windows of a group, which are mixed in one product
  int64_t groups;       // of windows
  int64_t room;         // elements between rows of a group
  int64_t weight_room;  // elements between rows of the matrix

  explicit MixSizes(const WindowMixProblem& p)
      : tokens(p.tokens), channels(p.channels), wide(round_up(p.channels, kLanes)), windows(p.windows) {
    each = larger(1, smaller(windows, ceil_div(larger(kColumns, kGroupElements / tokens), wide)));
    groups = ceil_div(windows, each);
    room = row_room(each * wide);
    weight_room = row_room(tokens);
  }
  int64_t group_windows(int64_t group) const { return smaller(each, windows - group * each); }
};

// The parameters as float32, zeros behind their last element.
struct MixParameters {
  float* weight;       // [tokens][weight_room]
  float* added;        // [tokens]: the bias, and 1 with a gate
  float* norm_weight;  // [wide], as norm_bias
  float* norm_bias;

  static int64_t bytes(const MixSizes& z) {
    return Scratch::bytes_of<float>(z.tokens * z.weight_room) + Scratch::bytes_of<float>(z.weight_room) +
           2 * Scratch::bytes_of<float>(z.wide);
  }
  template <class T>
  static void copy(float* to, const T* from, int64_t n) {
    for (int64_t c = 0; c < n; c += kLanes) store(to + c, from == nullptr ? Vec{} : load_first(from + c, n - c));
  }
  MixParameters(const MixSizes& z, const WindowMixProblem& p, Scratch& memory)
      : weight(memory.next<float>(z.tokens * z.weight_room)),
        added(memory.next<float>(z.weight_room)),
        norm_weight(memory.next<float>(z.wide)),
        norm_bias(memory.next<float>(z.wide)) {
    with_element(p.dtype, [&]<class T>(T*) {
      for (int64_t i = 0; i < z.tokens; ++i) {
        copy(weight + i * z.weight_room, static_cast<const T*>(p.weight) + i * z.tokens, z.tokens);
      }
      copy(added, static_cast<const T*>(p.bias), z.tokens);
    });
    if (p.gate != nullptr) {
      for (int64_t i = 0; i < z.tokens; ++i) added[i] += 1.f;
    }
    with_element(p.float_norm ? DType::kFloat32 : p.dtype, [&]<class T>(T*) {
      copy(norm_weight, static_cast<const T*>(p.norm_weight), z.channels);
      copy(norm_bias, static_cast<const T*>(p.norm_bias), z.channels);
    });
  }
};

// The tokens of a group's windows in scratch: row `place` of a window's columns.
struct MixTokens {
  const MixSizes& z;
  int64_t* const numbers;  // in the grid, of each window and place
  int64_t count = 0;

  static int64_t bytes(const MixSizes& z) { return Scratch::bytes_of<int64_t>(z.each * z.tokens); }
  MixTokens(const MixSizes& z, Scratch& memory) : z(z), numbers(memory.next<int64_t>(z.each * z.tokens)) {}

  void find(const WindowMixProblem& p, int64_t group) {
    const int64_t down = p.height / p.window[0], across = p.width / p.window[1];
    count = 0;
    for (int64_t k = 0; k < z.group_windows(group); ++k) {
      const int64_t window = group * z.each + k, image = window / (down * across), within = window % (down * across);
      const int64_t first =
          image * p.image_tokens + within / across * p.window_step[0] + within % across * p.window_step[1];
      for (int64_t a = 0; a < p.window[0]; ++a) {
        for (int64_t b = 0; b < p.window[1]; ++b) numbers[count++] = first + a * p.place_step[0] + b * p.place_step[1];
      }
    }
  }

  // Calls work(at, place, token, later) for every token: where its columns begin in scratch, its place in its window,
  // its number, and that of a token whose rows should be fetched now.
  template <class Work>
  WARPFORM_INLINE void each(const Work& work) const {
    constexpr int64_t kAhead = 6;
    for (int64_t k = 0, i = 0; i < count; ++k) {
      for (int64_t place = 0; place < z.tokens; ++place, ++i) {
        work(place * z.room + k * z.wide, place, numbers[i], numbers[smaller(i + kAhead, count - 1)]);
      }
    }
  }
};

// Fetches a row of n elements that will be read, or written.
template <bool kWritten, class T>
WARPFORM_INLINE void fetch(const T* row, int64_t n) {
  for (int64_t c = 0; c < n; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c, kWritten);
}

// ---- forward ----

// line [wide] = a token's row of x, normalised where there is a norm, whose mean and 1/std are kept.
template <class T>
WARPFORM_INLINE void normal_row(const MixSizes& z, const WindowMixProblem& p, const MixParameters& own, int64_t token,
                                float* line) {
  const T* const x = static_cast<const T*>(p.x) + token * p.x_stride;
  if (p.norm_weight == nullptr) {
    each_vector(0, z.channels, [&](int64_t c, auto lanes) { store(line + c, lanes.read(x + c)); });
    return;
  }
  float total[1];
  sum_columns<4>(total, z.channels, [&](int64_t c, auto lanes, Vec(&part)[1]) __attribute__((always_inline)) {
    const Vec v = lanes.read(x + c);
    store(line + c, v);
    part[0] += v;
  });
  const RowMoments moments = row_moments(line, total[0], z.channels, p.eps);
  p.mean[token] = moments.mean();
  p.rstd[token] = moments.rstd;
  for (int64_t c = 0; c < z.wide; c += kLanes) {
    store(line + c, moments.normal(load(line + c)) * load(own.norm_weight + c) + load(own.norm_bias + c));
  }
}

template <class T>
void forward(const WindowMixParams& params, const Host& host) {
  const WindowMixProblem& p = params.problem;
  const MixSizes z(p);
  if (z.windows == 0) return;
  Scratch shared(host, MixParameters::bytes(z));
  const MixParameters own(z, p, shared);
  over(host, z.groups, [&](Items& items) {
    Scratch memory(host, 2 * Scratch::bytes_of<float>(z.tokens * z.room) + MixTokens::bytes(z));
    float* const normal = memory.next<float>(z.tokens * z.room);
    float* const mixed = memory.next<float>(z.tokens * z.room);
    MixTokens tokens(z, memory);
    const T* const x = static_cast<const T*>(p.x);
    const T* const gate = static_cast<const T*>(p.gate);
    T* const out = static_cast<T*>(params.out);
    for (int64_t group; items.next(group);) {
      tokens.find(p, group);
      tokens.each([&](int64_t at, int64_t, int64_t token, int64_t later) __attribute__((always_inline)) {
        fetch<false>(x + later * p.x_stride, z.channels);
        normal_row<T>(z, p, own, token, normal + at);
      });
      times_rows(z.tokens, z.group_windows(group) * z.wide, z.tokens, mixed, z.room, own.weight, z.weight_room, 1,
                 normal, z.room);
      tokens.each([&](int64_t at, int64_t place, int64_t token, int64_t later) __attribute__((always_inline)) {
        fetch<true>(out + later * z.channels, z.channels);
        T* const to = out + token * z.channels;
        const float* const y = mixed + at;
        const float added = own.added[place];
        if (p.gate == nullptr) {
          each_vector(0, z.channels, [&](int64_t c, auto lanes) { lanes.write(to + c, load(y + c) + added); });
          return;
        }
        fetch<false>(gate + later * p.gate_stride, z.channels);
        const T* const factor = gate + token * p.gate_stride;
        each_vector(0, z.channels, [&](int64_t c, auto lanes) {
          lanes.write(to + c, (load(y + c) + added) * lanes.read(factor + c));
        });
      });
    }
  });
}

// ---- backward ----

// The sums of a share of the windows.
struct MixSums {
  const MixSizes& z;
  float* data;

  // The gradient of the matrix [tokens][weight_room], lanes of that of the bias [tokens][kLanes], those of the norm's
  // weight and of its bias [2][wide].
  static int64_t size(const MixSizes& z) {
    return z.tokens * z.weight_room + round_up(z.tokens * kLanes + 2 * z.wide, 16);
  }
  float* weight() const { return data; }
  float* bias() const { return data + z.tokens * z.weight_room; }
  float* norm() const { return bias() + z.tokens * kLanes; }
};

// Scratch of one thread: rows of a group.
struct MixBuffers {
  float* normal;   // what the matrix is multiplied with
  float* d;        // the gradient of the product
  float* product;  // y, and then the gradient of the normal rows
  float* columns;  // the normal rows as panels of columns
  float* norm;     // sums over a group's tokens: of the norm's weight and of its bias

  static int64_t bytes(const MixSizes& z) {
    return 3 * Scratch::bytes_of<float>(z.tokens * z.room) +
           Scratch::bytes_of<float>(packed_columns(z.tokens, z.each * z.wide)) + Scratch::bytes_of<float>(2 * z.wide);
  }
  MixBuffers(const MixSizes& z, Scratch& memory)
      : normal(memory.next<float>(z.tokens * z.room)),
        d(memory.next<float>(z.tokens * z.room)),
        product(memory.next<float>(z.tokens * z.room)),
        columns(memory.next<float>(packed_columns(z.tokens, z.each * z.wide))),
        norm(memory.next<float>(2 * z.wide)) {}
};

// The normal row of a token and the gradient of what the product made of its window at its place.
template <class T>
WARPFORM_INLINE void backward_row(const WindowMixBackwardParams& params, const MixSizes& z, const MixParameters& own,
                                  int64_t token, float* normal, float* d, float* bias_sums) {
  const WindowMixProblem& p = params.problem;
  const T* const x = static_cast<const T*>(p.x) + token * p.x_stride;
  const T* const dout = static_cast<const T*>(params.dout) + token * z.channels;
  if (p.norm_weight == nullptr) {
    each_vector(0, z.channels, [&](int64_t c, auto lanes) { store(normal + c, lanes.read(x + c)); });
  } else {
    const float mean = p.mean[token], rstd = p.rstd[token];
    each_vector(0, z.channels, [&](int64_t c, auto lanes) {
      store(normal + c, (lanes.read(x + c) - mean) * rstd * load(own.norm_weight + c) + load(own.norm_bias + c));
    });
  }
  Vec sum = load(bias_sums);
  if (p.gate == nullptr) {
    each_vector(0, z.channels, [&](int64_t c, auto lanes) {
      const Vec v = lanes.read(dout + c);
      store(d + c, v);
      sum += v;
    });
  } else {
    const T* const gate = static_cast<const T*>(p.gate) + token * p.gate_stride;
    each_vector(0, z.channels, [&](int64_t c, auto lanes) {
      const Vec v = lanes.read(dout + c) * lanes.read(gate + c);
      store(d + c, v);
      sum += v;
    });
  }
  store(bias_sums, sum);
}

// LayerNorm's backward for one token, from the gradient of its normal row: with xhat = (x - mean) * rstd, g = that
// gradient * weight, and <.> the mean over channels, dx = rstd * (g - <g> - xhat * <g * xhat>).
template <class T>
WARPFORM_INLINE void norm_row(const WindowMixProblem& p, const MixSizes& z, const MixParameters& own, int64_t token,
                              const float* dnormal, T* dx, float* weight_sums, float* bias_sums) {
  const T* const x = static_cast<const T*>(p.x) + token * p.x_stride;
  const float mean = p.mean[token], rstd = p.rstd[token];
  float totals[2];
  sum_columns<2>(totals, z.channels, [&](int64_t c, auto lanes, Vec(&part)[2]) __attribute__((always_inline)) {
    const Vec g = lanes.or_zero(load(dnormal + c) * load(own.norm_weight + c));
    part[0] += g;
    part[1] += lanes.or_zero(g * (lanes.read(x + c) - mean));
  });
  const auto count = static_cast<float>(z.channels);
  const float mean_g = totals[0] / count, mean_gx = totals[1] * rstd / count;
  each_vector(0, z.channels, [&](int64_t c, auto lanes) {
    const Vec dn = load(dnormal + c), xhat = (lanes.read(x + c) - mean) * rstd;
    lanes.write(dx + c, (dn * load(own.norm_weight + c) - mean_g - xhat * mean_gx) * rstd);
    store(weight_sums + c, load(weight_sums + c) + dn * xhat);
    store(bias_sums + c, load(bias_sums + c) + dn);
  });
}

template <class T>
void backward_group(const WindowMixBackwardParams& params, const MixSizes& z, const MixParameters& own,
                    const MixTokens& tokens, bool first, const MixSums& sums, const MixBuffers& b) {
  const WindowMixProblem& p = params.problem;
  const auto* const x = static_cast<const T*>(p.x);
  const auto* const gate = static_cast<const T*>(p.gate);
  const auto* const dout = static_cast<const T*>(params.dout);
  auto* const dx = static_cast<T*>(params.dx);
  auto* const dgate = static_cast<T*>(params.dgate);
  const int64_t columns = tokens.count / z.tokens * z.wide;
  tokens.each([&](int64_t at, int64_t place, int64_t token, int64_t later) __attribute__((always_inline)) {
    fetch<false>(x + later * p.x_stride, z.channels);
    fetch<false>(dout + later * z.channels, z.channels);
    if (gate != nullptr) fetch<false>(gate + later * p.gate_stride, z.channels);
    backward_row<T>(params, z, own, token, b.normal + at, b.d + at, sums.bias() + place * kLanes);
  });
  if (gate != nullptr) {
    times_rows(z.tokens, columns, z.tokens, b.product, z.room, own.weight, z.weight_room, 1, b.normal, z.room);
    tokens.each([&](int64_t at, int64_t place, int64_t token, int64_t later) __attribute__((always_inline)) {
      fetch<true>(dgate + later * z.channels, z.channels);
      fetch<false>(dout + later * z.channels, z.channels);
      const T* const from = dout + token * z.channels;
      T* const to = dgate + token * z.channels;
      const float* const y = b.product + at;
      const float added = own.added[place];
      each_vector(0, z.channels,
                  [&](int64_t c, auto lanes) { lanes.write(to + c, (load(y + c) + added) * lanes.read(from + c)); });
    });
  }
  pack_columns<float>(b.columns, z.tokens, columns, [&](int64_t i) { return b.normal + i * z.room; });
  if (first) {
    times_columns(z.tokens, z.tokens, columns, sums.weight(), z.weight_room, b.d, z.room, 1, b.columns);
  } else {
    times_columns<Into::kAdd>(z.tokens, z.tokens, columns, sums.weight(), z.weight_room, b.d, z.room, 1, b.columns);
  }
  times_rows(z.tokens, columns, z.tokens, b.product, z.room, own.weight, 1, z.weight_room, b.d, z.room);
  std::memset(b.norm, 0, static_cast<size_t>(2 * z.wide) * sizeof(float));
  tokens.each([&](int64_t at, int64_t, int64_t token, int64_t later) __attribute__((always_inline)) {
    fetch<true>(dx + later * z.channels, z.channels);
    const float* const dnormal = b.product + at;
    T* const to = dx + token * z.channels;
    if (p.norm_weight == nullptr) {
      each_vector(0, z.channels, [&](int64_t c, auto lanes) { lanes.write(to + c, load(dnormal + c)); });
    } else {
      fetch<false>(x + later * p.x_stride, z.channels);
      norm_row(p, z, own, token, dnormal, to, b.norm, b.norm + z.wide);
    }
  });
  for (int64_t c = 0; c < 2 * z.wide; c += kLanes) store(sums.norm() + c, load(sums.norm() + c) + load(b.norm + c));
}

// The gradients of the parameters, from the shares' sums.
template <class T>
void add_sums(const WindowMixBackwardParams& params, const Host& host, const MixSizes& z, float* all, int64_t shares) {
  const WindowMixProblem& p = params.problem;
  const MixSums first{z, all};
  const int64_t size = MixSums::size(z);
  const auto add_row = [&](int64_t i) {
    add_shares(static_cast<T*>(params.dweight) + i * z.tokens, p.dtype, first.weight() + i * z.weight_room, shares,
               size, z.tokens);
  };
  if (shares * z.tokens * z.tokens <= kAddedAlone) {
    for (int64_t i = 0; i < z.tokens; ++i) add_row(i);
  } else {
    constexpr int64_t kRows = 16;
    over(host, ceil_div(z.tokens, kRows), [&](Items& items) {
      for (int64_t item; items.next(item);) {
        for (int64_t i = item * kRows; i < smaller(z.tokens, (item + 1) * kRows); ++i) add_row(i);
      }
    });
  }
  if (params.dbias != nullptr) {
    for (int64_t i = 0; i < z.tokens; ++i) {
      Vec sum{};
      for (int64_t share = 0; share < shares; ++share) sum += load(first.bias() + share * size + i * kLanes);
      static_cast<T*>(params.dbias)[i] = from_float<T>(sum_of_lanes(sum));
    }
  }
  const DType type = p.float_norm ? DType::kFloat32 : p.dtype;
  if (params.dnorm_weight != nullptr) {
    add_shares(params.dnorm_weight, type, first.norm(), shares, size, z.channels);
  }
  if (params.dnorm_bias != nullptr) {
    add_shares(params.dnorm_bias, type, first.norm() + z.wide, shares, size, z.channels);
  }
}

template <class T>
void backward(const WindowMixBackwardParams& params, const Host& host) {
  const WindowMixProblem& p = params.problem;
  const MixSizes z(p);
  const int64_t size = MixSums::size(z);
  const int64_t wanted = larger(1, smaller(kMostMixShares, kShareRoom / size)), each = ceil_div(z.groups, wanted);
  const int64_t shares = z.groups == 0 ? 0 : ceil_div(z.groups, each);
  Scratch shared(host, MixParameters::bytes(z) + Scratch::bytes_of<float>(shares * size));
  const MixParameters own(z, p, shared);
  float* const all = shared.next<float>(shares * size);
  over(host, shares, [&](Items& items) {
    Scratch memory(host, MixBuffers::bytes(z) + MixTokens::bytes(z));
    const MixBuffers buffers(z, memory);
    MixTokens tokens(z, memory);
    for (int64_t share; items.next(share);) {
      const MixSums sums{z, all + share * size};
      // The first group sets the matrix.
      const int64_t matrix = z.tokens * z.weight_room;
      std::memset(sums.data + matrix, 0, static_cast<size_t>(size - matrix) * sizeof(float));
      for (int64_t group = share * each; group < smaller(z.groups, (share + 1) * each); ++group) {
        tokens.find(p, group);
        backward_group<T>(params, z, own, tokens, group == share * each, sums, buffers);
      }
    }
  });
  add_sums<T>(params, host, z, all, shares);
}

}  // namespace

void window_mix(const WindowMixParams& params, const Host& host) {
  with_element(params.problem.dtype, [&]<class T>(T*) { forward<T>(params, host); });
}

void window_mix_backward(const WindowMixBackwardParams& params, const Host& host) {
  with_element(params.problem.dtype, [&]<class T>(T*) { backward<T>(params, host); });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
