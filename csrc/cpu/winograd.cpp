// Winograd convolution on NHWC float32: entry points, weights, the cut into blocks of tiles.
//
// Where U is small each thread takes blocks of tiles through all three phases, so that V and M stay
// in its L2 cache. Where U is large (many channels), it must not be read once per block: the phases
// follow each other over all tiles at once, and the threads share out the points.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/winograd_kernels.h"

namespace resfast {
namespace {

constexpr int64_t kBlockBytes = 448 * 1024;         // of V and M of one thread's block
constexpr int64_t kSharedBytes = 10 * 1024 * 1024;  // of V and M of all threads' common block
constexpr int64_t kPrivateWeightBytes = 4 * 1024 * 1024;
constexpr int64_t kLeastTiles = 12;
constexpr int64_t kPointPadding = 16;  // floats: keeps the points out of one cache set

const WinogradKernels& winograd_kernels() {
  return RESFAST_PICK(winograd_kernels);
}

void check_tile(int64_t tile) {
  STD_TORCH_CHECK(tile == 2 || tile == 4, "tile must be 2 or 4, got ", tile);
}

// Filters at the points: points may lie further apart than their values take.
bool is_filters(const Tensor& packed, int64_t panels, int64_t c, int64_t columns) {
  return packed.dim() == 4 && packed.size(1) == panels && packed.size(2) == c &&
         packed.size(3) == columns && packed.stride(3) == 1 && packed.stride(2) == columns &&
         packed.stride(1) == c * columns && packed.stride(0) >= panels * c * columns;
}

int64_t panel_columns() {
  return winograd_kernels().columns;
}

// U: [points, ceil(K / columns), C, columns], zero beyond K.
void winograd_weight(const Tensor& weight, bool transposed, int64_t tile, const Tensor& packed) {
  check_tile(tile);
  check_float(weight, "weight");
  check_float(packed, "packed");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight must be [K, C, 3, 3], got ", shape_of(weight));
  const int64_t side = tile + 2, columns = winograd_kernels().columns;
  const int64_t k = weight.size(transposed ? 1 : 0), c = weight.size(transposed ? 0 : 1);
  const int64_t panels = ceil_div(k, columns);
  STD_TORCH_CHECK(
      packed.dim() == 4 && packed.size(0) == side * side && is_filters(packed, panels, c, columns),
      "packed must be [", side * side, ", ", panels, ", ", c, ", ", columns,
      "], contiguous but for its points, got ", shape_of(packed), " with strides ",
      strides_of(packed));
  check_memory({{"packed", packed, Access::whole}}, {{"weight", weight, Access::whole}});
  const float* w = static_cast<const float*>(weight.const_data_ptr());
  float* u = static_cast<float*>(packed.mutable_data_ptr());
  WinogradWeight t{};
  t.column_stride = weight.stride(transposed ? 1 : 0);
  t.channel_stride = weight.stride(transposed ? 0 : 1);
  t.row_stride = weight.stride(2);
  t.tap_stride = weight.stride(3);
  t.point_stride = packed.stride(0);
  if (transposed) {  // the gradient convolves with the filter turned by 180°
    w += 2 * t.row_stride + 2 * t.tap_stride;
    t.row_stride = -t.row_stride;
    t.tap_stride = -t.tap_stride;
  }
  const auto transform = winograd_kernels().weight[tile / 4];
  constexpr int64_t kChannelGrain = 16;
  torch::stable::parallel_for(0, panels * c, kChannelGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // rows of u, panel by panel
      const int64_t panel = begin / c;
      const int64_t stop = std::min(end, (panel + 1) * c);
      WinogradWeight part = t;
      part.begin = begin - panel * c;
      part.end = stop - panel * c;
      part.columns = std::min(columns, k - panel * columns);
      part.w = w + panel * columns * t.column_stride;
      part.u = u + panel * c * columns;
      transform(part);
      begin = stop;
    }
  });
}

