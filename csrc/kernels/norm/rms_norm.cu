// Launches of RMSNorm.
#include "norm/row_norm_launch.cuh"

namespace warpform {

void launch_rms_norm(const RmsNormParams& p, void* stream) {
  launch_rows<RmsNorm>(p, rows_aligned(p.dtype, p.cols, p.x, p.residual, p.weight, p.out, p.sum), stream);
}

int64_t rms_norm_backward_groups(const RmsNormBackwardParams& p) { return backward_groups<RmsNormBackward>(p); }

void launch_rms_norm_backward(const RmsNormBackwardParams& p, void* stream) {
  launch_backward<RmsNormBackward>(p, {p.dweight}, stream);
}

}  // namespace warpform
