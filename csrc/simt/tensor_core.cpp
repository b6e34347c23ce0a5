#include "simt/tensor_core.h"

#include <cuda_fp16.h>

#include <bit>
#include <cstring>

#include "simt/shared_memory.h"

#if defined(__x86_64__) && !defined(WARPFORM_SIMT_PORTABLE)
#define WARPFORM_SIMT_X86 1
#include <immintrin.h>
#endif

namespace warpform::simt {
namespace {

struct LdmatrixOperands {
  uint32_t* r;
  uint32_t row;
};

// One product of a warp as plain matrices: a is [16][k], b is [8][k] (the columns of B), d is [16][8].
struct Product {
  int k;
  alignas(64) float a[16][16];
  alignas(64) float b[8][16];
  alignas(64) float d[16][8];
};

// Lane l's register r of A covers row l / 4 + 8 (r % 2), column pair l % 4 of column half r / 2; in the same way its
// registers of B; so the registers of 32 lanes side by side are an 8 x 8 matrix of 16-bit values, row by row.
struct Half {
  static void widen(const uint16_t* in, float* out) {
    for (int i = 0; i < 8; ++i) out[i] = __half2float(std::bit_cast<__half>(in[i]));
  }
};
struct Bfloat16 {
  static void widen(const uint16_t* in, float* out) {
    for (int i = 0; i < 8; ++i) out[i] = std::bit_cast<float>(uint32_t{in[i]} << 16);
  }
};

template <class T>
inline void gather16(void* const* operands, Product& p) {
  p.k = 16;
  alignas(64) uint32_t tile[6][kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const auto& o = *static_cast<const MmaOperands*>(operands[l]);
    for (int r = 0; r < 4; ++r) tile[r][l] = o.a[r];
    tile[4][l] = o.b[0];
    tile[5][l] = o.b[1];
    std::memcpy(&p.d[l / 4][l % 4 * 2], o.d, 8);
    std::memcpy(&p.d[l / 4 + 8][l % 4 * 2], o.d + 2, 8);
  }
  const auto row = [&](int r, int i) { return reinterpret_cast<const uint16_t*>(tile[r]) + i * 8; };
  for (int i = 0; i < 8; ++i) {
    for (int r = 0; r < 4; ++r) T::widen(row(r, i), &p.a[i + 8 * (r % 2)][8 * (r / 2)]);
    T::widen(row(4, i), &p.b[i][0]);
    T::widen(row(5, i), &p.b[i][8]);
  }
}

// The hardware leaves the low 13 bits of the mantissa unread.
inline float tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

inline void gather_tf32(void* const* operands, Product& p) {
  p.k = 8;
  for (int l = 0; l < kLanes; ++l) {
    const auto& o = *static_cast<const MmaOperands*>(operands[l]);
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r) p.a[g + 8 * (r % 2)][t + 4 * (r / 2)] = tf32(o.a[r]);
    for (int r = 0; r < 2; ++r) p.b[g][t + 4 * r] = tf32(o.b[r]);
    std::memcpy(&p.d[g][t * 2], o.d, 8);
    std::memcpy(&p.d[g + 8][t * 2], o.d + 2, 8);
  }
}

inline void scatter(void* const* operands, const Product& p) {
  for (int l = 0; l < kLanes; ++l) {
    const auto& o = *static_cast<const MmaOperands*>(operands[l]);
    std::memcpy(o.d, &p.d[l / 4][l % 4 * 2], 8);
    std::memcpy(o.d + 2, &p.d[l / 4 + 8][l % 4 * 2], 8);
  }
}

inline void multiply(Product& p) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < p.k; ++k) sum += p.a[m][k] * p.b[n][k];
      p.d[m][n] += sum;
    }
  }
}

void mma_plain(Meeting kind, void* const* operands) {
  Product p;
  if (kind == Meeting::kMmaTf32) {
    gather_tf32(operands, p);
  } else if (kind == Meeting::kMmaBfloat16) {
    gather16<Bfloat16>(operands, p);
  } else {
    gather16<Half>(operands, p);
  }
  multiply(p);
  scatter(operands, p);
}

#if defined(WARPFORM_SIMT_X86)

#define WARPFORM_AVX2 __attribute__((target("avx2,fma,f16c")))

WARPFORM_AVX2 void transpose8(const float* in, int stride, __m256* out) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * stride);
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
}

