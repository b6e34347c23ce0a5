// Makes of a C++ function the two ways into an op: the boxed kernel that torch's dispatcher calls, and the call of the
// table in api.h. Both check and run by the same function.
//
// A function takes Tensor, std::optional<Tensor>, int64_t, double, std::optional<double>, bool, std::string and
// std::vector<int64_t>, in the order of its schema, and returns a Tensor or a tuple of them.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "api.h"
#include "launch.h"

namespace warpform {

// The text that the last call in this thread left: why there is no kernel, or what is wrong.
struct Outcome {
  api::Status status = api::kDone;
  std::string message;
};
inline Outcome& last_outcome() {
  thread_local Outcome outcome;
  return outcome;
}

// What a reference raised in this thread. Torch 2.10 and 2.11 drop the text on the way back into C++, and every torch
// the type, so the reference leaves both here as well (`_keep_error`).
inline Outcome& kept_error() {
  thread_local Outcome error;
  return error;
}
// Throws what `_keep_error` left, if anything.
void throw_kept_error();

// An op without its schema.
struct Body {
  const char* name;
  int results;
  void (*boxed)(StableIValue* stack, uint64_t arguments, uint64_t results);
  api::Status (*call)(const api::Value* arguments, void** results);
};

// A string as a template argument.
template <size_t kSize>
struct OpName {
  char text[kSize];
  consteval OpName(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
};

namespace detail {

template <class Results>
inline constexpr size_t kResultCount = 1;
template <class... Results>
inline constexpr size_t kResultCount<std::tuple<Results...>> = sizeof...(Results);

// ---- through torch ----

template <class T>
struct TorchType {
  using type = T;
};
template <>
struct TorchType<Tensor> {
  using type = torch::stable::Tensor;
};
template <>
struct TorchType<std::optional<Tensor>> {
  using type = std::optional<torch::stable::Tensor>;
};
template <class... T>
struct TorchType<std::tuple<T...>> {
  using type = std::tuple<typename TorchType<T>::type...>;
};
template <class T>
using torch_type = typename TorchType<T>::type;

template <class T>
T from_torch(const torch_type<T>& value) {
  if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
    return value ? std::optional<Tensor>(*value) : std::nullopt;
  } else {
    return T(value);
  }
}

inline torch::stable::Tensor to_torch(const Tensor& t) { return t.as_torch(); }
template <class... T>
auto to_torch(const std::tuple<T...>& results) {
  return std::apply([](const auto&... each) { return std::tuple(each.as_torch()...); }, results);
}

template <class T>
StableIValue box(const T& value) {
  return torch::stable::detail::from(value);
}

// Calls warpform::NAME_reference(reason, arguments...) through the dispatcher: PyTorch code that warns once and names
// the reason. In the emulator there is no way out: a configuration without a kernel is an error there.
template <class Results, class... Arguments>
Results call_reference([[maybe_unused]] const char* name, [[maybe_unused]] const std::string& reason,
                       [[maybe_unused]] const Arguments&... arguments) {
#ifdef WARPFORM_SIMT
  throw std::runtime_error(std::string(name) + ": no kernel: " + reason);
#else
  constexpr size_t kSlots = std::max(1 + sizeof...(arguments), kResultCount<Results>);
  StableIValue stack[kSlots] = {box(reason), box(arguments)...};
  const std::string op = std::string("warpform::") + name + "_reference";
  kept_error() = {};
  const auto code = torch_call_dispatcher(op.c_str(), "", stack, TORCH_ABI_VERSION);
  if (code != 0) throw_kept_error();
  torch_check(code, name);
  if constexpr (std::is_same_v<Results, torch::stable::Tensor>) {
    return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
  } else {
    return [&]<class... R>(std::type_identity<std::tuple<R...>>) {
      return torch::stable::detail::unbox_to_tuple<R...>(stack);
    }(std::type_identity<Results>{});
  }
#endif
}

// Keeps what an exception says for whoever asks (`_last_error`), and throws what torch turns into RuntimeError.
[[noreturn]] void keep_and_throw();

template <OpName kName, auto kFunction>
struct Bound;

template <OpName kName, class Results, class... Arguments, Results (*kFunction)(Arguments...)>
struct Bound<kName, kFunction> {
  static torch_type<Results> run(torch_type<Arguments>... arguments) {
    Outcome& outcome = last_outcome();
    outcome.status = api::kDone;
    try {
      const Results results = kFunction(from_torch<Arguments>(arguments)...);
      if (outcome.status == api::kDone) return to_torch(results);
      const std::string reason = std::exchange(outcome, {}).message;
      return call_reference<torch_type<Results>>(kName.text, reason, arguments...);
    } catch (...) {
      keep_and_throw();
    }
  }

