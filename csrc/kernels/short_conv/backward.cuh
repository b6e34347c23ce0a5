// short_conv_gate_backward: the convolution c is computed again; with dc its gradient, which is dgated times the other
// factor for parts 0 and 2 and dgate for part 1,
//   dx[t] = sum over i of tap[i] dc[t + i],   dtap[i] = sum over b, t of dc[t] x[t - i],   dbias = sum over b, t of dc.
//
// Tile: see tile.cuh, with halo rows on both sides. A block keeps its channels and walks over a range of tiles of
// times; while it works on one, cp.async brings the next into a second buffer. A thread reads dgated and dgate along
// time from global memory, 16 bytes a channel and the few times behind them, which are the next lane's too and come
// from L1; computing dc there again is cheaper than to fetch it from that lane. dx takes the place of x in shared
// memory and is stored with channels last. Sums over time: in registers within a thread, then over the 8 lanes of a
// channel by exchanging halves, which leaves each lane with 2 to 6 sums to carry from tile to tile; a block leaves one
// float32 partial a sum, which column_sum.cuh adds up. All in a fixed order.
//
// Bytes a channel and time, in elements: 5 read and 3 written. Made of PyTorch's operations it is 30: products 6, the
// three parts into one tensor 6, the convolution's two gradients 12, and dx transposed 6.
// At batch 64, seqlen 4096, 768 channels in bfloat16 that is 3.2 GB: 0.75 ms at an H200's 4.3 TB/s, against 2.8 ms.
// 57 FLOP and some 90 instructions for 16 bytes, where the card has time for 110: bytes bound it, not by much.
// Measured: not yet.
#pragma once

#include "short_conv/tile.cuh"

namespace warpform {

template <class T, int kTaps>
struct ShortConvBackward : ShortConvTile<T, kTaps> {
  using Tile = ShortConvTile<T, kTaps>;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kRows = Tile::kTileTimes + 2 * Tile::kHalo;
  static constexpr int kSpan = Tile::kTimes + Tile::kHalo;  // times at which a thread needs dc
  static constexpr int kWords = kSpan + Tile::kHalo;        // rows of x that it needs for that
  static constexpr int kBufferBytes = 3 * kRows * Tile::kPieces * 16;
  static constexpr int kSharedBytes = 2 * kBufferBytes + Tile::kParameterBytes;
  // Sums over time are reduced in rounds of two filters: a channel's first and third part, or the second part of both
  // channels. A round is [filter][tap, then bias], filled up to a multiple of 8 lanes.
  static constexpr int kRounds = Tile::kPack + 1;
  static constexpr int kSums = (2 * (kTaps + 1) + 7) / 8 * 8;
  static constexpr int kTimeWords = (Tile::kTimes + 4) / Tile::kPack;  // hold kSpan times
};

// dgated or dgate of a thread's channels at kSpan times (and what fills the last word), zeros outside.
template <class Kernel, class T, int kPack, int kWords>
__device__ __forceinline__ void load_times(Vec<T, kPack> (&words)[kPack][kWords], const T* in,
                                           const ShortConvOrigin& at, int64_t seqlen, int64_t channels,
                                           bool vector_times) {
  using Tile = typename Kernel::Tile;
  constexpr int kTimes = Tile::kTimes;
  const ShortConvThread<Tile> me;
#pragma unroll
  for (int h = 0; h < kPack; ++h) {
    const int64_t channel = at.channel + me.channel() + h, t = at.time + me.time();
    const T* row = in + (at.batch * channels + channel) * seqlen + t;
    const int64_t left = channel < channels ? seqlen - t : 0;
    if (vector_times) {
      Vec<Vec<T, kPack>, kTimes / kPack> own{};
      Vec<Vec<T, kPack>, 4 / kPack> next{};
      if (left > 0) own = load_global(reinterpret_cast<const decltype(own)*>(row));
      if (left > kTimes) next = load_global(reinterpret_cast<const decltype(next)*>(row + kTimes));
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[h][w] = w < kTimes / kPack ? own[w] : next[w - kTimes / kPack];
    } else {
#pragma unroll
      for (int s = 0; s < kWords * kPack; ++s) {
        words[h][s / kPack][s % kPack] = s < Kernel::kSpan && s < left ? load_global(row + s) : from_float<T>(0);
      }
    }
  }
}

// Computes, from dc of one channel and part, dx, in the place of x, and the sums over this thread's times.
template <class Kernel, class T, int kSpan, int kWords, int kPack, int kTotal>
__device__ __forceinline__ void convolve_backward(const float (&dc)[kSpan], const Vec<T, kPack> (&words)[kWords], int h,
                                                  int part, uint32_t rows, const ShortConvFilter& filter, int taps,
                                                  float (&sums)[kTotal], int first) {
  using Tile = typename Kernel::Tile;
  const ShortConvThread<Tile> me;
  float dx[Tile::kTimes] = {};
#pragma unroll
  for (int i = 0; i < Tile::kTaps; ++i) {
    if (Tile::kTaps == 3 || i < taps) {
#pragma unroll
      for (int s = 0; s < Tile::kTimes; ++s) dx[s] += filter.taps[i] * dc[s + i];
    }
  }
#pragma unroll
  for (int s = 0; s < Tile::kTimes; ++s) {
    const int at = Tile::template offset<Kernel::kRows>(part, me.time() + Tile::kHalo + s, me.piece);
    store_shared(rows + at + me.word * 4 + h * static_cast<int>(sizeof(T)), from_float<T>(dx[s]));
  }
#pragma unroll
  for (int i = 0; i < Tile::kTaps; ++i) {
    float sum = 0;
#pragma unroll
    for (int s = 0; s < Tile::kTimes; ++s) sum += dc[s] * to_float(words[s + Tile::kHalo - i][h]);
    sums[first + i] = sum;
  }
  float sum = 0;
#pragma unroll
  for (int s = 0; s < Tile::kTimes; ++s) sum += dc[s];
  sums[first + Tile::kTaps] = sum;
}

// Adds up sums[kN] over the lanes that differ in the bits of `kMask` and below, down to 4: every exchange halves what a
// lane is left with. The lane with the bit set keeps the upper half.
template <int kMask, int kN, int kTotal>
__device__ __forceinline__ void exchange_halves(float (&sums)[kTotal]) {
  if constexpr (kMask >= 4) {
    const bool upper = (lane_id() & kMask) != 0;
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) {
      const float received = shuffle_xor(upper ? sums[k] : sums[k + kN / 2], kMask);
      sums[k] = (upper ? sums[k + kN / 2] : sums[k]) + received;
    }
    exchange_halves<kMask / 2, kN / 2>(sums);
  }
}

