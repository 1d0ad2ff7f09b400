// What the threads of a block share: their places in the activation, sums over their rows, launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/norm.h"
#include "cuda/packet.h"

namespace resfast::cuda {
namespace {

// Threads x hold consecutive channels, threads y consecutive pixels.
template <int kLanes>
struct Place {
  int64_t channel;  // the thread's first
  bool exists;      // whether the activation has it
  int64_t first;    // pixel of the tile
  int64_t rows;     // pixels in the tile

  __device__ __forceinline__ Place(int64_t m, int64_t c, int64_t tile_rows)
      : channel((static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kLanes),
        exists(channel < c),
        first(blockIdx.y * tile_rows),
        rows(m - first < tile_rows ? m - first : tile_rows) {}
};

// Each lane's sum over the block's threads of the same x, in an order that depends on the block's
// shape alone; all of them get it. `scratch`: threads * kLanes values.
template <class Acc, int kLanes>
__device__ __forceinline__ void sum_over_rows(Acc (&value)[kLanes], Acc* scratch) {
  constexpr int kFanIn = 8;
  const int columns = static_cast<int>(blockDim.x) * kLanes;
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int rows = static_cast<int>(blockDim.y);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) scratch[thread * kLanes + i] = value[i];
  __syncthreads();
  for (int step = 1; step < rows; step *= kFanIn) {
    // Of every kFanIn rows that are left, the first takes in the others.
    const int groups = (rows + step * kFanIn - 1) / (step * kFanIn);
    for (int item = thread; item < groups * columns; item += threads) {
      const int row = item / columns * step * kFanIn;
      const int column = item % columns;
      Acc sum = scratch[row * columns + column];
      for (int k = 1; k < kFanIn && row + k * step < rows; ++k) {
        sum += scratch[(row + k * step) * columns + column];
      }
      scratch[row * columns + column] = sum;
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kLanes; ++i) value[i] = scratch[threadIdx.x * kLanes + i];
  __syncthreads();  // the scratch is used again
}

// du of one value behind the ReLU: u and y are what entered and left it, `bit` says what passed.
__device__ __forceinline__ float behind_relu(float du, Mask mask, float u, float y, bool bit) {
  switch (mask) {
    case Mask::recompute:
      return relu_backward(du, u);
    case Mask::from_y:
      return relu_backward(du, y);
    case Mask::from_bits:
      return bit ? du : 0.0f;
    default:
      return du;
  }
}

// Bit i says what passed in the thread's lane i.
template <int kLanes>
__device__ __forceinline__ unsigned mask_bits(const uint8_t* bits, int64_t pixel, int64_t c,
                                              int64_t channel) {
  return bits[pixel * (c / 8) + channel / 8] >> (kLanes == 1 ? channel % 8 : 0);
}

// Packets of a thread in a block that holds all its pixels.
template <class T, int kLanes>
constexpr int kHeldPackets =
    static_cast<int>(kHeldPixels * kHeldBytes / sizeof(T) / kLanes / kHeldThreads);

// ---- host

inline dim3 grid_of(const Tiling& t) {
  return dim3(static_cast<unsigned>(t.blocks_c), static_cast<unsigned>(t.tiles));
}

inline dim3 block_of(const Tiling& t) {
  return dim3(static_cast<unsigned>(t.threads_c), static_cast<unsigned>(t.threads_m));
}

inline size_t scratch_bytes(const Tiling& t) {
  return sizeof(float) * t.threads_c * t.threads_m * t.lanes;
}

template <class Arguments>
const char* run(void (*kernel)(Arguments), dim3 grid, dim3 block, size_t shared, void* stream,
                const Arguments& arguments) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  const cudaError_t error =
      cudaLaunchKernel(kernel, grid, block, pointers, shared, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: not to be found again by who asks next
  return cudaGetErrorString(error);
}

template <class T, int kLanesOfThread>
struct Form {
  using Element = T;
  static constexpr int kLanes = kLanesOfThread;
};

// f(Form) of the storage type and the lanes of a launch
template <class F>
const char* by_form(Storage storage, int lanes, const F& f) {
  const bool wide = lanes == kWide;
  switch (storage) {
    case Storage::bf16:
      return wide ? f(Form<BFloat16, kWide>{}) : f(Form<BFloat16, 1>{});
    case Storage::f16:
      return wide ? f(Form<Half, kWide>{}) : f(Form<Half, 1>{});
    default:
      return wide ? f(Form<float, kWide>{}) : f(Form<float, 1>{});
  }
}

}  // namespace
}  // namespace resfast::cuda
