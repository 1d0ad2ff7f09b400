// Gradients of NHWC float32 convolutions as products with windows, gathered a block at a time
// (im2col): of any window and stride, where Winograd's algorithm and the 1×1 kernels have no way.
//
// The gradient of the input at stride s falls into s·s convolutions of stride 1, one for each
// remainder of its rows and columns: each has its own part of the filter's taps.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/pointwise_kernels.h"
#include "cpu/sharing.h"
#include "cpu/windows.h"

namespace resfast {
namespace {

constexpr int64_t kBlockBytes = 512 * 1024;  // of gathered windows, half an L2 cache
constexpr int64_t kBlockRows = 192;
constexpr int64_t kPixelsInChain = 128;
constexpr int64_t kLeastRows = 128;  // of a piece of work, for which all windows are gathered
constexpr int64_t kLineFloats = 16;  // between blocks, so that they do not share cache sets

const PointwiseKernels& pointwise_kernels() {
  return RESFAST_PICK(pointwise_kernels);
}

void check_window(int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w) {
  STD_TORCH_CHECK(stride_h >= 1 && stride_w >= 1, "strides must be at least 1, got ", stride_h,
                  " and ", stride_w);
  STD_TORCH_CHECK(padding_h >= 0 && padding_w >= 0, "paddings must be at least 0, got ", padding_h,
                  " and ", padding_w);
}

// dz of the convolution of x [N, C, H, W] with a filter [K, C, R, S].
void check_gradient(const Tensor& dz, const Tensor& x, const char* x_name, const Tensor& weight,
                    const char* weight_name, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                    int64_t padding_w) {
  check_activation(dz, "dz");
  check_float(dz, "dz");
  check_activation(x, x_name);
  check_float(x, x_name);
  check_float(weight, weight_name);
  check_window(stride_h, stride_w, padding_h, padding_w);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == dz.size(1) &&
                      weight.size(1) == x.size(1) && weight.size(2) > 0 && weight.size(3) > 0,
                  weight_name, " must be [", dz.size(1), ", ", x.size(1), ", R, S], got ",
                  shape_of(weight));
  const int64_t room_h = x.size(2) + 2 * padding_h - weight.size(2);
  const int64_t room_w = x.size(3) + 2 * padding_w - weight.size(3);
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, weight_name, " ", shape_of(weight),
                  " must fit into the padded ", x_name, " ", shape_of(x));
  STD_TORCH_CHECK(dz.size(0) == x.size(0) && dz.size(2) == room_h / stride_h + 1 &&
                      dz.size(3) == room_w / stride_w + 1,
                  "dz must be [", x.size(0), ", K, ", room_h / stride_h + 1, ", ",
                  room_w / stride_w + 1, "], got ", shape_of(dz));
}

// One dimension of the input's gradient: the pixels of one remainder, from the taps that meet them.
struct Remainder {
  int64_t pixels, taps;
  int64_t first_tap;    // of the last place of dz; others follow `stride` apart, backwards in dz
  int64_t first_place;  // of dz, for the first pixel

  Remainder(int64_t remainder, int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
    pixels = std::max<int64_t>(0, ceil_div(size - remainder, stride));
    first_tap = (remainder + padding) % stride;
    taps = std::max<int64_t>(0, ceil_div(kernel - first_tap, stride));
    first_place = (remainder + padding) / stride - (taps - 1);
  }
};

struct Phase {
  Windows<float> windows;  // of dz
  int64_t y, x;            // remainders
  int64_t first_tap_y, first_tap_x;
  float* u;  // [panels, taps·K, columns]
};

