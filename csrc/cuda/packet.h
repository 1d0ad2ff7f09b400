// What one thread holds of an activation: consecutive channels, stored in 16 or 32 bits, computed
// in float; and the formulas whose rounding both passes must share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "math.h"

namespace resfast::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float widen(Half value) {
  return __half2float(__ushort_as_half(value.bits));
}

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ __forceinline__ Half narrow<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// Loaded and stored whole: one or two 16-byte accesses where there are 8 lanes.
template <class T, int kLanes>
struct alignas(kLanes * sizeof(T) < 16 ? kLanes * sizeof(T) : 16) Packet {
  T lane[kLanes];
};

template <class T, int kLanes>
__device__ __forceinline__ Packet<T, kLanes> load(const void* base, int64_t element) {
  return *reinterpret_cast<const Packet<T, kLanes>*>(static_cast<const T*>(base) + element);
}

template <class T, int kLanes>
__device__ __forceinline__ void store(void* base, int64_t element, const Packet<T, kLanes>& value) {
  *reinterpret_cast<Packet<T, kLanes>*>(static_cast<T*>(base) + element) = value;
}

// A per-channel vector's values; `other` where there is no vector or no channel.
template <int kLanes>
struct Channels {
  float lane[kLanes];

  __device__ __forceinline__ Channels(const float* vector, int64_t channel, bool exists,
                                      float other = 0) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) lane[i] = vector && exists ? vector[channel + i] : other;
  }
  __device__ __forceinline__ float operator[](int i) const { return lane[i]; }
};

// The forward pass and the mask that backward recomputes must round alike: one fused operation.
__device__ __forceinline__ float normalise(float z, float mean, float scale, float beta) {
  return fmaf(z - mean, scale, beta);
}

__device__ __forceinline__ float reciprocal_std(float var, float eps) {
  return 1.0f / sqrtf(var + eps);
}

// What ReLU's backward lets through, as a bit of a mask; NaN passes.
__device__ __forceinline__ bool passed(float y) {
  return !(y <= 0);
}

}  // namespace resfast::cuda
