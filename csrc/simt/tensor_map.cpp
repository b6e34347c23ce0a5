#include "simt/tensor_map.h"

#include <cstring>

#include "simt/scheduler.h"

namespace warpform {

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