// One convolution: what every block of tiles needs.
struct Convolution {
  const WinogradKernels& kernels;
  int64_t tile, points, c, k, tiles;
  const float* u;
  int64_t u_stride;  // from point to point
  WinogradInput input{};
  WinogradOutput output{};

  int64_t block_floats(int64_t count) const {
    return points * (count * (c + k) + 2 * kPointPadding);
  }

  void to_points(int64_t begin, int64_t end, float* v, int64_t first, int64_t count) const {
    WinogradInput t = input;
    t.begin = begin;
    t.end = end;
    t.point_stride = count * c + kPointPadding;
    t.v = v + (begin - first) * c;
    kernels.input[tile / 4](t);
  }

  // points [begin, end) of a block of `count` tiles
  void multiply(int64_t begin, int64_t end, const float* v, float* m, int64_t count) const {
    const int64_t panels = ceil_div(k, kernels.columns);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t point = i / panels, panel = i % panels;
      WinogradProduct t{};
      t.tiles = count;
      t.channels = c;
      t.columns = std::min<int64_t>(kernels.columns, k - panel * kernels.columns);
      t.v = v + point * (count * c + kPointPadding);
      t.u = u + point * u_stride + panel * c * kernels.columns;
      t.m = m + point * (count * k + kPointPadding) + panel * kernels.columns;
      t.m_stride = k;
      kernels.product(t);
    }
  }

  void from_points(int64_t begin, int64_t end, const float* m, int64_t first, int64_t count) const {
    WinogradOutput t = output;
    t.begin = begin;
    t.end = end;
    t.point_stride = count * k + kPointPadding;
    t.m = m + (begin - first) * k;
    kernels.output[tile / 4](t);
  }

  int64_t products() const { return points * ceil_div(k, kernels.columns); }

  void run_private() const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t fitting =
        std::max(kLeastTiles, kBlockBytes / (points * (c + k) * int64_t{sizeof(float)}));
    // as many blocks for each thread, all of about one size
    const int64_t rounds = ceil_div(tiles, fitting * threads);
    const int64_t count = std::max(kLeastTiles, ceil_div(tiles, rounds * threads));
    torch::stable::parallel_for(0, ceil_div(tiles, count), 1, [&](int64_t begin, int64_t end) {
      float* v = thread_scratch(block_floats(count));
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * count, last = std::min(tiles, first + count);
        float* m = v + points * ((last - first) * c + kPointPadding);
        to_points(first, last, v, first, last - first);
        multiply(0, products(), v, m, last - first);
        from_points(first, last, m, first, last - first);
      }
    });
  }

  void run_shared() const {
    const int64_t fitting =
        std::max(kLeastTiles, kSharedBytes / (points * (c + k) * int64_t{sizeof(float)}));
    const int64_t blocks = ceil_div(tiles, fitting), count = ceil_div(tiles, blocks);
    float* v = thread_scratch(block_floats(count));
    for (int64_t first = 0; first < tiles; first += count) {
      const int64_t size = std::min(count, tiles - first);
      float* m = v + points * (size * c + kPointPadding);
      torch::stable::parallel_for(first, first + size, 1, [&](int64_t begin, int64_t end) {
        to_points(begin, end, v, first, size);
      });
      torch::stable::parallel_for(
          0, products(), 1, [&](int64_t begin, int64_t end) { multiply(begin, end, v, m, size); });
      torch::stable::parallel_for(first, first + size, 1, [&](int64_t begin, int64_t end) {
        from_points(begin, end, m, first, size);
      });
    }
  }
};

