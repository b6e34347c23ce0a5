// What hidden routing has kernels for.
#include "routing/launch.h"

namespace warpform {

std::string hidden_kernel_table() {
  const std::string groups = "\"num_groups\": {\"most\": " + std::to_string(kMaxGroups) + "}";
  std::string table = "{\"op\": \"routing_mask\", " + groups + "}, {\"op\": \"routing_plan\", " + groups + "}";
  for (const char* op : {"hidden_gather_linear", "hidden_gather_linear_backward", "hidden_scatter_linear",
                         "hidden_scatter_linear_backward", "hidden_weight_grad"}) {
    for (const char* dtype : {"float16", "bfloat16"}) {
      table += std::string(", {\"op\": \"") + op + "\", \"dtype\": \"" + dtype +
               "\", \"widths\": {\"multiple_of\": 8}, \"tile\": " + std::to_string(kHiddenTile) + "}";
    }
  }
  return table;
}

}  // namespace warpform