// Stores the tile's dx from shared memory.
template <class Kernel, class T>
__device__ __forceinline__ void store_rows(T* dx, uint32_t rows, const ShortConvOrigin& at, int64_t seqlen,
                                           int64_t channels, bool vector_channels) {
  using Tile = typename Kernel::Tile;
  const auto store = [&](auto vec) {
    constexpr int kVec = decltype(vec)::value;
    constexpr int kAccesses = Tile::kChannels / kVec, kStep = kShortConvThreads / kAccesses;
    const int c = static_cast<int>(threadIdx.x) % kAccesses * kVec;
    if (at.channel + c >= channels) return;
    const int end = static_cast<int>(min(seqlen - at.time, int64_t{Tile::kTileTimes}));
    T* to = dx + (at.batch * seqlen + at.time) * 3 * channels + at.channel + c;
#pragma unroll 2
    for (int row = static_cast<int>(threadIdx.x) / kAccesses; row < end; row += kStep) {
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        const int from = Tile::template offset<Kernel::kRows>(part, row + Tile::kHalo, c / Tile::kVec);
        const auto v = load_shared<Vec<T, kVec>>(rows + from + c % Tile::kVec * static_cast<int>(sizeof(T)));
        store_global(reinterpret_cast<Vec<T, kVec>*>(to + (int64_t{3} * row + part) * channels), v);
      }
    }
  };
  if (vector_channels) {
    store(std::integral_constant<int, Tile::kVec>{});
  } else {
    store(std::integral_constant<int, 1>{});
  }
}