// out = act(conv(x, weight)·scale + shift + residual), or act(…) + residual; padding 1.
void winograd_conv(const Tensor& x, const Tensor& packed, const OptionalTensor& scale,
                   const OptionalTensor& shift, const OptionalTensor& residual, bool relu,
                   bool add_after_act, const Tensor& out) {
  check_activation(x, "x");
  check_float(x, "x");
  check_activation(out, "out");
  check_float(out, "out");
  check_activation_like(residual, "residual", out, "out");
  check_channel_vector(scale, "scale", out);
  check_channel_vector(shift, "shift", out);
  check_float(packed, "packed");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift must come together");
  const WinogradKernels& kernels = winograd_kernels();
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), k = out.size(1);
  STD_TORCH_CHECK(out.size(0) == n && out.size(2) == h && out.size(3) == w, "out must be [", n,
                  ", K, ", h, ", ", w, "], got ", shape_of(out));
  STD_TORCH_CHECK(c % kernels.lanes == 0 && k % kernels.lanes == 0,
                  "channels must be multiples of ", kernels.lanes, ", got C = ", c, ", K = ", k);
  STD_TORCH_CHECK(packed.dim() == 4 && (packed.size(0) == 16 || packed.size(0) == 36) &&
                      is_filters(packed, ceil_div(k, kernels.columns), c, kernels.columns),
                  "packed must be what winograd_weight made for C = ", c, ", K = ", k,
                  " on this instruction set, got ", shape_of(packed));
  check_memory({{"out", out, Access::whole}}, {{"x", x, Access::whole},
                                               {"packed", packed, Access::whole},
                                               {"scale", scale, Access::whole},
                                               {"shift", shift, Access::whole}});
  check_memory({{"out", out}}, {{"residual", residual}});
  if (out.numel() == 0) return;

  const auto floats = [](const OptionalTensor& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  const int64_t tile = packed.size(0) == 16 ? 2 : 4;
  TileGrid grid{};
  grid.h = h;
  grid.w = w;
  grid.rows = ceil_div(h, tile);
  grid.columns = ceil_div(w, tile);
  Convolution conv{kernels,
                   tile,
                   packed.size(0),
                   c,
                   k,
                   n * grid.rows * grid.columns,
                   static_cast<const float*>(packed.const_data_ptr()),
                   packed.stride(0)};
  conv.input.grid = conv.output.grid = grid;
  conv.input.channels = c;
  conv.input.x = static_cast<const float*>(x.const_data_ptr());
  conv.output.channels = k;
  conv.output.scale = floats(scale);
  conv.output.shift = floats(shift);
  conv.output.residual = floats(residual);
  conv.output.relu = relu;
  conv.output.add_after_act = add_after_act;
  conv.output.out = static_cast<float*>(out.mutable_data_ptr());
  if (conv.points * c * k * int64_t{sizeof(float)} <= kPrivateWeightBytes) {
    conv.run_private();
  } else {
    conv.run_shared();
  }
}

