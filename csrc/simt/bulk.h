// Copies of boxes of tensors (kernels/device/bulk.cuh). They land at a moment that the seed draws, at the latest when no
// thread can go on; until then their destination counts as never written.
#pragma once

#include "device/tensor_map.cuh"
#include "simt/scheduler.h"

namespace warpform::simt {

void clear_copies();

void begin_bulk_copy(uint32_t to, const TensorMap& map, uint32_t barrier, const int (&at)[3], int rank,
                     const Where& where);
void check_tensor_map(const TensorMap& map, const Where& where);
// What the running thread stored so far is for bulk copies and wgmma to see, once a barrier orders it.
void fence_proxy();

bool copies_in_flight();
// One of the copies in flight, drawn at random.
void land_a_copy();

}  // namespace warpform::simt
