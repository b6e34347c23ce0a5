// What warps of sm_90 do together beside products: registers that move between warpgroups, one elected lane, stores of
// fragments (kernels/device/warpgroup.cuh).
#pragma once

#include <string>

#include "simt/scheduler.h"

namespace warpform::simt {

void clear_warpgroups(int threads);

void give_registers(int registers, const Where& where);
void take_registers(int registers, const Where& where);
bool elect(const Where& where);
void stmatrix(uint32_t row, const uint32_t* r, bool transposed, const Where& where);

// What a warp lacks that waits in a meeting of its warpgroup, for reports of deadlocks.
std::string waiting_warpgroup_text(int warp);

}  // namespace warpform::simt
