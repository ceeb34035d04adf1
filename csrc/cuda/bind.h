// What the CUDA bindings share: the device and stream of a call, fresh results on it, the launches' errors.
#pragma once

#include <vector>

#include "../bind.h"
#include "runtime.h"

#if !defined(FASTATTN_HOST_TWIN)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fastattn::cuda {

#if defined(FASTATTN_HOST_TWIN)

// The twin runs on CPU tensors.
#define FASTATTN_CUDA_KEY CPU

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
};

#else

#define FASTATTN_CUDA_KEY CUDA

// Makes a tensor's device the current one, and gives the stream that torch works on there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor new_on(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         code, device, like.get_device_index(), &handle));
  return Tensor(handle);
}

// A kernel reads by address: a tensor of another device would be read as garbage.
inline void check_device(const Tensor& like, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
                  "fastattn: ", name, " must be on the same device as the other tensors");
}
inline void check_device(const Tensor& like, const OptionalTensor& t, const char* name) {
  if (t) check_device(like, *t, name);
}

inline void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, "fastattn: ", op, " did not start on the device: ", error_text(error));
}

}  // namespace fastattn::cuda
