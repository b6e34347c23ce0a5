// A Monarch product in one pass (monarch/forward.cuh, with its names) on wgmma and TMA, for second factors of four
// blocks.
//
// Tile      64 rows by one consumer warpgroup, which h of all lambdas, [64 rows][lambda][rho] in 16 bit, leaves shared
//           memory for. A fifth warp loads. One CTA an SM.
// First     64 rhos of each lambda at a time, all of one kappa, as four products of 64 x 64. A row of w1 is one (rho,
//           lambda), so that a box of w1 as a tensor (depth, lambda, rho) brings rhos of one lambda: the permutation is
//           in the copy. h goes by stmatrix to where wgmma reads it as the left operand of the second product.
// Second    64 sigmas of each lambda: four products of 64 x 64, one a lambda. A lane then holds two sigmas of all four
//           lambdas, 16 bytes of a row of y.
// Walk      CTA c takes the tiles of rows c, c + CTAs, ..; the producer runs ahead through all of them.
// Bounds    Weights come from L2 once for 64 rows, and that is the bound: 2 (k q p + l s r) / 64 bytes a row are 23 KB
//           at 768 -> 3072 nb 4 and 16 KB at 1024^2 nb 4, 4.2 and 3.0 ns at 5.5 TB/s (said of L2), against 1.9 and 1.3
//           of products at wgmma's rate, of which shared memory leaves two thirds here, and 1.8 and 1.0 of bytes from
//           memory. 128 rows, for half of the traffic, have no room for h; a cluster of two that shares the weights
//           would. As two products and two permutations through memory: 26 KB and 16 KB a row from memory, 6.1 and 3.9
//           ns.
//           To add: the four lambdas of the first product share x, so that one product of 256 columns would read it
//           once; and the tensor cores wait while the one consumer warpgroup stores h and y.
// Measured  not yet on a GPU.
#pragma once

#include "device/warpgroup_gemm.cuh"
#include "monarch/launch.h"

namespace warpform {

template <int kStages_>
struct MonarchHopperTile {
  static constexpr int kLambdas = 4, kM = 64, kDepth = 64, kStages = kStages_;
  static constexpr int kN = 64;  // columns of each lambda, rhos of the first product and sigmas of the second
  static constexpr int kThreads = kWarpgroupSize + kWarpSize;

  using X = PanelTile<kM, kDepth>;             // of the first product
  using W = PanelTile<kLambdas * kN, kDepth>;  // of both: kN rows of each lambda
  using H = PanelTile<kM, kDepth>;             // 64 rhos of a lambda
  static constexpr int kLambdaBytes = kN * kPanel * 2;
  static constexpr int kStageBytes = X::kBytes + W::kBytes;
  static constexpr int kRingAt = kStages * kStageBytes, kMiddleAt = kRingAt + 1024;
  static_assert(Ring<kStages>::kBytes <= 1024 && kMiddleAt % 1024 == 0);
  static constexpr int bytes(int h_cols) { return kMiddleAt + h_cols / kDepth * H::kBytes; }

  static __device__ __forceinline__ X x(int stage) { return {shared_base() + stage * kStageBytes}; }
  static __device__ __forceinline__ W w(int stage) { return {shared_base() + stage * kStageBytes + X::kBytes}; }
  static __device__ __forceinline__ Ring<kStages> ring() { return {shared_base() + kRingAt}; }
  static __device__ __forceinline__ H h(int i) { return {shared_base() + kMiddleAt + i * H::kBytes}; }
};

struct MonarchHopperWork {
  TensorMap x;   // (i, kappa, row), boxes of 64 x 1 x 64
  TensorMap w1;  // (i, lambda, rho), boxes of 64 x 1 x 64
  TensorMap w2;  // (rho, sigma, lambda), boxes of 64 x 64 x 1
  MonarchParams p;
  int run;           // rhos of a lambda that one kappa gives: q / l
  int share, extra;  // tiles of rows of a CTA: the first `extra` take one more

