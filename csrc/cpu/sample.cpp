// Whether weights that were prepared for a convolution still are what they were: writes through
// .data leave a tensor's version counter alone, values spread over it catch those.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "checks.h"

namespace resfast {
namespace {

constexpr int64_t kSamples = 64;

// Values of a dense weight, in memory order, and all of each per-channel vector.
struct Sampled {
  const Tensor& weight;
  std::initializer_list<const Tensor*> vectors;

  int64_t step() const { return std::max<int64_t>(1, weight.numel() / kSamples); }
  int64_t count() const {
    int64_t total = weight.numel() / step();
    for (const Tensor* v : vectors) total += v ? v->numel() : 0;
    return total;
  }

  // f(bits of a value as float32)
  template <class F>
  void for_each(const F& f) const {
    each_of(weight, weight.numel() / step(), step(), f);
    for (const Tensor* v : vectors) {
      if (v) each_of(*v, v->numel(), 1, f);
    }
  }

  template <class F>
  static void each_of(const Tensor& t, int64_t count, int64_t step, const F& f) {
    if (t.scalar_type() == ScalarType::BFloat16) {
      const auto* p = static_cast<const uint16_t*>(t.const_data_ptr());
      for (int64_t i = 0; i < count; ++i) f(uint32_t{p[i * step]} << 16);
    } else {
      const auto* p = static_cast<const uint32_t*>(t.const_data_ptr());
      for (int64_t i = 0; i < count; ++i) f(p[i * step]);
    }
  }

  bool readable() const {
    const auto fits = [](const Tensor& t) {
      return t.is_cpu() &&
             (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16);
    };
    if (!fits(weight) || !(is_dense_nhwc(weight) || weight.is_contiguous())) return false;
    for (const Tensor* v : vectors) {
      if (v && !(fits(*v) && v->dim() == 1 && v->size(0) == weight.size(0) && v->is_contiguous())) {
        return false;
      }
    }
    return true;
  }
};

const Tensor* given(const OptionalTensor& t) {
  return t ? &*t : nullptr;
}

// Into `sample`, which has one value for each. False, and nothing written, where the tensors are
// not float32 or bfloat16 on the CPU, dense and of matching sizes.
bool take_sample(const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& gamma,
                 const OptionalTensor& beta, const Tensor& mean, const Tensor& var,
                 const Tensor& sample) {
  const Sampled s{weight, {given(bias), given(gamma), given(beta), &mean, &var}};
  if (weight.dim() != 4 || !s.readable()) return false;
  check_cpu(sample, "sample");
  STD_TORCH_CHECK(sample.scalar_type() == ScalarType::Float && sample.is_contiguous() &&
                      sample.numel() >= s.count(),
                  "sample must be contiguous float32 of at least ", s.count(), " values");
  float* to = static_cast<float*>(sample.mutable_data_ptr());
  s.for_each([&](uint32_t bits) { std::memcpy(to++, &bits, sizeof bits); });
  return true;
}

// Bit by bit, so that NaN equals itself.
bool same_sample(const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& gamma,
                 const OptionalTensor& beta, const Tensor& mean, const Tensor& var,
                 const Tensor& sample) {
  const Sampled s{weight, {given(bias), given(gamma), given(beta), &mean, &var}};
  if (weight.dim() != 4 || !s.readable() || sample.numel() < s.count()) return false;
  const float* kept = static_cast<const float*>(sample.const_data_ptr());
  bool same = true;
  s.for_each([&](uint32_t bits) { same &= std::memcmp(&bits, kept++, sizeof bits) == 0; });
  return same;
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("take_sample", TORCH_BOX(&resfast::take_sample));
  m.impl("same_sample", TORCH_BOX(&resfast::same_sample));
}
