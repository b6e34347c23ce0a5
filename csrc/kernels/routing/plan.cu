#include "routing/plan.cuh"

#include <algorithm>

#include "device/launch.cuh"

namespace warpform {
namespace {

constexpr const char* kOp = "routing_plan";
constexpr int kLeastItems = 1024;

// Tokens a block: kLeastItems, or more where that would need over kSortBlocks blocks.
int64_t items_of(int64_t tokens) {
  const int64_t share = ceil_div(tokens, int64_t{kSortBlocks});
  return std::max<int64_t>(kLeastItems, ceil_div(share, int64_t{kSortThreads}) * kSortThreads);
}

}  // namespace

// The workspace holds two orders of the tokens, read and written in turn, the counts, and the ends of classes.
int64_t routing_plan_workspace(int64_t tokens) {
  if (tokens <= kFewPlanTokens) return 0;
  return 2 * tokens + ceil_div(tokens, items_of(tokens)) * kDigits + kMaxClasses;
}

void launch_routing_plan(const RoutingPlanParams& p, void* stream) {
  if (p.tokens <= kFewPlanTokens) {
    launch<plan_few_tokens>(kOp, dim3(1), kSortThreads, kFewPlanBytes, stream, p);
    return;
  }
  const int64_t items = items_of(p.tokens), blocks = ceil_div(int64_t{p.tokens}, items);
  int32_t* order[2] = {p.workspace, p.workspace + p.tokens};
  int32_t* counts = p.workspace + 2 * int64_t{p.tokens};
  int32_t* class_ends = counts + blocks * kDigits;
  const bool classes = p.token_class != nullptr;
  const int passes = ceil_div(p.num_groups, kDigitBits) + classes;
  SortPass s{.p = p,
             .in = nullptr,
             .out = nullptr,
             .counts = counts,
             .class_ends = class_ends,
             .shift = 0,
             .items = static_cast<int>(items),
             .blocks = static_cast<int>(blocks),
             .by_class = false,
             .last = false};
  const dim3 grid(static_cast<unsigned>(blocks));
  for (int i = 0; i < passes; ++i) {
    s.last = i + 1 == passes;
    s.by_class = classes && s.last;
    s.shift = i * kDigitBits;
    s.out = s.last ? nullptr : order[i % 2];
    launch<count_digits>(kOp, grid, kSortThreads, kSortSharedBytes, stream, s);
    launch<place_tokens>(kOp, grid, kSortThreads, kSortSharedBytes, stream, s);
    s.in = s.out;
  }
  launch<tile_unions>(kOp, dim3(static_cast<unsigned>(p.tiles)), kUnionThreads, kUnionThreads / kWarpSize * 8, stream,
                      TileUnions{p, class_ends});
  launch<decide_dense>(kOp, dim3(1), kSortThreads, 2 * kSortWarps * 8, stream, p);
}

void launch_routing_mask(const RoutingMaskParams& p, void* stream) {
  const int64_t blocks = ceil_div(p.tokens, int64_t{kSortThreads});
  launch<routing_mask>("routing_mask", dim3(static_cast<unsigned>(blocks)), kSortThreads, 0, stream, p);
}

}  // namespace warpform
