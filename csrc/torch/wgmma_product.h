// The test op _wgmma_product.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

namespace warpform {

torch::stable::Tensor wgmma_product(torch::stable::Tensor a, torch::stable::Tensor b, std::string layout);

}  // namespace warpform