// dx = Σ over places and k of dz·weight. `packed`: memory for the weight in panels.
void im2col_dgrad(const Tensor& dz, const Tensor& weight, int64_t stride_h, int64_t stride_w,
                  int64_t padding_h, int64_t padding_w, const Tensor& packed, const Tensor& dx) {
  check_gradient(dz, dx, "dx", weight, "weight", stride_h, stride_w, padding_h, padding_w);
  check_float(packed, "packed");
  const PointwiseKernels& kernels = pointwise_kernels();
  const int64_t n = dx.size(0), c = dx.size(1), h = dx.size(2), w = dx.size(3), k = dz.size(1);
  STD_TORCH_CHECK(c % kernels.lanes == 0, "input channels must be a multiple of ", kernels.lanes,
                  ", got ", c);
  const int64_t panels = ceil_div(c, kernels.columns);
  const int64_t size = weight.size(2) * weight.size(3) * k * panels * kernels.columns;
  STD_TORCH_CHECK(packed.is_contiguous() && packed.numel() == size,
                  "packed must be contiguous, of ", size, " values, got ", shape_of(packed));
  check_memory({{"dx", dx, Access::whole}, {"packed", packed, Access::whole}},
               {{"dz", dz, Access::whole}, {"weight", weight, Access::whole}});
  if (dx.numel() == 0) return;

  std::vector<Phase> phases;
  auto* next = static_cast<float*>(packed.mutable_data_ptr());
  for (int64_t y = 0; y < std::min(stride_h, h); ++y) {
    const Remainder in_h(y, h, weight.size(2), stride_h, padding_h);
    for (int64_t x = 0; x < std::min(stride_w, w); ++x) {
      const Remainder in_w(x, w, weight.size(3), stride_w, padding_w);
      const Windows<float> windows{static_cast<const float*>(dz.const_data_ptr()),
                                   n,
                                   k,
                                   dz.size(2),
                                   dz.size(3),
                                   in_h.taps,
                                   in_w.taps,
                                   1,
                                   1,
                                   in_h.first_place,
                                   in_w.first_place,
                                   in_h.pixels,
                                   in_w.pixels};
      phases.push_back({windows, y, x, in_h.first_tap, in_w.first_tap, next});
      next += windows.width() * panels * kernels.columns;
    }
  }

  const auto* filter = static_cast<const float*>(weight.const_data_ptr());
  const int64_t k_stride = weight.stride(0), c_stride = weight.stride(1);
  const int64_t r_stride = weight.stride(2), s_stride = weight.stride(3);
  const auto pack = [&](const Phase& phase, int64_t panel, int64_t tap, int64_t begin,
                        int64_t end) {
    const Windows<float>& in = phase.windows;
    const int64_t r = phase.first_tap_y + (in.kernel_h - 1 - tap / in.kernel_w) * stride_h;
    const int64_t s = phase.first_tap_x + (in.kernel_w - 1 - tap % in.kernel_w) * stride_w;
    const int64_t first = panel * kernels.columns;
    const int64_t existing = std::min<int64_t>(kernels.columns, c - first);
    for (int64_t i = begin; i < end; ++i) {
      const float* from = filter + i * k_stride + first * c_stride + r * r_stride + s * s_stride;
      float* to = phase.u + (panel * in.width() + tap * k + i) * kernels.columns;
      for (int64_t j = 0; j < existing; ++j) to[j] = from[j * c_stride];
    }
  };
  torch::stable::parallel_for(0, k, 4, [&](int64_t begin, int64_t end) {
    for (const Phase& phase : phases) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t taps = phase.windows.kernel_h * phase.windows.kernel_w;
        for (int64_t tap = 0; tap < taps; ++tap) pack(phase, panel, tap, begin, end);
      }
    }
  });

  auto* out = static_cast<float*>(dx.mutable_data_ptr());
  const auto pixel = [&](const Phase& phase, const Place& p) {
    const int64_t y = p.row * stride_h + phase.y, x = p.column * stride_w + phase.x;
    return out + ((p.image * h + y) * w + x) * c;
  };
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (const Phase& phase : phases) {
        const Windows<float>& in = phase.windows;
        const int64_t rows = in.count(), width = in.width();
        // Threads share out what there is more of, so that less is read by all of them.
        const bool by_panels = c > rows && panels >= threads;
        const int64_t from = by_panels ? panels * thread / threads : 0;
        const int64_t to = by_panels ? panels * (thread + 1) / threads : panels;
        const int64_t column = from * kernels.columns, sharing = by_panels ? 1 : threads;
        const int64_t columns = std::min(c, to * kernels.columns) - column;
        const int64_t fitting = std::clamp<int64_t>(
            kBlockBytes / std::max<int64_t>(1, width * int64_t{sizeof(float)}), 24, kBlockRows);
        const int64_t rounds = ceil_div(rows, fitting * sharing);
        const int64_t count = ceil_div(rows, rounds * sharing);
        float* const gathered = thread_scratch(count * (width + columns));
        float* const sums = gathered + count * width;
        const std::vector<Run> runs = in.runs(0, width);
        const int64_t first_block = by_panels ? 0 : thread * count;
        for (int64_t first = first_block; first < rows; first += count * sharing) {
          PointwiseTile t{};
          t.rows = std::min(count, rows - first);
          const Place start = in.place(first);
          Place place = start;
          if (width == 0) {  // no tap meets these pixels
            for (int64_t i = 0; i < t.rows; ++i, in.advance(place)) {
              float* to_pixel = pixel(phase, place) + column;
              std::fill(to_pixel, to_pixel + columns, 0.0f);
            }
            continue;
          }
          t.channels = width;
          t.columns = columns;
          t.x = gathered;
          t.x_stride = width;
          t.u = phase.u + from * width * kernels.columns;
          t.out = sums;
          t.out_stride = columns;
          for (int64_t i = 0; i < t.rows; ++i, in.advance(place)) {
            in.gather(in.corner(place), runs, gathered + i * width);
          }
          kernels.product(t);
          place = start;
          for (int64_t i = 0; i < t.rows; ++i, in.advance(place)) {
            const float* sum = sums + i * columns;
            std::copy(sum, sum + columns, pixel(phase, place) + column);
          }
        }
      }
    }
  });
}

