// Choices at run time that become template arguments, for the launch functions on the host. A choice is a call of a
// lambda with a template parameter, as in
//
//   dispatch_dtype(p.dtype, [&]<class T>() { launch<kernel<T>>(...); });
#pragma once

#include <utility>

#include "common/dtype.h"
#include "device/types.cuh"

namespace warpform {

// Calls f<T>() with the 16-bit element type T, of kernels that take no other.
template <class F>
decltype(auto) dispatch_half(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) return f.template operator()<bf16_t>();
  return f.template operator()<half_t>();
}

// Calls f<T>() with the element type T.
template <class F>
decltype(auto) dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16: return f.template operator()<half_t>();
    case DType::kBFloat16: return f.template operator()<bf16_t>();
    default: return f.template operator()<float>();
  }
}

// Calls f<kFlag>().
template <class F>
decltype(auto) dispatch_bool(bool flag, F&& f) {
  if (flag) return f.template operator()<true>();
  return f.template operator()<false>();
}

// Calls f<kBucket>() with the first of the increasing buckets that holds `size`, or with the last one.
template <int kBucket, int... kLarger, class F>
decltype(auto) dispatch_bucket(int size, F&& f) {
  if constexpr (sizeof...(kLarger) > 0) {
    if (size > kBucket) return dispatch_bucket<kLarger...>(size, std::forward<F>(f));
  }
  return f.template operator()<kBucket>();
}

}  // namespace warpform
