// The driver's function that describes tensors, found without linking the driver's library. The emulator has its own.
#include "device/tensor_map.cuh"

#include <cuda.h>
#include <cuda_runtime.h>

#include "common/plan.h"

namespace warpform {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Null where there is no driver, or one older than CUDA 12.0.
Encode find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  static_cast<void>(cudaGetLastError());  // the runtime keeps it, and the next launch would be blamed for it
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

Encode encoder() {
  static const Encode function = find_encoder();
  return function;
}

}  // namespace

bool has_tensor_map_encoder() { return encoder() != nullptr; }

bool encode_tensor_map(TensorMap& map, const TensorBox& box) {
  if (!fits_tensor_map(box)) return false;
  if (current_plan() != nullptr) return true;
  if (encoder() == nullptr || reinterpret_cast<uintptr_t>(box.data) % 16 != 0) return false;
  cuuint64_t sizes[3], strides[2];
  cuuint32_t extents[3], steps[3];
  for (int i = 0; i < box.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(box.sizes[i]);
    extents[i] = static_cast<cuuint32_t>(box.box[i]);
    steps[i] = 1;
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(box.strides[i - 1]) * 2;
  }
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                              CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap) && alignof(CUtensorMap) <= alignof(TensorMap));
  return encoder()(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16,
                   static_cast<cuuint32_t>(box.rank), const_cast<void*>(box.data), sizes, strides, extents, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(box.swizzle)],
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace warpform
