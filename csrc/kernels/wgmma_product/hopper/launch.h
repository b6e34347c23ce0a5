// The launch function that exists where the library has code for compute capability 9.0.
#pragma once

#include "wgmma_product/launch.h"

namespace warpform {

void launch_wgmma_product_hopper(const WgmmaProductParams& params, void* stream);

}  // namespace warpform
