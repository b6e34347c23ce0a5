// The supported configurations of packing.
#include "packing/launch.h"

namespace warpform {

std::string packing_kernel_table() {
  return R"({"op": "packing_plan", "dtype": "bool"}, {"op": "packing_plan", "dtype": "uint8"}, )"
         R"({"op": "packing_plan", "dtype": "int8"}, {"op": "packing_plan", "dtype": "int32"}, )"
         R"({"op": "packing_plan", "dtype": "int64"}, )"
         R"({"op": "pack", "dtype": "any"}, {"op": "unpack", "dtype": "any"})";
}

}  // namespace warpform