  __device__ __forceinline__ int tiles() const { return share + (static_cast<int>(blockIdx.x) < extra ? 1 : 0); }
  template <class Tile>
  __device__ __forceinline__ int first_row(int i) const {
    return (static_cast<int>(blockIdx.x) + i * static_cast<int>(gridDim.x)) * Tile::kM;
  }
};

// By one thread.
template <class Tile>
__device__ __forceinline__ void monarch_produce(const MonarchHopperWork& work) {
  const MonarchParams& p = work.p;
  const Ring<Tile::kStages> ring = Tile::ring();
  RingPosition<Tile::kStages> at;
  const auto begin = [&](int bytes) {
    at.wait_empty(ring);
    mbarrier_arrive_expect(ring.full(at.stage), bytes);
  };
  const auto lambda_of_stage = [&](int lambda) { return Tile::w(at.stage).base + lambda * Tile::kLambdaBytes; };
  for (int i = 0; i < work.tiles(); ++i) {
    const int first_row = work.first_row<Tile>(i);
    for (int kappa = 0; kappa < p.blocks1; ++kappa) {
      for (int rho = 0; rho < work.run; rho += Tile::kN) {
#pragma unroll 1
        for (int depth = 0; depth < p.cols1; depth += Tile::kDepth) {
          begin(Tile::kStageBytes);
          load_panels(Tile::x(at.stage), work.x, ring.full(at.stage), depth, kappa, first_row);
#pragma unroll
          for (int lambda = 0; lambda < Tile::kLambdas; ++lambda) {
            tma_load(lambda_of_stage(lambda), work.w1, ring.full(at.stage), depth, lambda, kappa * work.run + rho);
          }
          at.advance();
        }
      }
    }
    for (int sigma = 0; sigma < p.rows2; sigma += Tile::kN) {
#pragma unroll 1
      for (int depth = 0; depth < p.cols2; depth += Tile::kDepth) {
        begin(Tile::W::kBytes);
#pragma unroll
        for (int lambda = 0; lambda < Tile::kLambdas; ++lambda) {
          tma_load(lambda_of_stage(lambda), work.w2, ring.full(at.stage), depth, sigma, lambda);
        }
        at.advance();
      }
    }
  }
}

// Rounds 64 rhos of each lambda, from `rho` on and of which the first `rhos` (a multiple of 16) are meant, to T and
// stores a warp's 16 rows of them in h. `panels` are those of a lambda.
template <class T, class Tile>
__device__ __forceinline__ void store_middle(const float (&acc)[Tile::kLambdas][1][Tile::kN / 8][4], int warp_row,
                                             int rho, int rhos, int panels) {
  const int lane = opaque_lane(), row = warp_row + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int col = 0; col < Tile::kN; col += 16) {
    if (col >= rhos) break;
    const int to = rho + col + lane / 16 * 8;
#pragma unroll
    for (int lambda = 0; lambda < Tile::kLambdas; ++lambda) {
      uint32_t v[4];
      pack_a<T>(v, acc[lambda][0], col / 16);
      stmatrix_x4(Tile::h(lambda * panels + to / kPanel).panel(0).chunk(row, to % kPanel / kChunk), v);
    }
  }
}

