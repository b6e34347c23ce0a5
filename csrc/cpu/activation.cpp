// bias_gelu and its backward.
//
// Floor: bytes. Forward reads x and writes out, 8 bytes an element of float32; backward reads dout and x and writes dx,
// 12 bytes. One exponential and one division serve value and slope: from L2 and L3 the arithmetic is the larger part.
#include "families.h"
#include "gelu.h"
#include "simd.h"
#include "threads.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Sums over rows are made of partial sums of so many rows, added in order: the same bits whatever the threads are.
constexpr int64_t kShareRows = 64;
// Elements of an item of the forward.
constexpr int64_t kItemElements = 32768;

// The bias as float32, or null.
const float* bias_of(const void* bias, DType type, int64_t cols, float* room) {
  if (bias == nullptr) return nullptr;
  if (type == DType::kFloat32) return static_cast<const float*>(bias);
  with_element(type, [&](auto* element) {
    const auto* from = static_cast<decltype(element)>(const_cast<void*>(bias));
    for (int64_t c = 0; c < cols; c += kLanes) store(room + c, load_first(from + c, cols - c));
  });
  return room;
}

template <class T, bool kTanh>
void forward(const BiasGeluParams& p, const Host& host) {
  const auto* const x = static_cast<const T*>(p.x);
  auto* const out = static_cast<T*>(p.out);
  const DType bias_type = p.float_parameters ? DType::kFloat32 : p.dtype;
  Scratch memory(host, Scratch::bytes_of<float>(p.cols + kLanes));
  const float* const bias = bias_of(p.bias, bias_type, p.cols, memory.next<float>(p.cols + kLanes));
  // Without a bias all is one row.
  const int64_t rows = bias ? p.rows : 1, cols = bias ? p.cols : p.rows * p.cols;
  const int64_t rows_each = bias ? larger(1, kItemElements / cols) : 1;
  const int64_t cols_each = bias ? cols : kItemElements;
  const int64_t parts = ceil_div(cols, cols_each);
  over(host, ceil_div(rows, rows_each) * parts, [&](Items& items) {
    for (int64_t item; items.next(item);) {
      const int64_t first = item % parts * cols_each, last = smaller(cols, first + cols_each);
      const int64_t row0 = item / parts * rows_each;
      for (int64_t r = row0; r < smaller(rows, row0 + rows_each); ++r) {
        const T* const from = x + r * cols;
        T* const to = out + r * cols;
        int64_t c = first;
        for (; c + kLanes <= last; c += kLanes) {
          const Vec v = load(from + c);
          store(to + c, gelu<kTanh>(bias ? v + load(bias + c) : v));
        }
        if (c < last) {
          const Vec v = load_first(from + c, last - c);
          store_first(to + c, gelu<kTanh>(bias ? v + load_first(bias + c, last - c) : v), last - c);
        }
      }
    }
  });
}

template <class T, bool kTanh>
void backward(const BiasGeluBackwardParams& p, const Host& host) {
  const auto* const x = static_cast<const T*>(p.x);
  const auto* const dout = static_cast<const T*>(p.dout);
  auto* const dx = static_cast<T*>(p.dx);
  const DType bias_type = p.float_parameters ? DType::kFloat32 : p.dtype;
  const int64_t shares = ceil_div(p.rows, kShareRows), wide = round_up(p.cols, kLanes);
  const bool has_bias = p.bias != nullptr;
  Scratch memory(host, Scratch::bytes_of<float>(wide) + (has_bias ? Scratch::bytes_of<float>(shares * wide) : 0));
  const float* const bias = bias_of(p.bias, bias_type, p.cols, memory.next<float>(wide));
  float* const sums = has_bias ? memory.next<float>(shares * wide) : nullptr;
  over(host, shares, [&](Items& items) {
    for (int64_t share; items.next(share);) {
      float* const sum = sums + share * wide;
      if (has_bias) std::memset(sum, 0, static_cast<size_t>(wide) * sizeof(float));
      for (int64_t r = share * kShareRows; r < smaller(p.rows, (share + 1) * kShareRows); ++r) {
        const T *const from = x + r * p.cols, *const d = dout + r * p.cols;
        T* const to = dx + r * p.cols;
        const auto at = [&](int64_t c, auto read, auto write) {
          const Vec v = read(from + c);
          const Vec gradient = read(d + c) * gelu_slope<kTanh>(bias ? v + read(bias + c) : v);
          write(to + c, gradient);
          // A lane past the last column has dout 0.
          if (has_bias) store(sum + c, load(sum + c) + gradient);
        };
        int64_t c = 0;
        for (; c + kLanes <= p.cols; c += kLanes) {
          at(c, [](auto* q) { return load(q); }, [](T* q, Vec v) { store(q, v); });
        }
        if (const int64_t n = p.cols - c; n > 0) {
          at(c, [n](auto* q) { return load_first(q, n); }, [n](T* q, Vec v) { store_first(q, v, n); });
        }
      }
    }
  });
  if (!has_bias) return;
  with_element(bias_type, [&](auto* element) {
    auto* const to = static_cast<decltype(element)>(p.dbias);
    for (int64_t c = 0; c < p.cols; c += kLanes) {
      Vec sum{};
      for (int64_t share = 0; share < shares; ++share) sum += load(sums + share * wide + c);
      store_first(to + c, sum, p.cols - c);
    }
  });
}

}  // namespace

void bias_gelu(const BiasGeluParams& params, const Host& host) {
  if (params.rows * params.cols == 0) return;
  with_element(params.dtype,
               [&]<class T>(T*) { params.tanh ? forward<T, true>(params, host) : forward<T, false>(params, host); });
}

void bias_gelu_backward(const BiasGeluBackwardParams& params, const Host& host) {
  with_element(params.dtype,
               [&]<class T>(T*) { params.tanh ? backward<T, true>(params, host) : backward<T, false>(params, host); });
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
