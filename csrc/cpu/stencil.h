// Stencils over [batch, height, width, channels] on a CPU: how the work is cut into items, and rows of an image as
// float32.
//
// An item is some rows of one image by a block of channels. It goes down its rows and keeps the k that a window needs
// as float32, one after another, so that strides between pixels and 16-bit numbers are met once (Ring). What is
// computed from them is a row of float32 again, [width][wide], and another pass over it, which stays in L1, reads and
// writes tensors. Along a row a vector of channels goes from pixel to pixel.
#pragma once

#include "families.h"
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

// ---- sizes of windows ----

template <class F>
WARPFORM_INLINE void with_size(int size, const F& f) {
  switch (size) {
    case 3: f.template operator()<3>(); break;
    case 5: f.template operator()<5>(); break;
    case 7: f.template operator()<7>(); break;
  }
}

}  // namespace
}  // namespace warpform::cpu::WARPFORM_CPU_ISA
