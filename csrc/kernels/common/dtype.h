// The element types a launch function may be asked for.
#pragma once

namespace warpform {

enum class DType { kFloat32, kFloat16, kBFloat16 };

inline const char* dtype_name(DType t) {
  return t == DType::kFloat32 ? "float32" : t == DType::kFloat16 ? "float16" : "bfloat16";
}

}  // namespace warpform
