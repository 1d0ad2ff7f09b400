// What the norm ops' entry points share: the choice of kernels, scratch memory, merged outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/norm_kernels.h"

namespace resfast {

inline const NormKernels& norm_kernels() {
  return RESFAST_PICK(norm_kernels);
}

inline Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    case ScalarType::Double:
      return Storage::f64;
    default:
      return Storage::f32;
  }
}

// f(first channel, last channel), in parallel where `values` per channel make the merge long
template <class F>
void for_each_channel_range(int64_t channels, int64_t values, const F& f) {
  constexpr int64_t kBlock = 64;
  constexpr int64_t kGrain = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, kGrain / ((values + 1) * kBlock));
  torch::stable::parallel_for(
      0, ceil_div(channels, kBlock), grain,
      [&](int64_t begin, int64_t end) { f(begin * kBlock, std::min(end * kBlock, channels)); });
}

inline void put(const Tensor& out, const std::vector<double>& values, int64_t begin, int64_t end) {
  if (out.element_size() == 8) {
    double* p = static_cast<double*>(out.mutable_data_ptr());
    for (int64_t c = begin; c < end; ++c) p[c] = values[c];
  } else {
    float* p = static_cast<float*>(out.mutable_data_ptr());
    for (int64_t c = begin; c < end; ++c) p[c] = static_cast<float>(values[c]);
  }
}

inline void scale_by(std::vector<double>& values, const Tensor& factor, int64_t begin,
                     int64_t end) {
  if (factor.element_size() == 8) {
    const double* p = static_cast<const double*>(factor.const_data_ptr());
    for (int64_t c = begin; c < end; ++c) values[c] *= p[c];
  } else {
    const float* p = static_cast<const float*>(factor.const_data_ptr());
    for (int64_t c = begin; c < end; ++c) values[c] *= p[c];
  }
}

}  // namespace resfast
