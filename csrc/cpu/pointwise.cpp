// 1×1 convolution on NHWC float32: entry points, weights, the cut into blocks of pixels and panels.
//
// A block of pixels is read for each panel of output channels, so it is to stay in the L2 cache; a
// panel is read for each six pixels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/pointwise_kernels.h"

namespace resfast {
namespace {

constexpr int64_t kBlockRows = 192;
constexpr int64_t kBlockBytes = 512 * 1024;  // of the pixels of one block, half an L2 cache

const PointwiseKernels& pointwise_kernels() {
  return RESFAST_PICK(pointwise_kernels);
}

// The pixels of x that a strided 1×1 convolution reads, in the order of its output.
struct Pixels {
  const float* x;
  int64_t channels, h, w, stride_h, stride_w, p, q, count;

  Pixels(const Tensor& t, int64_t stride_y, int64_t stride_x)
      : x(static_cast<const float*>(t.const_data_ptr())),
        channels(t.size(1)),
        h(t.size(2)),
        w(t.size(3)),
        stride_h(stride_y),
        stride_w(stride_x) {
    STD_TORCH_CHECK(stride_h >= 1 && stride_w >= 1, "strides must be at least 1, got ", stride_h,
                    " and ", stride_w);
    p = ceil_div(h, stride_h);
    q = ceil_div(w, stride_w);
    count = t.size(0) * p * q;
  }

  bool strided() const { return stride_h != 1 || stride_w != 1; }

  const float* at(int64_t row) const {
    if (!strided()) return x + row * channels;
    const int64_t image = row / (p * q), y = row / q % p, column = row % q;
    return x + ((image * h + y * stride_h) * w + column * stride_w) * channels;
  }
};

// [ceil(K / columns), C, columns] of weight [K, C, 1, 1] times scale [K]; transposed,
// [ceil(C / columns), K, columns].
void pointwise_weight(const Tensor& weight, const OptionalTensor& scale, bool transposed,
                      const Tensor& packed) {
  check_float(weight, "weight");
  check_float(packed, "packed");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1,
                  "weight must be [K, C, 1, 1], got ", shape_of(weight));
  const int64_t columns = pointwise_kernels().columns;
  const int64_t k = weight.size(transposed ? 1 : 0), c = weight.size(transposed ? 0 : 1);
  if (scale) {
    check_float(*scale, "scale");
    STD_TORCH_CHECK(
        !transposed && scale->dim() == 1 && scale->size(0) == k && scale->is_contiguous(),
        "scale must be contiguous [", k, "] of a weight not transposed, got ", shape_of(*scale));
  }
  const int64_t panels = ceil_div(k, columns);
  STD_TORCH_CHECK(packed.dim() == 3 && packed.size(0) == panels && packed.size(1) == c &&
                      packed.size(2) == columns && packed.is_contiguous(),
                  "packed must be contiguous [", panels, ", ", c, ", ", columns, "], got ",
                  shape_of(packed));
  check_memory({{"packed", packed, Access::whole}},
               {{"weight", weight, Access::whole}, {"scale", scale, Access::whole}});
  const auto* w = static_cast<const float*>(weight.const_data_ptr());
  const auto* s = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  auto* u = static_cast<float*>(packed.mutable_data_ptr());
  const int64_t column_stride = weight.stride(transposed ? 1 : 0);
  const int64_t channel_stride = weight.stride(transposed ? 0 : 1);
  constexpr int64_t kChannels = 16;  // a cache line of each of a panel's columns
  const int64_t pieces = ceil_div(c, kChannels);
  torch::stable::parallel_for(0, panels * pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / pieces, first = i % pieces * kChannels;
      const int64_t last = std::min(c, first + kChannels);
      const int64_t column = panel * columns, existing = std::min(columns, k - column);
      const float* from = w + column * column_stride;
      float* to = u + panel * c * columns;
      const auto put = [&](int64_t channel, int64_t j) {
        const float value = from[j * column_stride + channel * channel_stride];
        to[channel * columns + j] = s ? value * s[column + j] : value;
      };
      // along what lies together in memory
      if (column_stride == 1) {
        for (int64_t channel = first; channel < last; ++channel) {
          for (int64_t j = 0; j < existing; ++j) put(channel, j);
        }
      } else {
        for (int64_t j = 0; j < existing; ++j) {
          for (int64_t channel = first; channel < last; ++channel) put(channel, j);
        }
      }
    }
  });
}

