#include "routing/hopper/routed_gemm_launch.cuh"

namespace warpform {

template bool launch_hidden_gather_hopper_as<Major::kOuter>(const char*, const HiddenGatherParams&, void*);

}  // namespace warpform
