// From products q.k to exponents of 2: the scale or the cosine's norms, the relative position bias, the shift's mask.
//
// The bias of a pair is one load from shared memory: a window's tokens are numbered along its axes, so the entry for
// tokens i and j is place(i) - place(j) + centre. The head's column of the table is copied there once a CTA, in base 2.
#pragma once

#include <type_traits>

#include "device/softmax.cuh"
#include "window/windows.cuh"

namespace warpform {

constexpr float kMaxLogitScale = 4.605170185988092f;  // ln 100

// Shared memory beside the tiles, for every kernel of the family: facts about the tokens, of each team the inverse
// norms of kBlock rows of queries and of keys, where the rows of one window or more are, and the bias columns of the
// heads.
struct WindowShared {
  Tokens tokens;
  uint32_t norms;
  uint32_t first_rows;
  uint32_t bias;

  __host__ __device__ static constexpr int capacity(const WindowProblem& p) { return p.blocks.divisor * kBlock; }
  __host__ __device__ static constexpr int bytes(const WindowProblem& p, int teams, int windows = 1) {
    const int bias = p.table != nullptr ? teams * p.table_entries * 4 : 0;
    const int rows = windows * capacity(p) * 4;
    return ceil_div(Tokens::bytes(capacity(p)) + teams * 2 * kBlock * 4 + rows + bias, 16) * 16;
  }
  __device__ WindowShared(const WindowProblem& p, uint32_t base, int teams, int windows = 1)
      : tokens{base, capacity(p)},
        norms(base + Tokens::bytes(capacity(p))),
        first_rows(norms + teams * 2 * kBlock * 4),
        bias(first_rows + windows * capacity(p) * 4) {}

  // Rows of one of the windows.
  __device__ __forceinline__ Rows rows(int window = 0) const { return {first_rows + window * tokens.capacity * 4}; }

  // Fills the facts that hold for every window: places and bias. All threads call it; a barrier must follow.
  template <int kBucket>
  __device__ __forceinline__ void set(const WindowProblem& p, int first_head) const {
    constexpr int kThreads = window_threads(kBucket), kTeams = window_teams(kBucket);
    tokens.set<kThreads>(p);
    if (p.table == nullptr) return;
#pragma unroll
    for (int team = 0; team < kTeams; ++team) {
      if (first_head + team >= p.heads) break;
      for (int i = static_cast<int>(threadIdx.x); i < p.table_entries; i += kThreads) {
        const float b = load_scalar(p.table, p.table_dtype, static_cast<int64_t>(i) * p.heads + first_head + team);
        store_shared(bias + (team * p.table_entries + i) * 4, b * kLog2e);
      }
    }
  }
};

// The largest power of 2 that is at most x, a positive number.
__device__ __forceinline__ float power_of_two_below(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  bits &= 0x7f800000u;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// 1 / norm of the rows of two tiles, kBlock rows each, in the columns of this team's head; 0 for rows of norm at most
// 1e-12, whose cosines and gradients are then 0. All threads of the team; a barrier must follow.
//
// Rows of a tile to lengthen are first multiplied by the power of 2 that makes them 1/2 to 1 long, if they are shorter,
// which rounds nothing; the inverse norm is that of the row as it is then. A gradient of scores times it stays as large
// as the gradient, where times 1 / norm of a very short row it would overflow float16 (bfloat16 cannot, and is left
// alone). `original_norms`, if not 0, is where the inverse norms of the unscaled rows are stored.
template <int kBucket, class T, int kCols>
__device__ __forceinline__ void set_inverse_norms(const WindowShared& shared, SharedTile<kCols> queries,
                                                  SharedTile<kCols> keys, bool lengthen_queries = false,
                                                  bool lengthen_keys = false, uint32_t original_norms = 0) {
  const int thread = WindowTile<kBucket>::thread(), team = thread / kTeamThreads, index = thread % kTeamThreads;
  const int row = index % kBlock;
  const SharedTile<kCols> tile = index < kBlock ? queries : keys;
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < kBucket / kChunk; ++c) {
    const auto chunk = load_shared<Vec<T, kChunk>>(tile.chunk(row, team * (kBucket / kChunk) + c));
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += to_float(chunk[i]) * to_float(chunk[i]);
  }
  float inverse = sum > 1e-24f ? rsqrt_approx(sum) : 0.f;
  if (original_norms != 0) store_shared(original_norms + thread * 4, inverse);
  if constexpr (std::is_same_v<T, half_t>) {
    if (inverse > 1.f && (index < kBlock ? lengthen_queries : lengthen_keys)) {
      const float power = power_of_two_below(inverse);
#pragma unroll 1
      for (int c = 0; c < kBucket / kChunk; ++c) {
        const uint32_t at = tile.chunk(row, team * (kBucket / kChunk) + c);
        auto chunk = load_shared<Vec<T, kChunk>>(at);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) chunk[i] = from_float<T>(to_float(chunk[i]) * power);
        store_shared(at, chunk);
      }
      inverse /= power;
    }
  }
  store_shared(shared.norms + thread * 4, inverse);
}