// dweight = Σ over pixels of dz·window. Chains end at kPixelsInChain; their sums are added in
// order, whatever the number of threads.
void im2col_wgrad(const Tensor& x, const Tensor& dz, int64_t stride_h, int64_t stride_w,
                  int64_t padding_h, int64_t padding_w, const Tensor& dweight) {
  check_gradient(dz, x, "x", dweight, "dweight", stride_h, stride_w, padding_h, padding_w);
  check_nhwc(dweight, "dweight");
  check_memory({{"dweight", dweight, Access::whole}},
               {{"x", x, Access::whole}, {"dz", dz, Access::whole}});
  const PointwiseKernels& kernels = pointwise_kernels();
  const Windows<float> in{static_cast<const float*>(x.const_data_ptr()),
                          x.size(0),
                          x.size(1),
                          x.size(2),
                          x.size(3),
                          dweight.size(2),
                          dweight.size(3),
                          stride_h,
                          stride_w,
                          -padding_h,
                          -padding_w,
                          dz.size(2),
                          dz.size(3)};
  const int64_t k = dz.size(1), width = in.width(), pixels = in.count();
  auto* out = static_cast<float*>(dweight.mutable_data_ptr());
  const auto* d = static_cast<const float*>(dz.const_data_ptr());
  if (pixels == 0) std::fill(out, out + k * width, 0.0f);
  const int64_t columns = kernels.columns, panels = ceil_div(width, columns);
  // vectors are whole: where the window does not end with one, sums have memory of their own
  const int64_t stride = round_up(width, kernels.lanes);
  const bool apart = stride != width;
  // threads share out rows of dweight or panels of its columns, whichever there are more of
  const int64_t threads = torch::stable::get_num_threads();
  const bool by_rows = k >= width || panels < threads;
  const int64_t shared = by_rows ? k : panels;
  const int64_t least = by_rows ? kLeastRows : ceil_div(kLeastRows, columns);
  const int64_t grain = std::clamp<int64_t>(ceil_div(shared, threads), 1, least);
  share_out(0, shared, grain, [&](int64_t begin, int64_t end) {
    const int64_t k_begin = by_rows ? begin : 0, k_end = by_rows ? end : k;
    const int64_t panel_begin = by_rows ? 0 : begin, panel_end = by_rows ? panels : end;
    const int64_t own = std::min(stride, panel_end * columns) - panel_begin * columns;
    const int64_t block_stride = kPixelsInChain * kernels.block_channels + kLineFloats;
    const int64_t blocks = ceil_div(k_end - k_begin, kernels.block_channels);
    float* const gathered = thread_scratch(kPixelsInChain * columns + blocks * block_stride +
                                           apart * (k_end - k_begin) * own);
    float* const packed = gathered + kPixelsInChain * columns;
    float* const sums =
        apart ? packed + blocks * block_stride : out + k_begin * width + panel_begin * columns;
    const int64_t sum_stride = apart ? own : width;
    std::vector<Corner<float>> corners(kPixelsInChain), next(kPixelsInChain);
    Place place{};
    const auto locate = [&](int64_t left, std::vector<Corner<float>>& to) {
      const int64_t count = std::clamp<int64_t>(left, 0, kPixelsInChain);
      for (int64_t i = 0; i < count; ++i, in.advance(place)) to[i] = in.corner(place);
      return count;
    };
    int64_t rows = locate(pixels, corners);
    for (int64_t first = 0; first < pixels; first += kPixelsInChain) {
      const int64_t next_rows = locate(pixels - first - kPixelsInChain, next);
      PointwiseCorrelation t{};
      t.rows = rows;
      t.channels = k_end - k_begin;
      t.d = packed;
      t.block_stride = block_stride;
      t.x = gathered;
      t.sum_stride = sum_stride;
      t.add = first > 0;
      kernels.pack_blocks(d + first * k + k_begin, k, rows, t.channels, block_stride, packed);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const int64_t column = panel * columns, existing = std::min(columns, width - column);
        t.columns = round_up(existing, kernels.lanes);
        const std::vector<Run> runs = in.runs(column, existing);
        for (int64_t i = 0; i < rows; ++i) {
          in.gather(corners[i], runs, gathered + i * columns);
          if (i < next_rows) in.fetch(next[i], runs);
        }
        t.sums = sums + (panel - panel_begin) * columns;
        kernels.correlation(t);
      }
      corners.swap(next);
      rows = next_rows;
    }
    if (apart && pixels > 0) {
      const int64_t column = panel_begin * columns, existing = std::min(own, width - column);
      for (int64_t i = k_begin; i < k_end; ++i) {
        const float* row = sums + (i - k_begin) * own;
        std::copy(row, row + existing, out + i * width + column);
      }
    }
  });
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("im2col_dgrad", TORCH_BOX(&resfast::im2col_dgrad));
  m.impl("im2col_wgrad", TORCH_BOX(&resfast::im2col_wgrad));
}
