// Launch functions of packing_plan, pack and unpack: pointers into device memory, sizes, and an opaque stream. They
// launch and return; a launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

#include "common/supported.h"

namespace warpform {

// ---- packing_plan ----

struct PackingPlanParams {
  const void* mask;            // [batch, seqlen], mask_bytes an element; a nonzero element is a token
  int mask_bytes;              // 1, 4 or 8, on a CPU also 2
  int64_t mask_stride;         // elements from row to row
  int64_t mask_column_stride;  // elements from place to place: 1, on a CPU any
  int64_t batch;
  int64_t seqlen;
  int64_t capacity;
  int32_t* cu_seqlens;    // [batch + 1]
  int32_t* lengths;       // [batch]
  int64_t* indices;       // [capacity]
  int64_t* position_ids;  // [capacity]
  int32_t* ranks;         // [batch, seqlen]
  int64_t* summary;       // [2]
};
void launch_packing_plan(const PackingPlanParams& params, void* stream);

// ---- pack and unpack ----

// out[r] = index[r] in [0, in_rows) ? in[index[r]] : 0, rows of row_bytes bytes. pack has int64 indices, unpack int32
// ranks.
struct GatherRowsParams {
  const void* in;     // [in_rows] rows, in_stride bytes apart
  void* out;          // [out_rows, row_bytes]
  const void* index;  // [out_rows]
  int index_bytes;    // 4 or 8
  int64_t in_rows;
  int64_t out_rows;
  int64_t row_bytes;
  int64_t in_stride;
};
void launch_gather_rows(const GatherRowsParams& params, void* stream);

// ---- supported configurations ----

inline constexpr SupportedConfig kPackingConfigs[] = {
    {.op = "packing_plan", .dtypes = {{"bool", "uint8", "int8", "int32", "int64"}}},
    {.op = "pack", .dtypes = {{"any"}}},
    {.op = "unpack", .dtypes = {{"any"}}},
};

}  // namespace warpform
