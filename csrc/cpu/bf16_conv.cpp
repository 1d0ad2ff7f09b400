// Convolution on NHWC bfloat16 for inference: products with gathered windows (im2col, a block at a
// time), or with pixels as they lie, summed in float32; norm, residual and ReLU before the one
// rounding. On processors that multiply bfloat16 pairs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "checks.h"
#include "cpu/bf16_conv_kernels.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/windows.h"

namespace resfast {
namespace {

constexpr int64_t kBlockBytes = 512 * 1024;  // of windows, half an L2 cache
constexpr int64_t kBlockRows = 192;

const Bf16Kernels& bf16_kernels() {
  STD_TORCH_CHECK(has_bf16_products(),
                  "bfloat16 convolutions need avx512 kernels and a processor with avx512_bf16");
#if defined(RESFAST_HAS_AVX512BF16)
  return bf16_kernels_avx512bf16;
#else
  throw std::logic_error("unreachable");
#endif
}

bool bf16_products() {
  return has_bf16_products();
}

void check_bf16(const Tensor& t, const char* name) {
  check_cpu(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, name, " must be bfloat16, got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// [ceil(K / columns), pairs, columns, 2] of weight [K, C, R, S]: pairs of an output channel's
// values in the order of a window, with 0 behind an odd number of them.
void bf16_weight(const Tensor& weight, const Tensor& packed) {
  check_bf16(weight, "weight");
  check_bf16(packed, "packed");
  STD_TORCH_CHECK(weight.dim() == 4, "weight must be [K, C, R, S], got ", shape_of(weight));
  const int64_t columns = bf16_kernels().columns, k = weight.size(0), c = weight.size(1);
  const int64_t taps_h = weight.size(2), taps_w = weight.size(3), width = c * taps_h * taps_w;
  const int64_t panels = ceil_div(k, columns), pairs = ceil_div(width, 2);
  STD_TORCH_CHECK(packed.dim() == 4 && packed.size(0) == panels && packed.size(1) == pairs &&
                      packed.size(2) == columns && packed.size(3) == 2 && packed.is_contiguous(),
                  "packed must be contiguous [", panels, ", ", pairs, ", ", columns, ", 2], got ",
                  shape_of(packed));
  check_memory({{"packed", packed, Access::whole}}, {{"weight", weight, Access::whole}});
  const auto* w = static_cast<const uint16_t*>(weight.const_data_ptr());
  auto* u = static_cast<uint16_t*>(packed.mutable_data_ptr());
  const int64_t k_stride = weight.stride(0), c_stride = weight.stride(1);
  const int64_t r_stride = weight.stride(2), s_stride = weight.stride(3);
  torch::stable::parallel_for(0, k, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint16_t* const to = u + (i / columns * pairs * columns + i % columns) * 2;
      for (int64_t j = 0; j < 2 * pairs; ++j) {
        const int64_t tap = j / c, channel = j % c;
        to[j / 2 * columns * 2 + j % 2] = j < width
                                              ? w[i * k_stride + channel * c_stride +
                                                  tap / taps_w * r_stride + tap % taps_w * s_stride]
                                              : uint16_t{0};
      }
    }
  });
}

// out = act(conv(x, weight)·scale + shift + residual)
void bf16_conv(const Tensor& x, const Tensor& packed, int64_t kernel_h, int64_t kernel_w,
               int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
               const Tensor& scale, const Tensor& shift, const OptionalTensor& residual, bool relu,
               const Tensor& out) {
  check_activation(x, "x");
  check_bf16(x, "x");
  check_activation(out, "out");
  check_bf16(out, "out");
  check_activation_like(residual, "residual", out, "out");
  check_channel_vector(scale, "scale", out);
  check_channel_vector(shift, "shift", out);
  check_bf16(packed, "packed");
  const Bf16Kernels& kernels = bf16_kernels();
  const auto in = convolution_windows<uint16_t>(x, kernel_h, kernel_w, stride_h, stride_w,
                                                padding_h, padding_w, out);
  const int64_t k = out.size(1), width = in.width(), pairs = ceil_div(width, 2);
  const int64_t panels = ceil_div(k, kernels.columns);
  STD_TORCH_CHECK(k % kernels.lanes == 0, "output channels must be a multiple of ", kernels.lanes,
                  ", got ", k);
  STD_TORCH_CHECK(packed.dim() == 4 && packed.size(0) == panels && packed.size(1) == pairs &&
                      packed.size(2) == kernels.columns && packed.size(3) == 2 &&
                      packed.is_contiguous(),
                  "packed must be what bf16_weight made for ", width, " values and K = ", k,
                  ", got ", shape_of(packed));
  check_memory({{"out", out, Access::whole}}, {{"x", x, Access::whole},
                                               {"packed", packed, Access::whole},
                                               {"scale", scale, Access::whole},
                                               {"shift", shift, Access::whole}});
  check_memory({{"out", out}}, {{"residual", residual}});
  if (out.numel() == 0) return;

  // 1×1 windows of an even number of channels are pixels as they lie
  const bool dense = width == in.c && stride_h == 1 && stride_w == 1 && padding_h == 0 &&
                     padding_w == 0 && width % 2 == 0;
  const int64_t row_values = 2 * pairs, rows = in.count();
  const int64_t threads = torch::stable::get_num_threads();
  // Threads share out what there is more of, so that less is read by all of them.
  const bool by_panels = k > rows && panels >= threads;
  const int64_t sharing = by_panels ? 1 : threads, groups = by_panels ? threads : 1;
  const int64_t fitting = std::clamp<int64_t>(kBlockBytes / (row_values * 2), 24, kBlockRows);
  const int64_t rounds = ceil_div(rows, fitting * sharing);
  const int64_t count = ceil_div(rows, rounds * sharing), blocks = ceil_div(rows, count);
  const auto* const u = static_cast<const uint16_t*>(packed.const_data_ptr());
  const auto* const added =
      residual ? static_cast<const uint16_t*>(residual->const_data_ptr()) : nullptr;
  const std::vector<Run> runs = in.runs(0, width);
  torch::stable::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    const int64_t sums = count * kernels.columns;
    float* const memory = thread_scratch(sums + (dense ? 0 : count * pairs));
    auto* const gathered = reinterpret_cast<uint16_t*>(memory + sums);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * count, group = task / blocks;
      const int64_t from = panels * group / groups;
      const int64_t column = from * kernels.columns;
      Bf16Tile t{};
      t.rows = std::min(count, rows - first);
      t.pairs = pairs;
      t.columns = std::min(k, panels * (group + 1) / groups * kernels.columns) - column;
      t.x_stride = row_values;
      t.u = u + from * pairs * kernels.columns * 2;
      t.sums = memory;
      t.scale = static_cast<const float*>(scale.const_data_ptr()) + column;
      t.shift = static_cast<const float*>(shift.const_data_ptr()) + column;
      t.residual = added ? added + first * k + column : nullptr;
      t.relu = relu;
      t.out = static_cast<uint16_t*>(out.mutable_data_ptr()) + first * k + column;
      t.out_stride = k;
      if (dense) {
        t.x = in.x + first * width;
      } else {
        Place place = in.place(first);
        for (int64_t i = 0; i < t.rows; ++i, in.advance(place)) {
          uint16_t* const row = gathered + i * row_values;
          in.gather(in.corner(place), runs, row);
          if (width % 2) row[width] = 0;
        }
        t.x = gathered;
      }
      kernels.product(t);
    }
  });
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("bf16_weight", TORCH_BOX(&resfast::bf16_weight));
  m.impl("bf16_conv", TORCH_BOX(&resfast::bf16_conv));
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CompositeExplicitAutograd, m) {
  m.impl("bf16_products", TORCH_BOX(&resfast::bf16_products));
}
