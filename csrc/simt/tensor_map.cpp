#include "simt/tensor_map.h"

#include <cstring>

#include "simt/scheduler.h"

namespace warpform {

uint32_t simt::swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t bits = swizzle == Swizzle::kNone ? 0 : (1u << static_cast<int>(swizzle)) - 1;
  return address ^ ((address >> 7 & bits) << 4);
}

bool has_tensor_map_encoder() { return simt::device().tensor_maps; }

bool encode_tensor_map(TensorMap& map, const TensorBox& box) {
  if (!has_tensor_map_encoder() || !fits_tensor_map(box)) return false;
  if (reinterpret_cast<uintptr_t>(box.data) % 16 != 0) return false;
  std::memset(map.words, 0xff, sizeof(map.words));
  const simt::EmulatedTensorMap emulated{simt::EmulatedTensorMap::kMagic, box};
  std::memcpy(map.words, &emulated, sizeof(emulated));
  return true;
}

}  // namespace warpform
