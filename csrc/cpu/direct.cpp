// Direct convolution on NHWC float32, of any window and stride: entry points, weights, the cut into
// blocks of output rows.
//
// Rows of a window lie together in memory, and so do the windows of neighbouring pixels at a
// constant distance: they are multiplied as they lie. Rows above and below the image are left out;
// windows that stand over its sides are gathered, a column of them at a time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"
#include "cpu/direct_kernels.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/sharing.h"
#include "cpu/windows.h"

namespace resfast {
namespace {

constexpr int64_t kBlockPixels = 96;
constexpr int64_t kPieces = 2;  // of a thread's panels: each gathers windows over the sides anew

const DirectKernels& direct_kernels() {
  return RESFAST_PICK(direct_kernels);
}

const float* floats(const OptionalTensor& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// [ceil(K / columns), R·S·C, columns] of weight [K, C, R, S] times scale [K], zero beyond K.
void direct_weight(const Tensor& weight, const OptionalTensor& scale, const Tensor& packed) {
  check_float(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 4, "weight must be [K, C, R, S], got ", shape_of(weight));
  check_float(packed, "packed");
  const int64_t k = weight.size(0), c = weight.size(1), taps_w = weight.size(3);
  if (scale) {
    check_float(*scale, "scale");
    STD_TORCH_CHECK(scale->dim() == 1 && scale->size(0) == k && scale->is_contiguous(),
                    "scale must be contiguous [", k, "], got ", shape_of(*scale));
  }
  const int64_t columns = direct_kernels().columns, panels = ceil_div(k, columns);
  const int64_t width = weight.size(2) * taps_w * c;
  STD_TORCH_CHECK(packed.dim() == 3 && packed.size(0) == panels && packed.size(1) == width &&
                      packed.size(2) == columns && packed.is_contiguous(),
                  "packed must be contiguous [", panels, ", ", width, ", ", columns, "], got ",
                  shape_of(packed));
  check_memory({{"packed", packed, Access::whole}},
               {{"weight", weight, Access::whole}, {"scale", scale, Access::whole}});
  const auto* const w = static_cast<const float*>(weight.const_data_ptr());
  const float* const factors = floats(scale);
  auto* const u = static_cast<float*>(packed.mutable_data_ptr());
  const int64_t k_stride = weight.stride(0), c_stride = weight.stride(1);
  const int64_t r_stride = weight.stride(2), s_stride = weight.stride(3);
  const int64_t taps = weight.size(2) * taps_w;
  share_out(0, panels * taps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / taps, tap = task % taps, column = panel * columns;
      direct_kernels().pack(
          w + column * k_stride + tap / taps_w * r_stride + tap % taps_w * s_stride, k_stride,
          c_stride, std::min(columns, k - column), c, factors ? factors + column : nullptr,
          u + (panel * width + tap * c) * columns);
    }
  });
}

// The lines of rows [begin, end) of the output, counted over all images.
struct Lines {
  Windows<float> in;
  int64_t k;
  int64_t left, right;  // columns [left, right) have windows within the sides
  int64_t width;        // of a window
  std::vector<Run> runs;

  Lines(const Windows<float>& windows, int64_t k_) : in(windows), k(k_), width(in.width()) {
    const int64_t room = in.w - in.kernel_w - in.first_x;
    left = std::min(in.columns, ceil_div(-in.first_x, in.stride_w));
    right = std::clamp<int64_t>(room < 0 ? 0 : room / in.stride_w + 1, left, in.columns);
    runs = in.runs(0, width);
  }

  int64_t sides() const { return in.columns - (right - left); }