template <class T, int kTaps>
__global__ void __launch_bounds__(kShortConvThreads, ShortConvBackward<T, kTaps>::kBlocksPerSm)
short_conv_gate_backward_kernel(const ShortConvLaunch<ShortConvBackwardParams> params) {
  using Kernel = ShortConvBackward<T, kTaps>;
  using Tile = typename Kernel::Tile;
  constexpr int kPack = Tile::kPack, kSpan = Kernel::kSpan, kSums = Kernel::kSums, kRounds = Kernel::kRounds;
  const ShortConvBackwardParams& p = params.p;
  const unsigned channel_tiles = static_cast<unsigned>(params.tiles.channels);
  const int64_t first_channel = int64_t{blockIdx.x % channel_tiles} * Tile::kChannels;
  const int64_t group = blockIdx.x / channel_tiles;
  const int64_t row_tiles = p.batch * params.tiles.times;
  const int64_t begin = row_tiles * group / p.groups, end = row_tiles * (group + 1) / p.groups;
  const uint32_t buffers = shared_base();
  const uint32_t filters = buffers + 2 * Kernel::kBufferBytes;
  stage_filters<Tile, T>(filters, p, first_channel);

  const ShortConvThread<Tile> me;
  float totals[kRounds][kSums / 8] = {};
  const auto add_up = [&](int round, float (&sums)[kSums]) {
    exchange_halves<16, kSums>(sums);
#pragma unroll
    for (int k = 0; k < kSums / 8; ++k) totals[round][k] += sums[k];
  };
  ShortConvOrigin at{}, next{begin / params.tiles.times, begin % params.tiles.times * Tile::kTileTimes, first_channel};
  const auto advance = [&] {
    at = next;
    next.time += Tile::kTileTimes;
    if (next.time >= p.seqlen) {
      next.time = 0;
      ++next.batch;
    }
  };
  // Step n brings tile n and works on tile n - 1.
  for (int64_t n = 0; n <= end - begin; ++n, advance()) {
    const uint32_t incoming = buffers + (n % 2 != 0 ? Kernel::kBufferBytes : 0);
    if (n < end - begin) {
      copy_rows<Tile, Kernel::kRows>(incoming, static_cast<const T*>(p.x), next, p.seqlen, p.channels,
                                     params.tiles.vector_channels);
    }
    cp_async_commit();
    if (n == 0) continue;
    const uint32_t rows = 2 * buffers + Kernel::kBufferBytes - incoming;
    const auto load = [&](Vec<T, kPack>(&words)[kPack][Kernel::kTimeWords], const void* in) {
      load_times<Kernel>(words, static_cast<const T*>(in), at, p.seqlen, p.channels, params.tiles.vector_times);
    };
    Vec<T, kPack> dgated[kPack][Kernel::kTimeWords], dgate[kPack][Kernel::kTimeWords];
    const int inside = static_cast<int>(min(p.seqlen - at.time - me.time(), int64_t{kSpan}));  // times of this thread
    load(dgated, p.dgated);
    load(dgate, p.dgate);
    cp_async_wait<1>();
    block_sync();

    Vec<T, kPack> first[Kernel::kWords], third[Kernel::kWords];
    load_words<Tile, Kernel::kRows>(first, rows, 0, me);
    load_words<Tile, Kernel::kRows>(third, rows, 2, me);
    warp_sync();  // the warp has read all it needs of its columns: dx may take their place
#pragma unroll
    for (int h = 0; h < kPack; ++h) {
      float sums[kSums] = {};
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {  // the gradient of one of the two factors needs the value of the other
        const int part = 2 * slot;
        float dc[kSpan];
        convolve<Tile, T>(dc, slot == 0 ? third : first, h, load_filter<Tile>(filters, 2 - part, me.channel() + h),
                          p.taps);
#pragma unroll
        for (int s = 0; s < kSpan; ++s) {
          // Beyond the sequence c may be infinite, and 0 times that is not 0.
          dc[s] = s < inside ? dc[s] * to_float(dgated[h][s / kPack][s % kPack]) : 0;
        }
        convolve_backward<Kernel, T>(dc, slot == 0 ? first : third, h, part, rows,
                                     load_filter<Tile>(filters, part, me.channel() + h), p.taps, sums,
                                     slot * (kTaps + 1));
      }
      add_up(h, sums);
    }

    Vec<T, kPack> second[kSpan];
    load_words<Tile, Kernel::kRows>(second, rows, 1, me);
    warp_sync();
    float sums[kSums] = {};
#pragma unroll
    for (int h = 0; h < kPack; ++h) {
      float dc[kSpan];
#pragma unroll
      for (int s = 0; s < kSpan; ++s) dc[s] = to_float(dgate[h][s / kPack][s % kPack]);
      const ShortConvFilter filter = load_filter<Tile>(filters, 1, me.channel() + h);
      convolve_backward<Kernel, T>(dc, second, h, 1, rows, filter, p.taps, sums, h * (kTaps + 1));
    }
    add_up(kPack, sums);

    block_sync();
    store_rows<Kernel>(static_cast<T*>(p.dx), rows, at, p.seqlen, p.channels, params.tiles.vector_channels);
    block_sync();  // before the next tile but one is copied over this one
  }
  cp_async_wait<0>();

  // A lane with bits 16, 8 and 4 set was left with the last eighth of a round's sums.
  const int which = lane_id() / 16 * 4 + lane_id() / 8 % 2 * 2 + lane_id() / 4 % 2;
  float* biases = p.partials + p.groups * 3 * p.channels * p.taps;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int k = 0; k < kSums / 8; ++k) {
      const int sum = which * (kSums / 8) + k;
      const int filter = sum / (kTaps + 1), tap = sum % (kTaps + 1);
      const int h = round < kPack ? round : filter, part = round < kPack ? 2 * filter : 1;
      const int64_t channel = first_channel + me.channel() + h;
      if (filter >= 2 || h >= kPack || channel >= p.channels) continue;
      const int64_t column = part * p.channels + channel;
      if (tap < p.taps) {
        store_global(p.partials + (group * 3 * p.channels + column) * p.taps + (p.taps - 1 - tap), totals[round][k]);
      } else if (tap == kTaps && p.bias != nullptr) {
        store_global(biases + group * 3 * p.channels + column, totals[round][k]);
      }
    }
  }
}

}  // namespace warpform
