// Mean and sum of squared deviations of each sample, for pool_mixer: a sample is height * width * channels neighbouring
// elements, cut into chunks, of which a block takes one.
//
// Tile: 256 threads with eight 16-byte pieces each, 16,384 elements in 16-bit types; a chunk is one such pass or, in
// samples beyond 16 M elements, several. What is averaged are distances to the sample's first element, so that a
// mean far from zero costs no digits. A thread keeps its elements in registers for two passes over them, the mean and
// then the squares around it. What threads and chunks have is merged as in Chan, Golub and LeVeque, Updating formulae
// and a pairwise algorithm for computing sample variances (1979), lower parts first, in an order that the shape alone
// decides.
// Loads: 16 bytes a lane, eight in flight; element by element where a sample begins elsewhere. The bits are the same.
// Bytes: one pass over x. Instructions: some 10 an element, where the card has time for 13: bytes bound it, by little.
// PoolFormer-S12 at 224 x 224, batch 128: 132 M elements, 61 us of an H200's 4.3 TB/s in 16-bit types.
// Measured: not yet.
#pragma once

#include "device/reduce.cuh"
#include "spatial/tile.cuh"

namespace warpform {

constexpr int kStatisticsThreads = 256;
constexpr int kStatisticsPieces = 8;
constexpr int64_t kMostChunks = 1024;  // of a sample

// Elements of one pass of a block.
template <class T>
constexpr int kStatisticsPass = kStatisticsThreads * kStatisticsPieces * kWideVec<T>;

struct Moments {
  float count;
  float mean;
  float squares;  // of the deviations from the mean

  // Of both together; a is the lower part.
  static __device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
    if (b.count == 0.f) return a;
    if (a.count == 0.f) return b;
    const float count = a.count + b.count, share = b.count / count, distance = b.mean - a.mean;
    return {count, a.mean + distance * share, a.squares + b.squares + distance * distance * (a.count * share)};
  }
};

// All lanes get the moments of the warp.
__device__ __forceinline__ Moments merge_lanes(Moments own) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const Moments other{shuffle_xor(own.count, offset), shuffle_xor(own.mean, offset),
                        shuffle_xor(own.squares, offset)};
    own = (lane_id() & offset) != 0 ? Moments::merge(other, own) : Moments::merge(own, other);
  }
  return own;
}

struct PoolStatisticsParams {
  const void* x;    // [batch, elements]
  float* partials;  // [batch, chunks, 2], mean and squares of the distances to the sample's first element
  int64_t elements;
  int64_t chunk;  // elements of a chunk, whole passes
  int64_t chunks;
  bool vectors;  // samples begin at multiples of 16 bytes, and end there
};

template <class T>
__global__ void __launch_bounds__(kStatisticsThreads) pool_statistics_kernel(const PoolStatisticsParams p) {
  constexpr int kVec = kWideVec<T>;
  const int64_t sample = blockIdx.x / p.chunks, chunk = blockIdx.x - sample * p.chunks;
  const T* x = static_cast<const T*>(p.x) + sample * p.elements;
  const int64_t end = min((chunk + 1) * p.chunk, p.elements);
  const float shift = to_float(load_global(x));
  Moments all{};
#pragma unroll 1
  for (int64_t first = chunk * p.chunk + static_cast<int>(threadIdx.x) * kVec; first < end;
       first += kStatisticsPass<T>) {
    Vec<T, kVec> pieces[kStatisticsPieces];
    int counts[kStatisticsPieces];  // elements of each piece
#pragma unroll
    for (int i = 0; i < kStatisticsPieces; ++i) {
      const int64_t at = first + int64_t{i} * kStatisticsThreads * kVec;
      counts[i] = static_cast<int>(max(min(end - at, int64_t{kVec}), int64_t{0}));
      if (p.vectors) {
        if (counts[i] > 0) pieces[i] = load_vec<kVec>(x + at);
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) pieces[i][j] = j < counts[i] ? load_global(x + at + j) : from_float<T>(0);
      }
    }
    float sum = 0, squares = 0;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kStatisticsPieces; ++i) {
      count += counts[i];
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum += j < counts[i] ? to_float(pieces[i][j]) - shift : 0.f;
    }
    const float mean = sum / static_cast<float>(count);
#pragma unroll
    for (int i = 0; i < kStatisticsPieces; ++i) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float distance = j < counts[i] ? to_float(pieces[i][j]) - shift - mean : 0.f;
        squares += distance * distance;
      }
    }
    all = Moments::merge(all, {static_cast<float>(count), mean, squares});
  }
  all = merge_lanes(all);
  const uint32_t shared = shared_base();
  if (lane_id() == 0) store_shared(shared + warp_id() * 16, Vec<float, 4>{all.count, all.mean, all.squares, 0.f});
  block_sync();
  if (threadIdx.x != 0) return;
#pragma unroll 1
  for (int warp = 1; warp < kStatisticsThreads / kWarpSize; ++warp) {
    const auto other = load_shared<Vec<float, 4>>(shared + warp * 16);
    all = Moments::merge(all, {other[0], other[1], other[2]});
  }
  store_global(reinterpret_cast<Vec<float, 2>*>(p.partials) + blockIdx.x, Vec<float, 2>{all.mean, all.squares});
}

// The moments of a sample's distances to its first element from those of its chunks, for every lane of a warp; of no
// elements they are 0.
__device__ __forceinline__ Moments moments_of_sample(const float* partials, int64_t sample, int64_t elements,
                                                     int64_t chunk, int64_t chunks) {
  Moments own{};
  const auto* from = reinterpret_cast<const Vec<float, 2>*>(partials) + sample * chunks;
#pragma unroll 1
  for (int64_t i = lane_id(); i < chunks; i += kWarpSize) {
    const auto part = load_global(from + i);
    own = Moments::merge(own, {static_cast<float>(min(chunk, elements - i * chunk)), part[0], part[1]});
  }
  return merge_lanes(own);
}

}  // namespace warpform
