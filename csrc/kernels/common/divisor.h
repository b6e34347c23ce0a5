// Quotients by a number that is known at launch: a product and a shift instead of the twenty instructions of a
// division.
#pragma once

#include <cstdint>

namespace warpform {

struct Divisor {
  int divisor;
  uint32_t factor;
  int shift;

  // 0 <= d < 2^30; by 0 every quotient is 0.
  void set(int d) {
    divisor = d, shift = 31;
    while ((int64_t{1} << (shift - 31)) < d) ++shift;
    factor = d > 0 ? static_cast<uint32_t>((uint64_t{1} << shift) / static_cast<uint64_t>(d) + 1) : 0;
  }
  // n / divisor, 0 <= n < 2^31.
  constexpr int quotient(int n) const { return static_cast<int>((static_cast<uint64_t>(n) * factor) >> shift); }
};

inline Divisor divisor_of(int d) {
  Divisor divisor;
  divisor.set(d);
  return divisor;
}

}  // namespace warpform
