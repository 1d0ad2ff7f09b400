// Launching a CUTLASS kernel without its adapters, which swallow what CUDA says went wrong.
#pragma once

#include <cuda_runtime.h>

#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>

#include "cuda/conv.h"

namespace resfast::cuda {

// Tensor maps are made by the driver; CUTLASS asserts that it succeeds and goes on in a release
// build. conv_unsupported() has let through only what it takes: what is left is an old driver.
inline const char* missing_driver_function() {
  for (const char* name : {"cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"}) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 13000
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (found != cudaDriverEntryPointSuccess) return "the driver makes no tensor maps";
  }
  return nullptr;
}

template <class Kernel>
const char* launch_kernel(const typename Kernel::Arguments& arguments, int processors,
                          void* stream) {
  if (!Kernel::can_implement(arguments)) return "CUTLASS does not take this size";
  // no kernel here reduces through memory
  if (Kernel::get_workspace_size(arguments) != 0) return "CUTLASS asks for a workspace";
  if (processors == 0) return nullptr;
  static const char* const missing = missing_driver_function();
  if (missing) return missing;
  const auto parameters = Kernel::to_underlying_arguments(arguments, nullptr);
  constexpr auto kernel = cutlass::device_kernel<Kernel>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           Kernel::SharedStorageSize);
  if (error == cudaSuccess) {
    kernel<<<Kernel::get_grid_shape(parameters), Kernel::get_block_shape(),
             Kernel::SharedStorageSize, static_cast<cudaStream_t>(stream)>>>(parameters);
    error = cudaGetLastError();
  } else {
    cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls `f` with the storage's CUTLASS type and the tile's sizes as types.
template <class F>
const char* by_kernel(Storage storage, const ConvTile& tile, F&& f) {
  const auto by_tile = [&](auto element) -> const char* {
    if (tile.m == 128 && tile.n == 128) return f(element, cute::_128{}, cute::_128{});
    if (tile.m == 128 && tile.n == 64) return f(element, cute::_128{}, cute::_64{});
    if (tile.m == 64 && tile.n == 64) return f(element, cute::_64{}, cute::_64{});
    return "no such tile";
  };
  if (storage == Storage::bf16) return by_tile(cutlass::bfloat16_t{});
  if (storage == Storage::f16) return by_tile(cutlass::half_t{});
  return "float32 has no such kernel";
}

}  // namespace resfast::cuda
