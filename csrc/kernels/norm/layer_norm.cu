// Launches of LayerNorm.
#include "norm/row_norm_launch.cuh"

namespace warpform {

void launch_layer_norm(const LayerNormParams& p, void* stream) {
  launch_rows<LayerNorm>(p, rows_aligned(p.dtype, p.cols, p.x, p.residual, p.bias, p.weight, p.ln_bias, p.out, p.sum),
                         stream);
}

int64_t layer_norm_backward_groups(const LayerNormBackwardParams& p) { return backward_groups<LayerNormBackward>(p); }

void launch_layer_norm_backward(const LayerNormBackwardParams& p, void* stream) {
  launch_backward<LayerNormBackward>(p, {p.dbias, p.dweight, p.dln_bias}, stream);
}

}  // namespace warpform