// out = act(conv(x, weight) + shift + residual), padding 0.
void pointwise_conv(const Tensor& x, const Tensor& packed, const OptionalTensor& shift,
                    const OptionalTensor& residual, bool relu, int64_t stride_h, int64_t stride_w,
                    const Tensor& out) {
  check_activation(x, "x");
  check_float(x, "x");
  check_activation(out, "out");
  check_float(out, "out");
  check_activation_like(residual, "residual", out, "out");
  check_channel_vector(shift, "shift", out);
  check_float(packed, "packed");
  const PointwiseKernels& kernels = pointwise_kernels();
  const Pixels pixels(x, stride_h, stride_w);
  const int64_t c = x.size(1), k = out.size(1), rows = pixels.count;
  STD_TORCH_CHECK(out.size(0) == x.size(0) && out.size(2) == pixels.p && out.size(3) == pixels.q,
                  "out must be [", x.size(0), ", K, ", pixels.p, ", ", pixels.q, "], got ",
                  shape_of(out));
  STD_TORCH_CHECK(k % kernels.lanes == 0, "output channels must be a multiple of ", kernels.lanes,
                  ", got ", k);
  STD_TORCH_CHECK(packed.dim() == 3 && packed.size(0) == ceil_div(k, kernels.columns) &&
                      packed.size(1) == c && packed.size(2) == kernels.columns &&
                      packed.is_contiguous(),
                  "packed must be what pointwise_weight made for C = ", c, ", K = ", k,
                  " on this instruction set, got ", shape_of(packed));
  check_memory({{"out", out, Access::whole}}, {{"x", x, Access::whole},
                                               {"packed", packed, Access::whole},
                                               {"shift", shift, Access::whole}});
  check_memory({{"out", out}}, {{"residual", residual}});
  if (out.numel() == 0) return;

  const auto floats = [](const OptionalTensor& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  PointwiseTile whole{};
  whole.channels = c;
  whole.u = static_cast<const float*>(packed.const_data_ptr());
  whole.shift = floats(shift);
  whole.residual = floats(residual);
  whole.relu = relu;
  whole.out = static_cast<float*>(out.mutable_data_ptr());
  whole.x_stride = c;
  whole.out_stride = k;

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panels = ceil_div(k, kernels.columns);
  // Threads share out what there is more of, so that less is read by all of them.
  const int64_t groups = k > rows && panels >= threads ? threads : 1;
  const int64_t fitting =
      std::clamp<int64_t>(kBlockBytes / (c * int64_t{sizeof(float)}), 24, kBlockRows);
  const int64_t sharing = groups == 1 ? threads : 1;
  const int64_t rounds = ceil_div(rows, fitting * sharing);
  const int64_t count = ceil_div(rows, rounds * sharing), blocks = ceil_div(rows, count);
  torch::stable::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    float* const gathered = pixels.strided() ? thread_scratch(count * c) : nullptr;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * count, group = task / blocks;
      const int64_t from = panels * group / groups * kernels.columns;
      const int64_t to = std::min(k, panels * (group + 1) / groups * kernels.columns);
      PointwiseTile t = whole;
      t.rows = std::min(count, rows - first);
      t.columns = to - from;
      t.u += from * c;
      if (t.shift) t.shift += from;
      if (t.residual) t.residual += first * k + from;
      t.out += first * k + from;
      if (pixels.strided()) {
        for (int64_t i = 0; i < t.rows; ++i) {
          const float* pixel = pixels.at(first + i);
          std::copy(pixel, pixel + c, gathered + i * c);
        }
        t.x = gathered;
      } else {
        t.x = pixels.at(first);
      }
      kernels.product(t);
    }
  });
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("pointwise_weight", TORCH_BOX(&resfast::pointwise_weight));
  m.impl("pointwise_conv", TORCH_BOX(&resfast::pointwise_conv));
}