  // ---- from the table ----

  static api::Status call(const api::Value* values, void** results) {
    return call_with(values, results, std::index_sequence_for<Arguments...>{});
  }

 private:
  template <size_t... kIndex>
  static api::Status call_with(const api::Value* values, void** results, std::index_sequence<kIndex...>);
};

template <class T>
T from_value(const api::Value& value) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return Tensor(*value.tensor);
  } else if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
    return value.kind == api::Value::kNone ? std::nullopt : std::optional<Tensor>(Tensor(*value.tensor));
  } else if constexpr (std::is_same_v<T, std::optional<double>>) {
    return value.kind == api::Value::kNone ? std::nullopt : std::optional<double>(value.number);
  } else if constexpr (std::is_same_v<T, double>) {
    return value.number;
  } else if constexpr (std::is_same_v<T, bool>) {
    return value.integer != 0;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return value.integer;
  } else if constexpr (std::is_same_v<T, std::vector<int64_t>>) {
    return T(value.integers, value.integers + value.count);
  } else {
    static_assert(std::is_same_v<T, std::string>);
    return value.text;
  }
}

// A handle of the tensor that whoever takes it owns.
void* release(const Tensor& t);

// The status of the exception that is being handled, its text in last_outcome().
api::Status status_of_exception() noexcept;

template <OpName kName, class Results, class... Arguments, Results (*kFunction)(Arguments...)>
template <size_t... kIndex>
api::Status Bound<kName, kFunction>::call_with(const api::Value* values, void** handles,
                                               std::index_sequence<kIndex...>) {
  Outcome& outcome = last_outcome();
  outcome.status = api::kDone;
  try {
    const Results results = kFunction(from_value<Arguments>(values[kIndex])...);
    if (outcome.status != api::kDone) return outcome.status;
    if constexpr (std::is_same_v<Results, Tensor>) {
      handles[0] = release(results);
    } else {
      std::apply([&](const auto&... each) { (..., (*handles++ = release(each))); }, results);
    }
    return api::kDone;
  } catch (...) {
    return status_of_exception();
  }
}

template <class Results, class... Arguments>
constexpr int result_count(Results (*)(Arguments...)) {
  return kResultCount<Results>;
}

}  // namespace detail

// The op of a function.
template <OpName kName, auto kFunction>
constexpr Body body() {
  using Bound = detail::Bound<kName, kFunction>;
  return {kName.text, detail::result_count(kFunction), TORCH_BOX(&Bound::run), &Bound::call};
}

// The ops of each file. ops.cpp gives them their schemas.
std::span<const Body> attention_ops();
std::span<const Body> attention_step_ops();
std::span<const Body> disentangled_attention_ops();
std::span<const Body> packing_ops();
std::span<const Body> norm_ops();
std::span<const Body> activation_ops();
std::span<const Body> window_ops();
std::span<const Body> monarch_ops();
std::span<const Body> fft_conv_ops();
std::span<const Body> short_conv_ops();
std::span<const Body> spatial_ops();
std::span<const Body> routing_ops();

}  // namespace warpform