// The scores of one head.
template <int kBucket>
struct WindowScore {
  WindowShared shared;
  uint32_t bias;  // address of the entry of a token with itself; 0 if there is no table
  float factor;   // of a product; where `cosine`, of a cosine
  float mask;
  bool cosine;

  __device__ WindowScore(const WindowProblem& p, const WindowShared& shared_)
      : shared(shared_),
        bias(p.table == nullptr
                 ? 0
                 : shared.bias + (WindowTile<kBucket>::team() * p.table_entries + p.table_entries / 2) * 4),
        factor(p.scale * kLog2e),
        mask(p.mask_value * kLog2e),
        cosine(p.logit_scale != nullptr) {
    if (cosine) {
      const int head = WindowTile<kBucket>::head();
      const float logit = head < p.heads ? load_scalar(p.logit_scale, p.logit_scale_dtype, head) : 0.f;
      factor = exp2_approx(fminf(logit, kMaxLogitScale) * kLog2e) * kLog2e;
    }
  }

  // Addresses of the inverse norms of the team's tiles.
  __device__ __forceinline__ uint32_t query_norms() const {
    return shared.norms + WindowTile<kBucket>::team() * 2 * kBlock * 4;
  }
  __device__ __forceinline__ uint32_t key_norms() const { return query_norms() + kBlock * 4; }

  // d score / d of what `factor` multiplies.
  __device__ __forceinline__ float gradient_factor() const { return factor * kLn2; }

  // The accumulators of 16 rows x 8 kN columns of products become exponents, with queries or keys as rows. `row` and
  // `col` are the first tokens, `row_in_tile` is row's place in its tile; columns begin theirs.
  template <int kN>
  __device__ __forceinline__ void query_rows(float (&s)[kN][4], const Window& window, int row, int row_in_tile,
                                             int col) const {
    exponents<false>(s, window, row, row_in_tile, col);
  }
  template <int kN>
  __device__ __forceinline__ void key_rows(float (&s)[kN][4], const Window& window, int row, int row_in_tile,
                                           int col) const {
    exponents<true>(s, window, row, row_in_tile, col);
  }

 private:
  template <bool kKeyRows, int kN>
  __device__ __forceinline__ void exponents(float (&s)[kN][4], const Window& window, int row, int row_in_tile,
                                            int col) const {
    const int lane = opaque_lane(), g = lane / 4, t = lane % 4;
    const Tokens& tokens = shared.tokens;
    float row_factor[2] = {factor, factor};
    if (cosine) {
      const uint32_t rows = (kKeyRows ? key_norms() : query_norms()) + (row_in_tile + g) * 4;
      const uint32_t cols = (kKeyRows ? query_norms() : key_norms()) + 2 * t * 4;
      row_factor[0] *= load_shared<float>(rows);
      row_factor[1] *= load_shared<float>(rows + 8 * 4);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const auto norms = load_shared<Vec<float, 2>>(cols + 8 * n * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= norms[e % 2];
      }
    }
    if (bias != 0) {
      const int rows[2] = {load_shared<int>(tokens.place(row + g)), load_shared<int>(tokens.place(row + g + 8))};
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        // Half of the loads at a time: all at once would be more registers than any other part of a kernel needs.
        if (n == kN / 2) warp_sync();
        const auto cols = load_shared<Vec<int, 2>>(tokens.place(col + 8 * n + 2 * t));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int apart = kKeyRows ? cols[e % 2] - rows[e / 2] : rows[e / 2] - cols[e % 2];
          s[n][e] = fmaf(s[n][e], row_factor[e / 2], load_shared<float>(bias + apart));
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= row_factor[e / 2];
      }
    }
    if (window.cut != 0) {
      const int rows[2] = {load_shared<int>(tokens.regions(row + g)), load_shared<int>(tokens.regions(row + g + 8))};
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const auto cols = load_shared<Vec<int, 2>>(tokens.regions(col + 8 * n + 2 * t));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (((rows[e / 2] ^ cols[e % 2]) & window.cut) != 0) s[n][e] += mask;
        }
      }
    }
  }
};

// -inf in columns past the window's last token; `col` is the first.
template <int kN>
__device__ __forceinline__ void hide_columns(float (&s)[kN][4], int col, int tokens) {
  if (col + 8 * kN <= tokens) return;
  col += opaque_lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (col + 8 * n + e % 2 >= tokens) s[n][e] = negative_infinity();
    }
  }
}

}  // namespace warpform
