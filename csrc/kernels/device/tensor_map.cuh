// Descriptions of tensors for the copies of tensors in bulk (bulk.cuh), and the host's function that makes them.
#pragma once

#include <cstdint>

namespace warpform {

// The driver's description (CUtensorMap), a member of a kernel's parameters: it travels by value, so that a graph of
// launches holds its own.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

// The pattern in which 16-byte chunks are exchanged in shared memory, by the bytes after which it repeats along a row:
// bits 4, 5 and 6 of an address are combined by XOR with bits 7, 8 and 9, of k64 two and of k32 one of them.
enum class Swizzle : int { kNone, k32, k64, k128 };

constexpr int swizzle_bytes(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? 16 : 16 << static_cast<int>(swizzle);
}

// A tensor of 16-bit elements, and the box of it that one copy brings. Dimension 0 is contiguous in memory.
struct TensorBox {
  const void* data;    // 16-byte aligned
  int rank;            // 1 to 3
  int64_t sizes[3];    // elements, at least 1 each
  int64_t strides[2];  // of dimensions 1 and 2, in elements: multiples of 8
  int box[3];          // elements, 1 to 256 each; along dimension 0 a multiple of 8, or what the swizzle spans
  Swizzle swizzle;
};

// True if there is a description of such a box.
constexpr bool fits_tensor_map(const TensorBox& t) {
  constexpr int64_t kMostElements = int64_t{1} << 32, kMostBytes = int64_t{1} << 40;
  if (t.rank < 1 || t.rank > 3 || t.box[0] % 8 != 0) return false;
  if (t.swizzle != Swizzle::kNone && t.box[0] * 2 != swizzle_bytes(t.swizzle)) return false;
  for (int i = 0; i < t.rank; ++i) {
    if (t.sizes[i] < 1 || t.sizes[i] > kMostElements || t.box[i] < 1 || t.box[i] > 256) return false;
    if (i > 0 && (t.strides[i - 1] % 8 != 0 || t.strides[i - 1] < 0 || t.strides[i - 1] * 2 >= kMostBytes))
      return false;
  }
  return true;
}

// Writes the description. False where there is none: the box does not fit, the data is not aligned, or the driver lacks
// the function that makes it. In a plan nothing is written.
bool encode_tensor_map(TensorMap& map, const TensorBox& box);
// True if the driver has that function; it is asked once.
bool has_tensor_map_encoder();

}  // namespace warpform
