// packing_plan, pack and unpack.
//
// Floor: bytes. A plan reads the mask twice, the second time from a cache, and writes 4 bytes a place and 16 a packed row;
// pack and unpack copy rows, and write zeros where there is none.
// Measured on one thread of an Intel Skylake-SP beside other work: a plan of 8 x 256 places takes some 5 of the 25
// microseconds of the op, whose six results torch allocates; pack of 1228 rows of 768 float32 moves 7.5 GB/s and unpack
// to 2048 rows 7.3, where a copy of this size reaches 10.
#include "families.h"
#include "rows.h"
#include "threads.h"

namespace warpform::cpu::WARPFORM_CPU_ISA {
namespace {

// Places of a mask that are looked at together.
constexpr int64_t kPlaces = 8;

template <class Element>
WARPFORM_INLINE int64_t count_tokens(const Element* mask, int64_t stride, int64_t count) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < count; ++i) tokens += mask[i * stride] != 0;
  return tokens;
}

// One row of the plan. kStride is the distance of two places, 0 where it is known at run time alone.
template <int kStride, class Element>
WARPFORM_INLINE void plan_row(const PackingPlanParams& p, const Element* mask, int64_t row) {
  const int64_t stride = kStride == 0 ? p.mask_column_stride : kStride;
  int64_t rank = p.cu_seqlens[row];
  const int64_t end = p.cu_seqlens[row + 1];  // no token of the row is kept from here on
  int32_t* const ranks = p.ranks + row * p.seqlen;
  const auto one = [&](int64_t s) {
    const bool kept = mask[s * stride] != 0 && rank < end;
    ranks[s] = kept ? static_cast<int32_t>(rank) : -1;
    // Written where no token is, too, as long as it is a row of this sequence: there a token comes after it.
    if (rank < end) {
      p.indices[rank] = row * p.seqlen + s;
      p.position_ids[rank] = s;
    }
    rank += kept;
  };
  int64_t s = 0;
  // Most masks are runs of tokens and of padding.
  for (; s + kPlaces <= p.seqlen; s += kPlaces) {
    const int64_t tokens = rank < end ? count_tokens(mask + s * stride, stride, kPlaces) : 0;
    if (tokens == 0) {
      for (int64_t i = 0; i < kPlaces; ++i) ranks[s + i] = -1;
    } else if (tokens == kPlaces && rank + kPlaces <= end) {
      for (int64_t i = 0; i < kPlaces; ++i) {
        ranks[s + i] = static_cast<int32_t>(rank + i);
        p.indices[rank + i] = row * p.seqlen + s + i;
        p.position_ids[rank + i] = s + i;
      }
      rank += kPlaces;
    } else {
      for (int64_t i = 0; i < kPlaces; ++i) one(s + i);
    }
  }
  for (; s < p.seqlen; ++s) one(s);
}

template <class Element>
void plan(const PackingPlanParams& p, const Host& host) {
  const auto* const mask = static_cast<const Element*>(p.mask);
  int64_t total = 0, longest = 0;
  p.cu_seqlens[0] = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Element* const row = mask + b * p.mask_stride;
    const int64_t length =
        p.mask_column_stride == 1 ? count_tokens(row, 1, p.seqlen) : count_tokens(row, p.mask_column_stride, p.seqlen);
    total += length;
    longest = larger(longest, length);
    p.cu_seqlens[b + 1] = static_cast<int32_t>(smaller(total, p.capacity));
    p.lengths[b] = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
  }
  p.summary[0] = total;
  p.summary[1] = longest;

  // Items are rows of the mask, then packed rows that hold no token.
  const int64_t kept = smaller(total, p.capacity);
  const int64_t rows_each = larger(1, kItemElements / larger(1, p.seqlen));
  const int64_t of_rows = ceil_div(p.batch, rows_each), of_rest = ceil_div(p.capacity - kept, kItemElements);
  const auto do_item = [&](int64_t item) {
    if (item < of_rows) {
      for (int64_t b = item * rows_each; b < smaller(p.batch, (item + 1) * rows_each); ++b) {
        const Element* const row = mask + b * p.mask_stride;
        p.mask_column_stride == 1 ? plan_row<1>(p, row, b) : plan_row<0>(p, row, b);
      }
      return;
    }
    const int64_t first = kept + (item - of_rows) * kItemElements;
    const int64_t count = smaller(p.capacity - first, kItemElements);
    std::memset(p.indices + first, 0xff, static_cast<size_t>(count) * sizeof(int64_t));
    std::memset(p.position_ids + first, 0, static_cast<size_t>(count) * sizeof(int64_t));
  };
  // A small plan is done before a second thread would have begun.
  if (of_rows <= 1 && of_rest <= 1) {
    for (int64_t item = 0; item < of_rows + of_rest; ++item) do_item(item);
    return;
  }
  over(host, of_rows + of_rest, [&](Items& items) {
    for (int64_t item; items.next(item);) do_item(item);
  });
}

// Runs of neighbours are copied at once: rows may be single numbers.
template <class Index>
void gather(const GatherRowsParams& p, const Host& host) {
  const auto* const index = static_cast<const Index*>(p.index);
  const auto* const in = static_cast<const char*>(p.in);
  auto* const out = static_cast<char*>(p.out);
  const bool dense = p.in_stride == p.row_bytes;
  const int64_t rows_each = larger(1, kItemElements * 4 / (p.row_bytes + 16));
  const auto is_row = [&](int64_t i) { return i >= 0 && i < p.in_rows; };
  over(host, ceil_div(p.out_rows, rows_each), [&](Items& items) {
    for (int64_t item; items.next(item);) {
      const int64_t last = smaller(p.out_rows, (item + 1) * rows_each);
      for (int64_t r = item * rows_each, next; r < last; r = next) {
        const int64_t from = index[r];
        char* const to = out + r * p.row_bytes;
        next = r + 1;
        if (is_row(from)) {
          while (dense && next < last && index[next] == from + next - r && is_row(index[next])) ++next;
          std::memcpy(to, in + from * p.in_stride, static_cast<size_t>((next - r) * p.row_bytes));
        } else {
          while (next < last && !is_row(index[next])) ++next;
          std::memset(to, 0, static_cast<size_t>((next - r) * p.row_bytes));
        }
      }
    }
  });
}

}  // namespace

void packing_plan(const PackingPlanParams& params, const Host& host) {
  switch (params.mask_bytes) {
    case 1: return plan<uint8_t>(params, host);
    case 2: return plan<uint16_t>(params, host);
    case 4: return plan<uint32_t>(params, host);
    default: return plan<uint64_t>(params, host);
  }
}

void gather_rows(const GatherRowsParams& params, const Host& host) {
  if (params.out_rows == 0 || params.row_bytes == 0) return;
  params.index_bytes == 8 ? gather<int64_t>(params, host) : gather<int32_t>(params, host);
}

}  // namespace warpform::cpu::WARPFORM_CPU_ISA
