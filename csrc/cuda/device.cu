// What this library was built for, and whether a device can run it. CUDA's runtime is linked in
// and finds the driver at the first call: loading the library needs neither GPU nor driver.
#include "cuda/device.h"

#include <cuda_runtime.h>

#include <string>

namespace resfast::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

CurrentDevice::CurrentDevice(int device) {
  int current = device;
  if (cudaGetDevice(&current) != cudaSuccess || current == device) return;
  if (cudaSetDevice(device) == cudaSuccess) before_ = current;
}

CurrentDevice::~CurrentDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

int processor_count(int device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess && count > 0 ? count : 1;
}

}  // namespace resfast::cuda

#define RESFAST_EXPORT extern "C" __attribute__((visibility("default")))

RESFAST_EXPORT const char* resfast_cuda_build_info() {
  return "{\"nvcc\": \"" RESFAST_NVCC_VERSION "\", \"architectures\": \"" RESFAST_CUDA_ARCHS
         "\", \"cutlass\": {\"" RESFAST_CUTLASS_KEY "\": \"" RESFAST_CUTLASS_VALUE "\"}}";
}

// Why the kernels do not run on a device, or null; valid until the thread's next call.
RESFAST_EXPORT const char* resfast_cuda_unusable(int device) {
  thread_local std::string reason;
  const resfast::cuda::CurrentDevice guard(device);
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(
      &attributes, reinterpret_cast<const void*>(resfast::cuda::probe_kernel));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  reason = cudaGetErrorString(error);
  return reason.c_str();
}
