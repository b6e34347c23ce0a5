// Tile sizes of the attention kernels, with the reason for each. They were chosen by registers and shared memory, and
// not tuned on hardware yet.
//
// A head dimension runs in the smallest bucket of 32, 64, 96, 128 and 256 that holds it: products run over the bucket
// (above 64 columns less the panels of 64 wholly past head_dim), over zeros past head_dim. Rows of a block are split
// across warps, so that softmax needs no more than shuffles among the four lanes that share a row.
#pragma once

#include "device/types.cuh"

namespace warpform {

struct ForwardTile {
  int block_m;  // queries
  int block_n;  // keys at a time
  int warps;
};

// `small`: 64 queries instead of 128, for sequences that would leave the large tile half empty and for launches with
// fewer large tiles than the GPU has SMs.
__host__ __device__ constexpr ForwardTile forward_tile(int head_dim, bool small) {
  if (head_dim == 256) return {64, 64, 4};  // 96 KiB: also fits GPUs with 99 KiB a block; 128 float32 of O a thread
  if (small) return {64, 64, 4};            // 24 or 48 KiB, one m16 tile a warp: 3 or 4 CTAs an SM
  // 32 or 64 KiB. Two m16 tiles a warp use each K and V fragment twice; 128 keys at a time would spill, at 128 columns
  // because O takes 128 registers, below because S would.
  return {128, 64, 4};
}

struct BackwardTile {
  int block_m;  // queries at a time
  int block_n;  // keys, 16 a warp
  int warps;
  int stages;    // of Q and dO in shared memory
  int out_cols;  // columns of dK and dV that one CTA holds in registers
};

// `small`: half the keys, for problems of which backward_is_small (instances.h) is true.
__host__ __device__ constexpr BackwardTile backward_tile(int head_dim, bool small) {
  // dK and dV of 256 columns are 256 registers a thread: two CTAs take 128 columns each and both compute the scores, 7
  // products instead of 5.
  if (head_dim == 256) return {64, 64, 4, 1, 128};
  if (head_dim > 64) {
    if (small) return {64, 64, 4, 1, head_dim};  // 72 KiB
    return {64, 128, 8, 2, head_dim};            // 144 KiB; 128 keys halve the atomic adds to dQ
  }
  if (small) return {64, 64, 4, 2, head_dim};  // 56 KiB
  return {64, 128, 8, 2, head_dim};            // 80 KiB; registers allow one CTA an SM
}

// The kernel that owns a block of queries and computes dQ alone (deterministic=True): 64 or 128 KiB.
__host__ __device__ constexpr ForwardTile dq_tile() { return {64, 64, 4}; }

// Columns of a bucket's tiles in shared memory, which come in powers of two.
__host__ __device__ constexpr int tile_cols(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

__host__ __device__ constexpr int forward_shared_bytes(int head_dim, ForwardTile t) {
  return (t.block_m + 2 * t.block_n) * tile_cols(head_dim) * 2;
}
__host__ __device__ constexpr int dq_shared_bytes(int head_dim, ForwardTile t) {
  return 2 * (t.block_m + t.block_n) * tile_cols(head_dim) * 2;
}
__host__ __device__ constexpr int backward_shared_bytes(int head_dim, BackwardTile t) {
  // K, V; Q, dO and two floats a query, each stage; dS.
  return 2 * t.block_n * tile_cols(head_dim) * 2 + t.stages * t.block_m * (2 * tile_cols(head_dim) * 2 + 8) +
         t.block_n * t.block_m * 2;
}

// Further shared memory of the scores of disentangled.cuh: two tiles of 64 x 64, 8 bytes a row of one, and a column of
// 2 bytes for each distance from -reach to reach.
__host__ __device__ constexpr int disentangled_shared_bytes(int reach) {
  return 2 * 64 * 64 * 2 + 64 * 8 + ceil_div(2 * (2 * reach + 1), 16) * 16;
}

// `biased`: a score bias has no kernels of its own at 32 and 96.
__host__ __device__ constexpr int head_dim_bucket(int head_dim, bool biased) {
  if (head_dim <= 32 && !biased) return 32;
  if (head_dim <= 64) return 64;
  if (head_dim <= 96 && !biased) return 96;
  return head_dim <= 128 ? 128 : 256;
}

}  // namespace warpform
