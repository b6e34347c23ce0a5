#include "binding.h"

namespace warpform {

UseReference::UseReference(std::string reason) {
  Outcome& outcome = last_outcome();
  outcome.status = api::kNoKernel;
  outcome.message = std::move(reason);
}

void throw_kept_error() {
  const Outcome error = std::exchange(kept_error(), {});
  switch (error.status) {
    case api::kDone: return;
    case api::kTypeError: throw TypeError(error.message);
    case api::kValueError: throw ValueError(error.message);
    default: throw std::runtime_error(error.message);
  }
}

namespace detail {

api::Status status_of_exception() noexcept {
  Outcome& outcome = last_outcome();
  try {
    throw;
  } catch (const TypeError& error) {
    outcome = {api::kTypeError, error.what()};
  } catch (const ValueError& error) {
    outcome = {api::kValueError, error.what()};
  } catch (const std::exception& error) {
    outcome = {api::kRuntimeError, error.what()};
  } catch (...) {
    outcome = {api::kRuntimeError, "warpform: an exception without a text"};
  }
  return outcome.status;
}

void keep_and_throw() {
  status_of_exception();
  // Torch has no exception of the stable ABI for the other two.
  throw std::runtime_error(last_outcome().message);
}

void* release(const Tensor& t) {
  AtenTensorHandle handle = nullptr;
  torch_check(aoti_torch_new_tensor_handle(t.as_torch().get(), &handle), "warpform");
  return handle;
}

}  // namespace detail
}  // namespace warpform
