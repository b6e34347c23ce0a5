#include "attention/disentangled_launch.cuh"

namespace warpform {
template void launch_disentangled_forward<128>(const AttentionForwardParams& params, void* stream);
template void launch_disentangled_backward<128>(const AttentionBackwardParams& params, void* stream);
}  // namespace warpform
