// What the encoder family has kernels for, apart from attention.
#include "encoder/launch.h"

namespace warpform {

std::string encoder_kernel_table() {
  return R"({"op": "packing_plan", "dtype": "bool"}, {"op": "packing_plan", "dtype": "uint8"}, )"
         R"({"op": "packing_plan", "dtype": "int8"}, {"op": "packing_plan", "dtype": "int32"}, )"
         R"({"op": "packing_plan", "dtype": "int64"}, )"
         R"({"op": "pack", "dtype": "any"}, {"op": "unpack", "dtype": "any"}, )" +
         layer_norm_kernel_table() + ", " + gelu_kernel_table();
}

}  // namespace warpform
