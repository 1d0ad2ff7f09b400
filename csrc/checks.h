// Argument checks of the native ops: all of them before the first write, each naming the argument
// and what was received.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace resfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + "]";
}

inline std::string strides_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.stride(d));
  return s + "]";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Dense NHWC memory under NCHW sizes. The stride of a dimension of size 1 addresses nothing.
inline bool is_dense_nhwc(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline void check_cpu(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
}

inline void check_float(const Tensor& t, const char* name) {
  check_cpu(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32, got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_nhwc(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(is_dense_nhwc(t), name, " must be dense channels_last memory, got shape ",
                  shape_of(t), " with strides ", strides_of(t));
}

// An activation that sets shape, dtype and device for the others.
inline void check_activation_form(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must be 4-D [N, C, H, W], got shape ", shape_of(t));
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half || dtype == ScalarType::Double,
                  name, " must be float32, bfloat16, float16 or float64, got ",
                  torch::headeronly::toString(dtype));
  check_nhwc(t, name);
}

inline void check_activation(const Tensor& t, const char* name) {
  check_cpu(t, name);
  check_activation_form(t, name);
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(t.is_cuda() == other.is_cuda() && t.is_cpu() == other.is_cpu() &&
                      t.get_device_index() == other.get_device_index(),
                  name, " must be on the device of the other tensors");
}

inline void check_activation_like(const Tensor& t, const char* name, const Tensor& other,
                                  const char* other_name) {
  check_same_device(t, name, other);
  STD_TORCH_CHECK(same_shape(t, other), name, " must have the shape of ", other_name, " ",
                  shape_of(other), ", got ", shape_of(t));
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, " must have the dtype of ",
                  other_name, " (", torch::headeronly::toString(other.scalar_type()), "), got ",
                  torch::headeronly::toString(t.scalar_type()));
  check_nhwc(t, name);
}

inline void check_activation_like(const OptionalTensor& t, const char* name, const Tensor& other,
                                  const char* other_name) {
  if (t) check_activation_like(*t, name, other, other_name);
}

// A per-channel vector in the accumulation type of `activation`.
inline void check_channel_layout(const Tensor& t, const char* name, const Tensor& activation) {
  check_same_device(t, name, activation);
  const int64_t channels = activation.size(1);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, name, " must have shape [", channels,
                  "], one value per channel, got ", shape_of(t));
  STD_TORCH_CHECK(channels <= 1 || t.stride(0) == 1, name, " must be contiguous, got stride ",
                  t.stride(0));
}

inline void check_channel_vector(const Tensor& t, const char* name, const Tensor& activation) {
  check_channel_layout(t, name, activation);
  const ScalarType acc =
      activation.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(t.scalar_type() == acc, name, " must be ", torch::headeronly::toString(acc),
                  " for ", torch::headeronly::toString(activation.scalar_type()),
                  " activations, got ", torch::headeronly::toString(t.scalar_type()));
}

// A statistic that is returned may be double for any activation: for who merges it with others.
inline void check_statistic(const Tensor& t, const char* name, const Tensor& activation) {
  if (t.scalar_type() == ScalarType::Double) {
    check_channel_layout(t, name, activation);
  } else {
    check_channel_vector(t, name, activation);
  }
}

inline void check_channel_vector(const OptionalTensor& t, const char* name,
                                 const Tensor& activation) {
  if (t) check_channel_vector(*t, name, activation);
}

// Of z's norm: (z − mean)·scale + beta. Where y serves for the mask, beta need not be given.
inline void check_affine(const Tensor& mean, const Tensor& scale, const OptionalTensor& beta,
                         const Tensor& z) {
  check_channel_vector(mean, "mean", z);
  check_channel_vector(scale, "scale", z);
  check_channel_vector(beta, "beta", z);
}

// A residual's own affine is given whole, and with a residual.
inline void check_residual(const OptionalTensor& residual, const OptionalTensor& mean,
                           const OptionalTensor& scale, const OptionalTensor& beta,
                           const Tensor& z) {
  check_activation_like(residual, "residual", z, "z");
  check_channel_vector(mean, "residual_mean", z);
  check_channel_vector(scale, "residual_scale", z);
  check_channel_vector(beta, "residual_beta", z);
  STD_TORCH_CHECK(mean.has_value() == scale.has_value() && mean.has_value() == beta.has_value(),
                  "residual_mean, residual_scale and residual_beta must be given together, got ",
                  int{mean.has_value()} + scale.has_value() + beta.has_value(), " of 3");
  STD_TORCH_CHECK(residual || !mean, "residual_mean is given without residual");
}

// ---- memory shared by arguments

enum class Access {
  elementwise,  // an output may be exactly this memory
  whole,        // no output may touch it
};

struct Argument {
  const char* name;
  const Tensor* tensor;  // nullptr: not given
  Access access = Access::elementwise;

  Argument(const char* n, const Tensor& t, Access a = Access::elementwise)
      : name(n), tensor(&t), access(a) {}
  Argument(const char* n, const OptionalTensor& t, Access a = Access::elementwise)
      : name(n), tensor(t ? &*t : nullptr), access(a) {}
};

inline void check_disjoint(const Argument& out, const Argument& other, bool may_coincide) {
  if (!out.tensor || !other.tensor) return;
  const auto bytes = [](const Tensor& t) {
    return static_cast<uintptr_t>(t.numel()) * t.element_size();
  };
  const auto a = reinterpret_cast<uintptr_t>(out.tensor->const_data_ptr());
  const auto b = reinterpret_cast<uintptr_t>(other.tensor->const_data_ptr());
  const uintptr_t size_a = bytes(*out.tensor);
  const uintptr_t size_b = bytes(*other.tensor);
  if (size_a == 0 || size_b == 0 || a + size_a <= b || b + size_b <= a) return;
  if (may_coincide && a == b && size_a == size_b) return;
  STD_TORCH_CHECK(false, out.name, " overlaps the memory of ", other.name, ", shapes ",
                  shape_of(*out.tensor), " and ", shape_of(*other.tensor));
}

// Outputs are disjoint from each other; they may coincide exactly with an elementwise input.
inline void check_memory(std::initializer_list<Argument> outputs,
                         std::initializer_list<Argument> inputs) {
  for (auto out = outputs.begin(); out != outputs.end(); ++out) {
    for (auto other = out + 1; other != outputs.end(); ++other) {
      check_disjoint(*out, *other, false);
    }
    for (const Argument& in : inputs) {
      check_disjoint(*out, in,
                     out->access == Access::elementwise && in.access == Access::elementwise);
    }
  }
}

}  // namespace resfast
