// Instantiations and launch of _wgmma_product: element type x left operand x layout of b.
#include "wgmma_product/hopper/wgmma_product.cuh"

#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "wgmma_product/hopper/launch.h"

namespace warpform {
namespace {

constexpr const char* kOp = "_wgmma_product";

Swizzle swizzle_of(int span) {
  return span == 128 ? Swizzle::k128 : span == 64 ? Swizzle::k64 : span == 32 ? Swizzle::k32 : Swizzle::kNone;
}

// A panel is a box; past the last element of a row it brings zeros.
TensorMap map_of(const void* data, bool outer, const WgmmaProductParams& p) {
  const int rows = outer ? p.depth : 64, cols = outer ? 64 : p.depth;
  const TensorBox box{.data = data,
                      .rank = 2,
                      .sizes = {cols, rows, 0},
                      .strides = {cols, 0},
                      .box = {p.span / 2, rows, 0},
                      .swizzle = swizzle_of(p.span)};
  TensorMap map;
  if (!encode_tensor_map(map, box)) fail(kOp, "no tensor map describes an operand");
  return map;
}

template <class T, ProductLeft kLeft>
void launch_with(const WgmmaProduct& g, void* stream) {
  dispatch_bool(g.p.outer_b, [&]<bool kOuterB>() {
    launch<wgmma_product_hopper<T, kLeft, kOuterB ? Major::kOuter : Major::kDepth>>(kOp, dim3(1), kWarpgroupSize,
                                                                                    kProductSharedBytes, stream, g);
  });
}

}  // namespace

void launch_wgmma_product_hopper(const WgmmaProductParams& p, void* stream) {
  WgmmaProduct g{{}, {}, p};
  if (!p.by_stores) {
    if (p.left != ProductLeft::kRegisters) g.a_map = map_of(p.a, p.left == ProductLeft::kOuter, p);
    g.b_map = map_of(p.b, p.outer_b, p);
  }
  dispatch_half(p.dtype, [&]<class T>() {
    switch (p.left) {
      case ProductLeft::kDepth: return launch_with<T, ProductLeft::kDepth>(g, stream);
      case ProductLeft::kOuter: return launch_with<T, ProductLeft::kOuter>(g, stream);
      case ProductLeft::kRegisters: return launch_with<T, ProductLeft::kRegisters>(g, stream);
    }
  });
}

}  // namespace warpform
