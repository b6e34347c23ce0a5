// Descriptions of tensors in the emulator, in place of the driver's.
#pragma once

#include <cstdint>

#include "device/tensor_map.cuh"

namespace warpform::simt {

// What encode_tensor_map writes into a TensorMap.
struct EmulatedTensorMap {
  static constexpr uint64_t kMagic = 0x70616d726f736e65;

  uint64_t magic;
  TensorBox tensor;
};
// Where the 16 bytes go that a layout without a swizzle has at this shared address.
uint32_t swizzled(uint32_t address, Swizzle swizzle);

static_assert(sizeof(EmulatedTensorMap) <= sizeof(TensorMap));

}  // namespace warpform::simt