// dweight = Σ over images and places of dz·x: at each point a product over the tiles, so the same
// number of multiplications is saved. Chains end at kTilesInChain; their sums are added in order.
void winograd_wgrad(const Tensor& x, const Tensor& dz, int64_t tile, const Tensor& dweight) {
  check_tile(tile);
  check_activation(x, "x");
  check_float(x, "x");
  check_activation(dz, "dz");
  check_float(dz, "dz");
  check_float(dweight, "dweight");
  const WinogradKernels& kernels = winograd_kernels();
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), k = dz.size(1);
  STD_TORCH_CHECK(dz.size(0) == n && dz.size(2) == h && dz.size(3) == w, "dz must be [", n, ", K, ",
                  h, ", ", w, "], got ", shape_of(dz));
  STD_TORCH_CHECK(c % kernels.lanes == 0 && k % kernels.lanes == 0,
                  "channels must be multiples of ", kernels.lanes, ", got C = ", c, ", K = ", k);
  STD_TORCH_CHECK(dweight.dim() == 4 && dweight.size(0) == k && dweight.size(1) == c &&
                      dweight.size(2) == 3 && dweight.size(3) == 3,
                  "dweight must be [", k, ", ", c, ", 3, 3], got ", shape_of(dweight));
  check_memory({{"dweight", dweight, Access::whole}},
               {{"x", x, Access::whole}, {"dz", dz, Access::whole}});
  constexpr int64_t kTilesInChain = 32;
  constexpr int64_t kChannelsInTask = 48;
  const int64_t points = (tile + 2) * (tile + 2);
  TileGrid grid{h, w, ceil_div(h, tile), ceil_div(w, tile)};
  const int64_t tiles = n * grid.rows * grid.columns;
  const int64_t fitting = kSharedBytes / (points * (c + k) * int64_t{sizeof(float)});
  const int64_t count =
      std::min(std::max<int64_t>(1, tiles), round_up(std::max<int64_t>(1, fitting), kTilesInChain));
  const int64_t v_stride = count * c + kPointPadding, d_stride = count * k + kPointPadding;
  const int64_t sum_stride = c * k + kPointPadding;
  float* v = thread_scratch(points * (v_stride + d_stride + sum_stride));
  float* d = v + points * v_stride;
  float* sums = d + points * d_stride;
  WinogradInput input{}, gradient{};
  input.grid = gradient.grid = grid;
  input.channels = c;
  input.x = static_cast<const float*>(x.const_data_ptr());
  input.point_stride = v_stride;
  gradient.channels = k;
  gradient.x = static_cast<const float*>(dz.const_data_ptr());
  gradient.point_stride = d_stride;
  const int64_t tasks = ceil_div(c, kChannelsInTask);
  if (tiles == 0) std::fill(sums, sums + points * sum_stride, 0.0f);
  for (int64_t first = 0; first < tiles; first += count) {
    const int64_t size = std::min(count, tiles - first);
    torch::stable::parallel_for(first, first + size, 1, [&](int64_t begin, int64_t end) {
      WinogradInput part = input;
      part.begin = begin;
      part.end = end;
      part.v = v + (begin - first) * c;
      kernels.input[tile / 4](part);
      part = gradient;
      part.begin = begin;
      part.end = end;
      part.v = d + (begin - first) * k;
      kernels.gradient[tile / 4](part);
    });
    torch::stable::parallel_for(0, points * tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t point = task / tasks;
        WinogradCorrelation part{};
        part.begin = task % tasks * kChannelsInTask;
        part.end = std::min(c, part.begin + kChannelsInTask);
        part.channels = c;
        part.columns = k;
        part.sums = sums + point * sum_stride;
        for (int64_t chain = 0; chain < size; chain += kTilesInChain) {
          part.tiles = std::min(kTilesInChain, size - chain);
          part.v = v + point * v_stride + chain * c;
          part.d = d + point * d_stride + chain * k;
          part.add = first + chain > 0;
          kernels.correlation(part);
        }
      }
    });
  }
  WinogradWeightGradient out{};
  out.sum_stride = k;
  out.point_stride = sum_stride;
  out.column_stride = dweight.stride(0);
  out.channel_stride = dweight.stride(1);
  out.row_stride = dweight.stride(2);
  out.tap_stride = dweight.stride(3);
  float* to = static_cast<float*>(dweight.mutable_data_ptr());
  constexpr int64_t kChannelsInBlock = 16;  // what a line of memory holds
  torch::stable::parallel_for(0, ceil_div(c, kChannelsInBlock), 1, [&](int64_t begin, int64_t end) {
    WinogradWeightGradient part = out;
    part.begin = begin * kChannelsInBlock;
    part.end = std::min(c, end * kChannelsInBlock);
    for (int64_t column = 0; column < k; column += kernels.columns) {
      part.columns = std::min<int64_t>(kernels.columns, k - column);
      part.sums = sums + column;
      part.w = to + column * part.column_stride;
      kernels.weight_gradient[tile / 4](part);
    }
  });
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&resfast::winograd_weight));
  m.impl("winograd_conv", TORCH_BOX(&resfast::winograd_conv));
  m.impl("winograd_wgrad", TORCH_BOX(&resfast::winograd_wgrad));
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CompositeExplicitAutograd, m) {
  m.impl("panel_columns", TORCH_BOX(&resfast::panel_columns));
}
