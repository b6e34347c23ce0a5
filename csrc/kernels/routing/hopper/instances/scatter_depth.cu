#include "routing/hopper/routed_gemm_launch.cuh"

namespace warpform {

template bool launch_hidden_scatter_hopper_as<Major::kDepth>(const char*, const HiddenScatterParams&, void*);

}  // namespace warpform
