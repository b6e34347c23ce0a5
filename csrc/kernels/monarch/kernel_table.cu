// What the Monarch family has kernels for.
#include "monarch/launch.h"

namespace warpform {

std::string monarch_kernel_table() {
  std::string table;
  for (const char* name : {"blockdiag_multiply", "monarch_multiply", "blockdiag_glu"}) {
    for (const char* backward : {"", "_backward"}) {
      for (const char* dtype : {"float16", "bfloat16"}) {
        table += std::string(table.empty() ? "" : ", ") + "{\"op\": \"" + name + backward + "\", \"dtype\": \"" +
                 dtype + "\", \"block_sizes\": {\"multiple_of\": " + std::to_string(kMonarchAlignment) + "}}";
      }
    }
  }
  return table;
}

}  // namespace warpform
