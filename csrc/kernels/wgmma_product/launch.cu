// Whether the GPU and this library have the product's kernels, and the way to them.
#include "wgmma_product/launch.h"

#include "common/failure.h"
#include "common/hopper.h"
#include "wgmma_product/hopper/launch.h"

namespace warpform {

void launch_wgmma_product(const WgmmaProductParams& p, void* stream) {
  if (const char* reason = hopper_unusable()) fail("_wgmma_product", "no kernel", reason);
#ifdef WARPFORM_WITH_HOPPER
  launch_wgmma_product_hopper(p, stream);
#else
  static_cast<void>(p), static_cast<void>(stream);
#endif
}

}  // namespace warpform