// Rounds 64 sigmas of each lambda, from `sigma` on, to T and stores a warp's 16 rows of them in y, from `first_row` on.
template <class T, class Tile>
__device__ __forceinline__ void store_sigmas(const float (&acc)[Tile::kLambdas][1][Tile::kN / 8][4],
                                             const MonarchParams& p, int first_row, int sigma) {
  static_assert(Tile::kLambdas == 4, "two sigmas of all lambdas are 16 bytes");
  const int64_t stride = int64_t{Tile::kLambdas} * p.rows2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int lane = opaque_lane(), row = first_row + 8 * r + lane / 4, mine = sigma + 2 * (lane % 4);
    // Opaque: as a part of the loop's arithmetic it makes the compiler store 16 bytes in four pieces.
    const auto col = static_cast<int>(opaque(static_cast<uint32_t>(Tile::kLambdas * mine)));
    T* to = static_cast<T*>(p.y) + row * stride + col;
#pragma unroll
    for (int n = 0; n < Tile::kN / 8; ++n) {
      const auto two = [&](int lambda, int e) {  // neighbouring lambdas of one sigma
        return pack2<T>(acc[lambda][0][n][2 * r + e], acc[lambda + 1][0][n][2 * r + e]);
      };
      const Vec<uint32_t, 4> v{{two(0, 0), two(2, 0), two(0, 1), two(2, 1)}};
      // Sigmas come in pairs, as rows of y are whole 16 bytes.
      if (row < p.rows && mine + 8 * n < p.rows2) store_global(reinterpret_cast<Vec<uint32_t, 4>*>(to + 32 * n), v);
    }
  }
}

// By a warpgroup.
template <class T, class Tile>
__device__ __forceinline__ void monarch_consume(const MonarchHopperWork& work) {
  constexpr int kLambdas = Tile::kLambdas, kN = Tile::kN / 8, kDepth = Tile::kDepth;
  constexpr int kBarrier = 1;
  const MonarchParams& p = work.p;
  const Ring<Tile::kStages> ring = Tile::ring();
  const int warp_row = shuffle(warp_id(), 0) * 16;  // the compiler knows that lanes agree
  const int panels = p.cols2 / kPanel;              // of h, a lambda
  RingPosition<Tile::kStages> at;
  float acc[kLambdas][1][kN][4] = {};
  // left(lambda, step, stage) gives the left operand.
  const auto multiply = [&](int steps, auto&& left) {
    wgmma_steps(
        ring, at, steps,
        [&](int step, int stage) {
#pragma unroll
          for (int lambda = 0; lambda < kLambdas; ++lambda) {
            warpgroup_abt<T, kDepth>(acc[lambda][0], left(lambda, step, stage), 0, Tile::w(stage), lambda * Tile::kN,
                                     step > 0);
          }
        },
        acc[0][0], acc[1][0], acc[2][0], acc[3][0]);
  };
  for (int i = 0; i < work.tiles(); ++i) {
    for (int kappa = 0; kappa < p.blocks1; ++kappa) {
#pragma unroll 1
      for (int rho = 0; rho < work.run; rho += Tile::kN) {
        multiply(ceil_div(p.cols1, kDepth), [](int /*lambda*/, int /*step*/, int stage) { return Tile::x(stage); });
        store_middle<T, Tile>(acc, warp_row, kappa * work.run + rho, work.run - rho, panels);
      }
    }
    fence_proxy_async();
    named_barrier_sync(kBarrier, kWarpgroupSize);  // h is complete

#pragma unroll 1
    for (int sigma = 0; sigma < p.rows2; sigma += Tile::kN) {
      multiply(panels, [&](int lambda, int step, int /*stage*/) { return Tile::h(lambda * panels + step); });
      store_sigmas<T, Tile>(acc, p, work.first_row<Tile>(i) + warp_row, sigma);
    }
    named_barrier_sync(kBarrier, kWarpgroupSize);  // no product reads h, which the next tile's overwrites
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) monarch_forward_hopper(
    const __grid_constant__ MonarchHopperWork work) {
  const Ring<Tile::kStages> ring = Tile::ring();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(work.x);
    prefetch_tensor_map(work.w1);
    prefetch_tensor_map(work.w2);
    ring.init(1, 1);
    fence_mbarrier_init();
  }
  block_sync();
  if (warpgroup_id() == 0) {
    monarch_consume<T, Tile>(work);
  } else if (threadIdx.x == kWarpgroupSize) {
    monarch_produce<Tile>(work);
  }
}

}  // namespace warpform