// Eight 16-bit values as float32.
WARPFORM_AVX2 inline __m256 widen8(__m128i v, bool half) {
  if (half) return _mm256_cvtph_ps(v);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

// The product of 16-bit operands, four lanes (a row of each tile) at a time.
WARPFORM_AVX2 void mma_fast(void* const* operands, bool half) {
  alignas(32) float a[16][16], bt[8][16];
  __m256 d[16];
  for (int g = 0; g < 8; ++g) {
    const MmaOperands* o[4];
    for (int t = 0; t < 4; ++t) o[t] = static_cast<const MmaOperands*>(operands[4 * g + t]);
    const auto registers = [&](int t) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(o[t]->a)); };
    const __m128i r0 = registers(0), r1 = registers(1), r2 = registers(2), r3 = registers(3);
    const __m128i lo01 = _mm_unpacklo_epi32(r0, r1), lo23 = _mm_unpacklo_epi32(r2, r3);
    const __m128i hi01 = _mm_unpackhi_epi32(r0, r1), hi23 = _mm_unpackhi_epi32(r2, r3);
    _mm256_store_ps(&a[g][0], widen8(_mm_unpacklo_epi64(lo01, lo23), half));
    _mm256_store_ps(&a[g + 8][0], widen8(_mm_unpackhi_epi64(lo01, lo23), half));
    _mm256_store_ps(&a[g][8], widen8(_mm_unpacklo_epi64(hi01, hi23), half));
    _mm256_store_ps(&a[g + 8][8], widen8(_mm_unpackhi_epi64(hi01, hi23), half));
    const auto pair = [&](int t) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(o[t]->b)); };
    const __m128i b01 = _mm_unpacklo_epi32(pair(0), pair(1)), b23 = _mm_unpacklo_epi32(pair(2), pair(3));
    _mm256_store_ps(&bt[g][0], widen8(_mm_unpacklo_epi64(b01, b23), half));
    _mm256_store_ps(&bt[g][8], widen8(_mm_unpackhi_epi64(b01, b23), half));
    const __m128 d0 = _mm_loadu_ps(o[0]->d), d1 = _mm_loadu_ps(o[1]->d);
    const __m128 d2 = _mm_loadu_ps(o[2]->d), d3 = _mm_loadu_ps(o[3]->d);
    d[g] = _mm256_set_m128(_mm_movelh_ps(d2, d3), _mm_movelh_ps(d0, d1));
    d[g + 8] = _mm256_set_m128(_mm_movehl_ps(d3, d2), _mm_movehl_ps(d1, d0));
  }
  for (int k0 = 0; k0 < 16; k0 += 8) {
    __m256 b[8];
    transpose8(&bt[0][k0], 16, b);
    for (int m = 0; m < 16; ++m) {
      __m256 even = d[m], odd = _mm256_setzero_ps();
      for (int k = 0; k < 8; k += 2) {
        even = _mm256_fmadd_ps(_mm256_broadcast_ss(&a[m][k0 + k]), b[k], even);
        odd = _mm256_fmadd_ps(_mm256_broadcast_ss(&a[m][k0 + k + 1]), b[k + 1], odd);
      }
      d[m] = _mm256_add_ps(even, odd);
    }
  }
  for (int g = 0; g < 8; ++g) {
    for (int t = 0; t < 4; ++t) {
      const __m128 low = t < 2 ? _mm256_castps256_ps128(d[g]) : _mm256_extractf128_ps(d[g], 1);
      const __m128 high = t < 2 ? _mm256_castps256_ps128(d[g + 8]) : _mm256_extractf128_ps(d[g + 8], 1);
      float* out = static_cast<const MmaOperands*>(operands[4 * g + t])->d;
      _mm_storeu_ps(out, t % 2 == 0 ? _mm_movelh_ps(low, high) : _mm_movehl_ps(high, low));
    }
  }
}

WARPFORM_AVX2 void multiply_transposed_fast(const float* a, int rows, const float* b, int cols, int depth, float* d) {
  for (int m = 0; m < rows; m += 4) {
    for (int n = 0; n < cols; n += 16) {
      __m256 sum[4][2];
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 2; ++j) sum[i][j] = _mm256_loadu_ps(d + (m + i) * cols + n + 8 * j);
      }
      for (int k = 0; k < depth; ++k) {
        const __m256 left = _mm256_loadu_ps(b + k * cols + n), right = _mm256_loadu_ps(b + k * cols + n + 8);
        for (int i = 0; i < 4; ++i) {
          const __m256 factor = _mm256_broadcast_ss(a + k * rows + m + i);
          sum[i][0] = _mm256_fmadd_ps(factor, left, sum[i][0]);
          sum[i][1] = _mm256_fmadd_ps(factor, right, sum[i][1]);
        }
      }
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 2; ++j) _mm256_storeu_ps(d + (m + i) * cols + n + 8 * j, sum[i][j]);
      }
    }
  }
}

bool fast() {
  static const bool yes =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return yes;
}

#else

void mma_fast(void* const*, bool) {}
void multiply_transposed_fast(const float*, int, const float*, int, int, float*) {}
bool fast() { return false; }

#endif

}  // namespace

void ldmatrix(uint32_t* r, uint32_t row, bool transposed, const Where& where) {
  Warp& warp = this_warp();
  LdmatrixOperands mine{r, row};
  warp.operands[this_lane()] = &mine;
  if (!meet(transposed ? Meeting::kLdmatrixTrans : Meeting::kLdmatrix, where)) return;
  for (int tile = 0; tile < 4; ++tile) {
    alignas(16) uint16_t m[8][8];
    for (int i = 0; i < 8; ++i) {
      const int lane = tile * 8 + i;
      std::memcpy(m[i], shared_row(static_cast<LdmatrixOperands*>(warp.operands[lane])->row, lane, where), 16);
    }
    for (int l = 0; l < kLanes; ++l) {
      uint32_t& out = static_cast<LdmatrixOperands*>(warp.operands[l])->r[tile];
      if (transposed) {
        out = uint32_t{m[l % 4 * 2][l / 4]} | uint32_t{m[l % 4 * 2 + 1][l / 4]} << 16;
      } else {
        std::memcpy(&out, &m[l / 4][l % 4 * 2], 4);
      }
    }
  }
  end_meeting(warp);
}

void mma(Meeting kind, const MmaOperands& operands, const Where& where) {
  Warp& warp = this_warp();
  warp.operands[this_lane()] = const_cast<MmaOperands*>(&operands);
  if (!meet(kind, where)) return;
  if (kind != Meeting::kMmaTf32 && fast()) {
    mma_fast(warp.operands, kind == Meeting::kMmaHalf);
  } else {
    mma_plain(kind, warp.operands);
  }
  end_meeting(warp);
}

void multiply_transposed(const float* a, int rows, const float* b, int cols, int depth, float* d) {
  if (fast()) return multiply_transposed_fast(a, rows, b, cols, depth, d);
  for (int m = 0; m < rows; ++m) {
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < cols; ++n) d[m * cols + n] += a[k * rows + m] * b[k * cols + n];
    }
  }
}

}  // namespace warpform::simt
