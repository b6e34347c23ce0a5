// The op that runs kernels with one fault each against the rules of compute capability 9.0 (broken_copies.cpp,
// broken_products.cpp): the emulator's tests (tests/simt/test_broken_hopper.py) say how each must be reported, or which
// result is wrong.
#include "simt/broken_hopper.h"

#include <torch/csrc/stable/library.h>

#include "torch/launch.h"

namespace warpform {
namespace {

using namespace broken;

TensorMap map_of(const bf16_t* data, int rows) {
  TensorMap map;
  const TensorBox box{data, 2, {kCols, rows, 1}, {kCols, 0}, {kCols, kTileRows, 1}, Swizzle::k128};
  check(encode_tensor_map(map, box), "_broken_hopper: no tensor map describes the input");
  return map;
}

void broken_hopper(std::string name, torch::stable::Tensor in_, torch::stable::Tensor out_) {
  constexpr const char* kOp = "_broken_hopper";
  const auto& table = broken_copies().contains(name) ? broken_copies() : broken_products();
  const auto kernel = table.find(name);
  check(kernel != table.end(), kOp, ": no kernel is called ", name);
  const Tensor in(in_), out(out_);
  check(in.numel() == kRows * kCols && in.scalar_type() == ScalarType::BFloat16 && in.is_contiguous() &&
            out.numel() == 64 * 64 && out.scalar_type() == ScalarType::Float && out.is_contiguous(),
        kOp, ": in must be bfloat16 [256, 64] and out float32 [64, 64], got ", Got{in}, " and ", Got{out});
  const Launch launch(kOp, in);
  const auto* data = launch.in<bf16_t>(in);
  kernel->second({map_of(data, kRows), map_of(data, kRows + 44), {}, data, launch.out<float>(out)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(warpform_simt, m) {
  // Runs a faulty kernel by name; raises the emulator's report, if the fault is one that it reports.
  m.def("_broken_hopper(str name, Tensor a, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(warpform_simt, CompositeExplicitAutograd, m) {
  m.impl("_broken_hopper", TORCH_BOX(&broken_hopper));
}

}  // namespace warpform