  void find(int64_t begin, int64_t end, float* gathered, std::vector<DirectLine>& lines) const {
    lines.clear();
    const int64_t row_floats = in.w * in.c;
    for (int64_t row = begin; row < end && left < right; ++row) {
      const Place place{row / in.rows, row % in.rows, left};
      const Corner<float> at = in.corner(place);
      DirectLine line{};
      line.x = at.image + at.y * row_floats + at.x * in.c;
      line.x_stride = in.stride_w * in.c;
      line.segment_stride = row_floats;
      line.first = std::clamp<int64_t>(-at.y, 0, in.kernel_h);
      line.last = std::clamp<int64_t>(in.h - at.y, line.first, in.kernel_h);
      line.windows = right - left;
      line.out = (row * in.columns + left) * k;
      line.out_stride = k;
      if (line.first == line.last) {  // no row of the window is in the image: one, of zeros
        line.first = 0;
        line.last = 1;
        line.x = gathered;
        line.x_stride = 0;
        std::fill(gathered, gathered + in.kernel_w * in.c, 0.0f);
        gathered += in.kernel_w * in.c;
      }
      lines.push_back(line);
    }
    for (int64_t column = 0; column < in.columns; ++column) {
      if (column >= left && column < right) continue;
      DirectLine line{};
      line.x = gathered;
      line.x_stride = width;
      line.segment_stride = in.kernel_w * in.c;
      line.last = in.kernel_h;
      line.windows = end - begin;
      line.out = (begin * in.columns + column) * k;
      line.out_stride = in.columns * k;
      lines.push_back(line);
      for (int64_t row = begin; row < end; ++row, gathered += width) {
        in.gather(in.corner({row / in.rows, row % in.rows, column}), runs, gathered);
      }
    }
  }
};

// out = act(conv(x, weight) + shift + residual)
void direct_conv(const Tensor& x, const Tensor& packed, int64_t kernel_h, int64_t kernel_w,
                 int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                 const OptionalTensor& shift, const OptionalTensor& residual, bool relu,
                 const Tensor& out) {
  check_activation(x, "x");
  check_float(x, "x");
  check_activation(out, "out");
  check_float(out, "out");
  check_activation_like(residual, "residual", out, "out");
  check_channel_vector(shift, "shift", out);
  check_float(packed, "packed");
  const auto in = convolution_windows<float>(x, kernel_h, kernel_w, stride_h, stride_w, padding_h,
                                             padding_w, out);
  const int64_t k = out.size(1), rows = in.rows, columns = in.columns;
  const DirectKernels& kernels = direct_kernels();
  STD_TORCH_CHECK(k % kernels.lanes == 0, "output channels must be a multiple of ", kernels.lanes,
                  ", got ", k);
  const int64_t width = in.width(), panels = ceil_div(k, kernels.columns);
  STD_TORCH_CHECK(width > 0 && packed.dim() == 3 && packed.size(0) == panels &&
                      packed.size(1) == width && packed.size(2) == kernels.columns &&
                      packed.is_contiguous(),
                  "packed must be what direct_weight made for windows of ", width,
                  " values and K = ", k, " on this instruction set, got ", shape_of(packed));
  check_memory({{"out", out, Access::whole}}, {{"x", x, Access::whole},
                                               {"packed", packed, Access::whole},
                                               {"shift", shift, Access::whole}});
  check_memory({{"out", out}}, {{"residual", residual}});
  if (out.numel() == 0) return;

  const Lines lines(in, k);
  DirectTile whole{};
  whole.segments = kernel_h;
  whole.channels = kernel_w * in.c;
  whole.u = static_cast<const float*>(packed.const_data_ptr());
  whole.shift = floats(shift);
  whole.residual = floats(residual);
  whole.relu = relu;
  whole.out = static_cast<float*>(out.mutable_data_ptr());
  const int64_t all_rows = in.n * rows, threads = torch::stable::get_num_threads();
  // Threads share out what there is more of, so that less is read by all of them.
  const bool by_panels = k > all_rows * columns && panels >= threads;
  const int64_t groups = by_panels ? std::min(panels, kPieces * threads) : 1;
  const int64_t sharing = by_panels ? 1 : threads;
  const int64_t fitting = std::max<int64_t>(1, kBlockPixels / columns);
  const int64_t rounds = ceil_div(all_rows, fitting * sharing);
  const int64_t blocks = std::min(all_rows, rounds * sharing), count = ceil_div(all_rows, blocks);
  share_out(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    float* const gathered = thread_scratch(count * (lines.sides() * width + whole.channels));
    std::vector<DirectLine> found;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks, group = task / blocks;
      lines.find(all_rows * block / blocks, all_rows * (block + 1) / blocks, gathered, found);
      const int64_t from = panels * group / groups, to = panels * (group + 1) / groups;
      const int64_t column = from * kernels.columns;
      DirectTile t = whole;
      t.lines = found.data();
      t.line_count = static_cast<int64_t>(found.size());
      t.columns = std::min(k, to * kernels.columns) - column;
      t.u += column * width;
      if (t.shift) t.shift += column;
      if (t.residual) t.residual += column;
      t.out += column;
      kernels.product(t);
    }
  });
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("direct_weight", TORCH_BOX(&resfast::direct_weight));
  m.impl("direct_conv", TORCH_BOX(&resfast::direct_conv));
}
