// The formulas of every norm kernel, one element at a time, host and device. `V` is a scalar or a
// vector of the accumulation type; comparisons are written so that NaN passes through.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RESFAST_HD __host__ __device__ __forceinline__
#else
// Always inlined: no copy compiled for one instruction set may be linked into code for another.
#define RESFAST_HD inline __attribute__((always_inline))
#endif

namespace resfast {

// Subtracting first makes a constant channel exactly beta, at any magnitude.
template <class V>
RESFAST_HD V affine(V z, V mean, V scale, V beta) {
  return (z - mean) * scale + beta;
}

template <class V>
RESFAST_HD V relu(V u) {
  return u <= V{} ? V{} : u;
}

// `value` is the input or the output of the ReLU: both have the same sign.
template <class V>
RESFAST_HD V relu_backward(V grad, V value) {
  return value <= V{} ? V{} : grad;
}

// Chan's rule: (mean, m2) of `count` values takes in (mean_b, m2_b) of `count_b` more.
// weight = count_b / (count + count_b).
template <class V>
RESFAST_HD void merge_moments(V& mean, V& m2, V count, V mean_b, V m2_b, V weight) {
  const V delta = mean_b - mean;
  mean += delta * weight;
  m2 += m2_b + delta * delta * (count * weight);
}

}  // namespace resfast
