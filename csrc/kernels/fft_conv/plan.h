// The factors of a long convolution: rows of L values are padded to `points`, the power of two, and convolved on
// n = 2 points. Index j = j1 inner + j2 of a row, j2 = radix a + b; bin k = k1 + digits (k2 + radix k3):
//
//   Z[k] = sum_b w(radix)^(b k3) w(inner)^(b k2) sum_a w(radix)^(a k2) w(n)^(j2 k1) sum_j1 w(digits)^(j1 k1) z[j]
//
// with w(m) = exp(-2 pi i / m). Padding halves the values of j1 and not those of k1: the zeros are never multiplied.
// Included by the host and by device code; tests/helpers/staged_fft.py has the same factors.
#pragma once

namespace warpform {

struct FftPlan {
  int points;    // 256 to 32768
  int radix;     // of the two inner transforms: 16 or 32
  int tiles;     // of 16 in a radix
  int inner;     // radix^2, transformed by one warp in registers
  int outer;     // points / inner: values of j1
  int digits;    // 2 outer: values of k1
  int passes;    // digits are worked on in turns where shared memory cannot hold the rows of all
  int branches;  // digits in a pass: k1 = passes * branch + pass
  int rows;      // of shared memory for a pair of sequences: 2 branches, of `inner` 16-bit values each
  int warps;     // of a CTA
  int slots;     // pairs of sequences that a CTA works on at a time

  // Tiles of 16 x 16 of the outer transforms' real matrices: [2 branches, 2 outer] and [2 outer, 2 branches].
  int forward_m, forward_k;
  int inverse_m, inverse_k;
  // Strips of 16 columns that a warp transforms at a time and, for each digit, the twiddle factor it begins with.
  int forward_strips, inverse_strips, groups;

  // Byte offsets of the tables. Matrices lie as operands of mma, 16 bytes a lane; complex numbers are float32 pairs.
  int forward_matrix;   // [passes, forward_m, forward_k, 32, 4]
  int inverse_matrix;   // [passes, inverse_m, inverse_k, 32, 4]
  int square;           // [2 (cos, sin), tiles, 32, 4]: the first row of tiles
  int inner_twiddles;   // [tiles, tiles, 2, 2, 32, 2]: w(inner)^(row col) / radix, as accumulators lie
  int column_twiddles;  // [4, digits]: w(n)^(2 t k1)
  int begin_twiddles;   // [groups, warps, digits]: w(n)^(column k1), the first column of a warp in a group
  int row_twiddles;     // [8, digits]: w(n)^(radix g k1)
  int step_twiddles;    // [4, digits]: w(n)^(s k1), s = 1, 8, 16 warps, 8 radix
  int table_bytes;

  constexpr int threads() const { return 32 * warps; }
  constexpr int strips() const { return inner / 16 / warps; }  // of a warp
  constexpr int slot_bytes() const { return rows * inner * 2; }
  constexpr int fragments() const { return inner / 128; }  // of 4 bins a lane, in one digit's bins
};

constexpr FftPlan fft_plan(int points) {
  constexpr auto most = [](int a, int b) { return a > b ? a : b; };
  constexpr auto least = [](int a, int b) { return a < b ? a : b; };
  FftPlan p{};
  p.points = points;
  p.radix = points <= 4096 ? 16 : 32;
  p.tiles = p.radix / 16;
  p.inner = p.radix * p.radix;
  p.outer = points / p.inner;
  p.digits = 2 * p.outer;
  p.passes = points > 16384 ? 2 : 1;
  p.branches = p.digits / p.passes;
  p.rows = 2 * p.branches;
  p.warps = least(points > 8192 ? 16 : 8, p.branches);
  p.slots = points <= 512 ? 4 : points == 1024 ? 2 : 1;
  p.forward_m = most(1, p.branches / 8);
  p.forward_k = most(1, p.outer / 8);
  p.inverse_m = most(1, p.outer / 8);
  p.inverse_k = most(1, p.branches / 8);
  // 32 registers of operands a lane.
  p.forward_strips = least(p.strips(), 8 / p.forward_k);
  p.inverse_strips = least(p.strips(), 8 / p.inverse_k);
  p.groups = p.strips() / p.forward_strips;

  constexpr int kOperand = 32 * 16, kComplex = 8;
  p.forward_matrix = 0;
  p.inverse_matrix = p.forward_matrix + p.passes * p.forward_m * p.forward_k * kOperand;
  p.square = p.inverse_matrix + p.passes * p.inverse_m * p.inverse_k * kOperand;
  p.inner_twiddles = p.square + 2 * p.tiles * kOperand;
  p.column_twiddles = p.inner_twiddles + p.inner * kComplex;
  p.begin_twiddles = p.column_twiddles + 4 * p.digits * kComplex;
  p.row_twiddles = p.begin_twiddles + p.groups * p.warps * p.digits * kComplex;
  p.step_twiddles = p.row_twiddles + 8 * p.digits * kComplex;
  p.table_bytes = p.step_twiddles + 4 * p.digits * kComplex;
  return p;
}

// Rows are scaled by powers of two so that their largest value is just below 2^fft_target: float16 then holds every
// stage. The largest value between the stages of the inverse is at most 2 sqrt(2 points) times that of the row, times
// that of the spectrum, which is scaled to less than sqrt(2).
constexpr int fft_target(int points) {
  int log2 = 0;
  while ((1 << log2) < points) ++log2;
  return 13 - log2 / 2;
}

// The place of a bin of one sequence in a spectrum in the order of the transform, an index in units of one complex
// number: [digits, fragments, 32 lanes, 4].
constexpr int fft_bin_place(const FftPlan& p, int bin) {
  const int k1 = bin % p.digits, k2 = bin / p.digits % p.radix, k3 = bin / p.digits / p.radix;
  const int fragment = (k2 / 16 * p.tiles + k3 / 16) * 2 + k3 / 8 % 2;
  const int lane = k2 % 8 * 4 + k3 % 8 / 2;
  return ((k1 * p.fragments() + fragment) * 32 + lane) * 4 + k2 / 8 % 2 * 2 + k3 % 2;
}

}  // namespace warpform
