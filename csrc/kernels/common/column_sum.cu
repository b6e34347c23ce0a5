// Launch of the column sums.
#include "common/column_sum.cuh"

#include "device/launch.cuh"

namespace warpform {

namespace {

// True if four neighbouring columns can be read and written at once.
bool allows_vectors(const ColumnSumParams& p) {
  const uintptr_t out_bytes = kColumnSumVec * (p.dtype == DType::kFloat32 ? 4 : 2);
  bool aligned = p.cols % kColumnSumVec == 0 && reinterpret_cast<uintptr_t>(p.partials) % sizeof(FourSums) == 0;
  for (int i = 0; i < p.sums; ++i) aligned = aligned && reinterpret_cast<uintptr_t>(p.out[i]) % out_bytes == 0;
  return aligned;
}

template <bool kAligned>
void launch_aligned(const char* op, const ColumnSumParams& p, void* stream) {
  const bool whole = adds_whole_columns(p.groups, p.cols);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.cols, int64_t{whole ? kWholeCols : kSplitCols})),
                  static_cast<unsigned>(p.sums));
  if (whole) {
    launch<column_sum_whole<kAligned>>(op, grid, kWholeThreads, 0, stream, p);
  } else {
    launch<column_sum_split<kAligned>>(op, grid, kSplitWarps * kWarpSize, kSplitBytes, stream, p);
  }
}

}  // namespace

void launch_column_sum(const char* op, const ColumnSumParams& p, void* stream) {
  allows_vectors(p) ? launch_aligned<true>(op, p, stream) : launch_aligned<false>(op, p, stream);
}

}  // namespace warpform
