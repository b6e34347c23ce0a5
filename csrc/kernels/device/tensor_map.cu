// The driver's function that describes tensors, found without linking the driver's library. The emulator has its own.
#include "device/tensor_map.cuh"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>

#include "common/plan.h"

namespace warpform {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

constexpr const char* kEncoder = "cuTensorMapEncodeTiled";

// Null where there is no driver, or one older than CUDA 12.0.
Encode find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(kEncoder, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(kEncoder, &found, cudaEnableDefault, &result);
#endif
  static_cast<void>(cudaGetLastError());  // the runtime keeps it, and the next launch would be blamed for it
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

Encode encoder() {
  static const Encode function = find_encoder();
  return function;
}

// Says once that the driver refuses what the rules of fits_tensor_map allow: kernels for every GPU run instead, and
// nothing but their speed shows it.
void report_refusal(CUresult result) {
  static const bool said =
      std::fprintf(stderr, "warpform: %s refused a tensor (CUresult %d); kernels for every GPU run instead\n", kEncoder,
                   static_cast<int>(result)) > 0;
  static_cast<void>(said);
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
  const auto encode = [&] {
    return encoder()(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16,
                     static_cast<cuuint32_t>(box.rank), const_cast<void*>(box.data), sizes, strides, extents, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(box.swizzle)],
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode();
  if (result == CUDA_ERROR_INVALID_CONTEXT || result == CUDA_ERROR_NOT_INITIALIZED) {
    // A thread that has not called the runtime yet: setting the device gives it a context.
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess) result = encode();
    static_cast<void>(cudaGetLastError());
  }
  if (result != CUDA_SUCCESS) report_refusal(result);
  return result == CUDA_SUCCESS;
}

}  // namespace warpform
