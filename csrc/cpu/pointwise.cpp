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
#include "cpu/sharing.h"

namespace resfast {
namespace {

constexpr int64_t kBlockRows = 192;
constexpr int64_t kLeastRows = 48;
constexpr int64_t kPieces = 4;  // of a thread's part: others take what it has not begun
constexpr int64_t kLargeWeightBytes = 1024 * 1024;
constexpr int64_t kManyPixelsBytes = 8 * 1024 * 1024;  // to be read again for each panel
constexpr int64_t kBlockBytes = 512 * 1024;  // of the pixels of one block, half an L2 cache

constexpr int kGathered = kShared + 1;  // slot of scratch memory

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

// The matrix [c, k] of a 1×1 filter, or of its transpose.
struct Matrix {
  const float* w;
  int64_t k, c, k_stride, c_stride;

  Matrix(const Tensor& weight, bool transposed)
      : w(static_cast<const float*>(weight.const_data_ptr())),
        k(weight.size(transposed ? 1 : 0)),
        c(weight.size(transposed ? 0 : 1)),
        k_stride(weight.stride(transposed ? 1 : 0)),
        c_stride(weight.stride(transposed ? 0 : 1)) {}

  // Channels [begin, end) of a panel, times scale [k], the first of them at u.
  void pack(int64_t panel, int64_t begin, int64_t end, const float* scale, float* u) const {
    const int64_t columns = pointwise_kernels().columns, column = panel * columns;
    pointwise_kernels().pack(w + column * k_stride + begin * c_stride, k_stride, c_stride,
                             std::min(columns, k - column), end - begin,
                             scale ? scale + column : nullptr, u);
  }

  // All of it: u [panels][c][columns].
  void pack(const float* scale, float* u) const {
    const int64_t columns = pointwise_kernels().columns;
    constexpr int64_t kGrain = 64;
    share_out(0, ceil_div(k, columns) * c, kGrain, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // rows of u, panel by panel
        const int64_t panel = begin / c, stop = std::min(end, (panel + 1) * c);
        pack(panel, begin - panel * c, stop - panel * c, scale, u + begin * columns);
        begin = stop;
      }
    });
  }
};

void check_filter(const Tensor& weight) {
  check_float(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1,
                  "weight must be [K, C, 1, 1], got ", shape_of(weight));
}

const float* floats(const OptionalTensor& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// [ceil(K / columns), C, columns] of weight [K, C, 1, 1] times scale [K].
void pointwise_weight(const Tensor& weight, const OptionalTensor& scale, const Tensor& packed) {
  check_filter(weight);
  check_float(packed, "packed");
  const Matrix matrix(weight, false);
  if (scale) {
    check_float(*scale, "scale");
    STD_TORCH_CHECK(scale->dim() == 1 && scale->size(0) == matrix.k && scale->is_contiguous(),
                    "scale must be contiguous [", matrix.k, "], got ", shape_of(*scale));
  }
  const int64_t columns = pointwise_kernels().columns, panels = ceil_div(matrix.k, columns);
  STD_TORCH_CHECK(packed.dim() == 3 && packed.size(0) == panels && packed.size(1) == matrix.c &&
                      packed.size(2) == columns && packed.is_contiguous(),
                  "packed must be contiguous [", panels, ", ", matrix.c, ", ", columns, "], got ",
                  shape_of(packed));
  check_memory({{"packed", packed, Access::whole}},
               {{"weight", weight, Access::whole}, {"scale", scale, Access::whole}});
  matrix.pack(floats(scale), static_cast<float*>(packed.mutable_data_ptr()));
}

void check_convolution(const Tensor& x, const Pixels& pixels, const OptionalTensor& residual,
                       const Tensor& out) {
  const int64_t lanes = pointwise_kernels().lanes;
  check_activation_like(residual, "residual", out, "out");
  STD_TORCH_CHECK(out.size(0) == x.size(0) && out.size(2) == pixels.p && out.size(3) == pixels.q,
                  "out must be [", x.size(0), ", K, ", pixels.p, ", ", pixels.q, "], got ",
                  shape_of(out));
  STD_TORCH_CHECK(out.size(1) % lanes == 0, "output channels must be a multiple of ", lanes,
                  ", got ", out.size(1));
}

// One convolution: what every block of pixels needs.
struct Convolution {
  const PointwiseKernels& kernels;
  const Pixels& pixels;
  PointwiseTile whole{};
  int64_t k, panels;

  Convolution(const Pixels& pixels_, const OptionalTensor& residual, const Tensor& out)
      : kernels(pointwise_kernels()),
        pixels(pixels_),
        k(out.size(1)),
        panels(ceil_div(k, kernels.columns)) {
    whole.channels = whole.x_stride = pixels.channels;
    whole.residual = floats(residual);
    whole.out = static_cast<float*>(out.mutable_data_ptr());
    whole.out_stride = k;
  }

  // Pixels [first, first + rows) by panels [from, to).
  PointwiseTile tile(int64_t first, int64_t rows, int64_t from, int64_t to) const {
    PointwiseTile t = whole;
    const int64_t column = from * kernels.columns;
    t.rows = rows;
    t.columns = std::min(k, to * kernels.columns) - column;
    t.u += column * t.channels;
    if (t.shift) t.shift += column;
    if (t.residual) t.residual += first * k + column;
    t.out += first * k + column;
    return t;
  }

  // `rows` pixels from the first on, gathered where they are strided.
  const float* read(int64_t first, int64_t rows, float* gathered) const {
    if (!pixels.strided()) return pixels.at(first);
    for (int64_t i = 0; i < rows; ++i) {
      const float* pixel = pixels.at(first + i);
      std::copy(pixel, pixel + pixels.channels, gathered + i * pixels.channels);
    }
    return gathered;
  }

  const float* read_all() const {
    if (!pixels.strided()) return pixels.x;
    const int64_t c = pixels.channels;
    float* const gathered = thread_scratch<kGathered>(pixels.count * c);
    share_out(0, pixels.count, 8,
              [&](int64_t begin, int64_t end) { read(begin, end - begin, gathered + begin * c); });
    return gathered;
  }

  // With packed weights at whole.u.
  void run() const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t rows = pixels.count, c = pixels.channels;
    // Threads share out what there is more of, so that less is read by all of them.
    const bool by_panels = k > rows && panels >= threads;
    const int64_t groups = by_panels ? std::min(panels, kPieces * threads) : 1;
    const int64_t fitting =
        std::clamp<int64_t>(kBlockBytes / (c * int64_t{sizeof(float)}), 24, kBlockRows);
    const int64_t sharing = by_panels ? 1 : threads;
    const int64_t least = by_panels ? 1 : std::min(kPieces, ceil_div(rows, kLeastRows * threads));
    const int64_t rounds = std::max(least, ceil_div(rows, fitting * sharing));
    const int64_t count = ceil_div(rows, rounds * sharing), blocks = ceil_div(rows, count);
    const float* const x = by_panels ? read_all() : nullptr;  // else gathered a block at a time
    share_out(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
      float* const gathered = !x && pixels.strided() ? thread_scratch(count * c) : nullptr;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % blocks * count, group = task / blocks;
        PointwiseTile t = tile(first, std::min(count, rows - first), panels * group / groups,
                               panels * (group + 1) / groups);
        t.x = x ? x + first * c : read(first, t.rows, gathered);
        kernels.product(t);
      }
    });
  }

  // With weights that are used once. Large ones are packed a panel at a time, which its thread
  // multiplies all pixels by while it is in its L2 cache.
  void run(const Matrix& matrix) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t rows = pixels.count, c = pixels.channels;
    const int64_t panel_floats = c * kernels.columns;
    if (k * c * int64_t{sizeof(float)} < kLargeWeightBytes ||
        rows * c * int64_t{sizeof(float)} > kManyPixelsBytes || panels < threads) {
      float* const packed = thread_scratch<kShared>(panels * panel_floats);
      matrix.pack(nullptr, packed);
      whole.u = packed;
      run();
      return;
    }
    const float* const x = read_all();
    share_out(0, panels, 1, [&](int64_t begin, int64_t end) {
      float* const packed = thread_scratch(panel_floats);
      for (int64_t panel = begin; panel < end; ++panel) {
        matrix.pack(panel, 0, c, nullptr, packed);
        PointwiseTile t = tile(0, rows, panel, panel + 1);
        t.u = packed;
        t.x = x;
        kernels.product(t);
      }
    });
  }
};

