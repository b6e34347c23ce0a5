// Launches of window mixing, forward.
#include "device/dispatch.cuh"
#include "device/launch.cuh"
#include "window_mix/product.cuh"
#include "window_mix/statistics.cuh"

namespace warpform {

const char* window_mix_unsupported(const WindowMixProblem& p) {
  const bool wide = p.dtype == DType::kFloat32;
  const int64_t bytes =
      wide ? mix_shared_bytes<float>(p.window[0] * p.window[1]) : mix_shared_bytes<half_t>(p.window[0] * p.window[1]);
  return bytes > shared_memory_limit() ? "the window needs more shared memory a block than this GPU has" : nullptr;
}

void launch_window_mix(const WindowMixParams& params, void* stream) {
  constexpr const char* kOp = "window_mix";
  const WindowMixProblem& p = params.problem;
  dispatch_dtype(p.dtype, [&]<class T>() {
    if (p.norm_weight != nullptr && !p.whole_tokens) {
      const int64_t blocks = ceil_div(p.batch * p.image_tokens, int64_t{kMixStatisticsRows});
      launch<window_mix_statistics<T>>(kOp, static_cast<unsigned>(blocks), kMixThreads, 0, stream, p);
    }
    launch<window_mix_forward<T>>(kOp, static_cast<unsigned>(p.tiles), kMixThreads,
                                  static_cast<int>(mix_shared_bytes<T>(p.tokens)), stream, params,
                                  mix_tile_shape<T>(p.tokens));
  });
}

}  // namespace warpform
