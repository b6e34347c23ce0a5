// Launches of RMSNorm with GELU.
#include "norm/row_norm_launch.cuh"

namespace warpform {

void launch_rms_norm_gelu(const RmsNormGeluParams& p, void* stream) {
  const bool aligned = rows_aligned(p.dtype, p.cols, p.x, p.out);
  p.tanh ? launch_rows<RmsNormGelu<TanhGelu>>(p, aligned, stream)
         : launch_rows<RmsNormGelu<ErfGelu>>(p, aligned, stream);
}

void launch_rms_norm_gelu_backward(const RmsNormGeluBackwardParams& p, void* stream) {
  const bool aligned = rows_aligned(p.dtype, p.cols, p.dout, p.x, p.dx);
  p.tanh ? launch_rows<RmsNormGeluBackward<TanhGelu>>(p, aligned, stream)
         : launch_rows<RmsNormGeluBackward<ErfGelu>>(p, aligned, stream);
}

}  // namespace warpform