// out = act(conv(x, weight) + shift + residual), padding 0.
void pointwise_conv(const Tensor& x, const Tensor& packed, const OptionalTensor& shift,
                    const OptionalTensor& residual, bool relu, int64_t stride_h, int64_t stride_w,
                    const Tensor& out) {
  check_activation(x, "x");
  check_float(x, "x");
  check_activation(out, "out");
  check_float(out, "out");
  check_channel_vector(shift, "shift", out);
  check_float(packed, "packed");
  const Pixels pixels(x, stride_h, stride_w);
  check_convolution(x, pixels, residual, out);
  const int64_t c = x.size(1), k = out.size(1), columns = pointwise_kernels().columns;
  STD_TORCH_CHECK(packed.dim() == 3 && packed.size(0) == ceil_div(k, columns) &&
                      packed.size(1) == c && packed.size(2) == columns && packed.is_contiguous(),
                  "packed must be what pointwise_weight made for C = ", c, ", K = ", k,
                  " on this instruction set, got ", shape_of(packed));
  check_memory({{"out", out, Access::whole}}, {{"x", x, Access::whole},
                                               {"packed", packed, Access::whole},
                                               {"shift", shift, Access::whole}});
  check_memory({{"out", out}}, {{"residual", residual}});
  if (out.numel() == 0) return;
  Convolution conv(pixels, residual, out);
  conv.whole.u = static_cast<const float*>(packed.const_data_ptr());
  conv.whole.shift = floats(shift);
  conv.whole.relu = relu;
  conv.run();
}

// out = conv(x, weight) + residual, or with the transposed weight: the input's gradient at stride
// 1; padding 0.
void pointwise_conv_once(const Tensor& x, const Tensor& weight, bool transposed,
                         const OptionalTensor& residual, int64_t stride_h, int64_t stride_w,
                         const Tensor& out) {
  check_activation(x, "x");
  check_float(x, "x");
  check_activation(out, "out");
  check_float(out, "out");
  check_filter(weight);
  const Pixels pixels(x, stride_h, stride_w);
  check_convolution(x, pixels, residual, out);
  const Matrix matrix(weight, transposed);
  STD_TORCH_CHECK(matrix.c == x.size(1) && matrix.k == out.size(1),
                  "weight must be [K, C, 1, 1] for C = ", transposed ? out.size(1) : x.size(1),
                  ", K = ", transposed ? x.size(1) : out.size(1), ", got ", shape_of(weight));
  check_memory({{"out", out, Access::whole}},
               {{"x", x, Access::whole}, {"weight", weight, Access::whole}});
  check_memory({{"out", out}}, {{"residual", residual}});
  if (out.numel() == 0) return;
  Convolution(pixels, residual, out).run(matrix);
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("pointwise_weight", TORCH_BOX(&resfast::pointwise_weight));
  m.impl("pointwise_conv", TORCH_BOX(&resfast::pointwise_conv));
  m.impl("pointwise_conv_once", TORCH_BOX(&resfast::pointwise_conv_once));
}
