#include "monarch/transpose_rows.cuh"

#include <algorithm>
#include <climits>

#include "device/launch.cuh"

namespace warpform {

void launch_transpose_rows(const char* op, const TransposeRowsParams& params, void* stream) {
  if (params.rows == 0 || params.outer == 0 || params.inner == 0) return;
  TransposeRowsWork work{.p = params, .lines = 0, .parts = {}, .by_inner = {}};
  const int line_bytes = 2 * transpose_pitch(params.inner);
  work.lines = std::min(params.outer, std::max(2, kTransposeBytes / line_bytes / 2 * 2));
  const int parts = ceil_div(params.outer, work.lines);
  if (params.rows * parts > INT_MAX) fail(op, "too many tokens");
  work.parts.set(parts);
  work.by_inner.set(params.inner);
  launch<transpose_rows>(op, dim3(static_cast<unsigned>(params.rows * parts)), kTransposeThreads,
                         work.lines * line_bytes, stream, work);
}

}  // namespace warpform
