// From an op's tensors to a launch: device and stream, pointers, scratch memory.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

#include "checks.h"
#include "cuda/device.h"
#include "cuda/norm.h"

namespace resfast {

// The stream torch works on. Its function is in libtorch_cuda, which a CPU build of torch lacks:
// looked up at the first launch, when there is a CUDA tensor and so that library.
inline void* current_stream(int device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  STD_TORCH_CHECK(function, "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "torch has no current stream on device ", device);
  return stream;
}

inline void check_cuda(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be a CUDA tensor");
}

inline bool is_aligned(std::initializer_list<Argument> activations) {
  for (const Argument& a : activations) {
    if (a.tensor && reinterpret_cast<uintptr_t>(a.tensor->const_data_ptr()) % 16) return false;
  }
  return true;
}

inline cuda::Storage storage_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float      ? cuda::Storage::f32
         : t.scalar_type() == ScalarType::BFloat16 ? cuda::Storage::bf16
                                                   : cuda::Storage::f16;
}

// The activation's sizes, and the device for as long as the op runs.
struct Call {
  const char* op;
  int64_t m, c;
  int64_t element_size;
  int device;
  cuda::CurrentDevice guard;
  cuda::Launch launch;

  Call(const char* name, const Tensor& z)
      : op(name),
        m(z.size(0) * z.size(2) * z.size(3)),
        c(z.size(1)),
        element_size(static_cast<int64_t>(z.element_size())),
        device(z.get_device_index()),
        guard(device),
        launch{storage_of(z), current_stream(device)} {}

  void check(const char* error) const {
    STD_TORCH_CHECK(!error, op, ": CUDA kernel launch failed: ", error);
  }
  int processors() const { return cuda::processor_count(device); }
};

inline Tensor float_scratch(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, ScalarType::Float);
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

template <class T>
T* pointer(const OptionalTensor& t) {
  return t ? pointer<T>(*t) : nullptr;
}

inline cuda::Affine affine_of(const OptionalTensor& mean, const OptionalTensor& scale,
                              const OptionalTensor& beta) {
  return {pointer<float>(mean), pointer<float>(scale), pointer<float>(beta)};
}

}  // namespace resfast
