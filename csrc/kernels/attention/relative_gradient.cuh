// The gradient of scores gathered by relative position, summed without atomics: the warp that owns a row of a table
// visits all pairs of that row in order, so pairs of the same column follow each other, and every column that occurs is
// stored once, from a float32 sum. Columns that do not occur are left as they are.
//
// A tile of dS (16 rows a warp) lies in shared memory; 32 lanes take 32 pairs of a row at a time and add up neighbours
// of one column, which is nothing where every distance has its own. The run that reaches the last lane stays open for
// the pairs that follow. It is kept in shared memory, because there are no registers to spare.
#pragma once

#include "attention/score_mods.cuh"
#include "device/mma.cuh"

namespace warpform {

// The sum so far of the last run of a row, and its column; column -1 before the first run.
struct alignas(8) OpenRun {
  int column = -1;
  float sum = 0.f;
};

template <class T>
struct RelativeGradient {
  // Adds dS, packed, of the tokens from `row_token` on against the 64 from `col_token` on; the warp's rows begin at
  // `row` of the score's tile. to: [heads, tokens, width], or null.
  template <Side kSide, class ScoreMod, int kSteps>
  __device__ __forceinline__ static void add(const ScoreMod& score, void* to, const uint32_t (&ds)[kSteps][4], int row,
                                             int row_token, int col_token) {
    if (to == nullptr) return;
    const auto tile = score.row_terms();
    static_assert(16 * kSteps == tile.kCols, "all pairs of the tile");
    const int lane = static_cast<int>(opaque(static_cast<uint32_t>(lane_id())));
    // The kernel that owns keys has no register to keep this in.
    const int first_row_token =
        kSide == Side::kKeys ? static_cast<int>(opaque(static_cast<uint32_t>(row_token))) : row_token;
    const int rows = min(score.last + 1 - first_row_token, 16);
    warp_sync();  // all lanes have read the gathered terms, so their place may be overwritten
    store_packed(tile, row, ds);
    warp_sync();
#pragma unroll 1
    for (int first = 0; first < tile.kCols; first += kWarpSize) {
      warp_sync();  // open runs have been stored
      const int col = first + lane;
      // Past the sequence dS is zero, and the last token's place adds that to the last run.
      const int place = score.place(col_token + col);
#pragma unroll 1
      for (int r = 0; r < rows; ++r) {
        const int column = score.template column<kSide>(score.place(row_token + r), place);
        float sum = to_float(load_shared<T>(tile.chunk(row + r, col / kChunk) + col % kChunk * 2));
        if (lane == 0) {
          const auto open = load_shared<OpenRun>(score.open_run(row + r));
          if (open.column == column) {
            sum += open.sum;
          } else {
            store(score, to, row_token + r, open);
          }
        }
        warp_sync();  // the last lane writes where the first has read
        // Sums of the lanes up to each that have its column; after the last step no run is longer than what is summed.
#pragma unroll 1
        for (int offset = 1; offset < kWarpSize; offset *= 2) {
          const int before = shuffle_up(column, offset);
          const float part = shuffle_up(sum, offset);
          const bool same = lane >= offset && before == column;
          if (ballot(same) == 0) break;
          if (same) sum += part;
        }
        const int next = shuffle_down(column, 1);
        if (lane == kWarpSize - 1) {
          store_shared(score.open_run(row + r), OpenRun{column, sum});
        } else if (next != column) {
          store(score, to, row_token + r, OpenRun{column, sum});
        }
      }
    }
  }

  // Stores what is still open of the tokens from `row_token` on.
  template <class ScoreMod>
  __device__ __forceinline__ static void finish(const ScoreMod& score, void* to, int row, int row_token) {
    if (to == nullptr) return;
    warp_sync();
    if (lane_id() < 16) store(score, to, row_token + lane_id(), load_shared<OpenRun>(score.open_run(row + lane_id())));
  }

 private:
  template <class ScoreMod>
  __device__ __forceinline__ static void store(const ScoreMod& score, void* to, int token, OpenRun run) {
    if (run.column < 0) return;
    store_global(static_cast<T*>(to) + score.row(token) * score.p.relative.width + run.column,
                 from_float<T>(run.sum * score.p.softmax_scale));
  }
};

}  // namespace warpform
