// Winograd convolution on NHWC float32: entry points, weights, the cut into blocks of tiles.
//
// Where U is small each thread takes blocks of tiles through all three phases, so that V and M stay
// in its L2 cache. Where U is large (many channels), it must not be read once per block: the phases
// follow each other over all tiles at once, and the threads share out the points; or, where filters
// are used once, the panels, whose filters they make a few channels at a time and never store
// whole.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/sharing.h"
#include "cpu/winograd_kernels.h"

namespace resfast {
namespace {

constexpr int64_t kBlockBytes = 448 * 1024;           // of V and M of one thread's block
constexpr int64_t kSharedBytes = 10 * 1024 * 1024;    // of V and M of all threads' common block
constexpr int64_t kWholeBytes = 20 * 1024 * 1024;     // of all V and D at once, in the L3 cache
constexpr int64_t kPanelTiles = 64;                   // whose products stay in an L2 cache
constexpr int64_t kMostPanelBlocks = 2;               // each makes the filters anew
constexpr int64_t kPrivateWeightBytes = 1024 * 1024;  // each thread reads them all
constexpr int64_t kPanelWeightBytes = 4 * 1024 * 1024;
constexpr int64_t kLeastTiles = 12;
constexpr int64_t kTileGrain = 4;
constexpr int kOutside = kShared + 1;  // slot of scratch memory
constexpr int64_t kPointPadding = 16;  // floats: keeps the points out of one cache set

const WinogradKernels& winograd_kernels() {
  return RESFAST_PICK(winograd_kernels);
}

// The form with tiles of so many outputs a side, for convolutions of this stride.
int find_form(int64_t tile, int64_t stride) {
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  for (int form = 0; form < kForms; ++form) {
    if (kWinogradForms[form].tile == tile && kWinogradForms[form].stride == stride) return form;
  }
  STD_TORCH_CHECK(false, "tile must be 2", stride == 1 ? " or 4" : "", " at stride ", stride,
                  ", got ", tile);
}

int64_t filters_of(int form) {
  return kWinogradForms[form].filters * kWinogradForms[form].filters;
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

// A filter, or its transpose turned by 180°, with which the input's gradient convolves.
struct Filter {
  const float* w;
  int64_t k, c;
  int64_t k_stride, c_stride, row_stride, tap_stride;

  Filter(const Tensor& weight, bool transposed)
      : w(static_cast<const float*>(weight.const_data_ptr())),
        k(weight.size(transposed ? 1 : 0)),
        c(weight.size(transposed ? 0 : 1)),
        k_stride(weight.stride(transposed ? 1 : 0)),
        c_stride(weight.stride(transposed ? 0 : 1)),
        row_stride(weight.stride(2)),
        tap_stride(weight.stride(3)) {
    if (!transposed) return;
    w += 2 * row_stride + 2 * tap_stride;
    row_stride = -row_stride;
    tap_stride = -tap_stride;
  }

  // Channels [begin, end) of a panel to the points, the first of them at u.
  void to_points(int64_t panel, int64_t begin, int64_t end, int form, float* u,
                 int64_t point_stride) const {
    const WinogradKernels& kernels = winograd_kernels();
    WinogradWeight t{};
    t.channels = end - begin;
    t.columns = std::min<int64_t>(kernels.columns, k - panel * kernels.columns);
    t.w = w + panel * kernels.columns * k_stride + begin * c_stride;
    t.column_stride = k_stride;
    t.channel_stride = c_stride;
    t.row_stride = row_stride;
    t.tap_stride = tap_stride;
    t.u = u;
    t.point_stride = point_stride;
    kernels.weight[form](t);
  }

  // All of it: u [filters][panels][c][columns], zero beyond k.
  void to_points(int form, float* u, int64_t point_stride) const {
    const int64_t columns = winograd_kernels().columns;
    constexpr int64_t kChannelGrain = 16;
    share_out(0, ceil_div(k, columns) * c, kChannelGrain, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // rows of u, panel by panel
        const int64_t panel = begin / c, stop = std::min(end, (panel + 1) * c);
        to_points(panel, begin - panel * c, stop - panel * c, form, u + begin * columns,
                  point_stride);
        begin = stop;
      }
    });
  }
};

void check_filter(const Tensor& weight) {
  check_float(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight must be [K, C, 3, 3], got ", shape_of(weight));
}

// U: [filters, ceil(K / columns), C, columns], zero beyond K.
void winograd_weight(const Tensor& weight, int64_t tile, int64_t stride, const Tensor& packed) {
  const int form = find_form(tile, stride);
  check_filter(weight);
  check_float(packed, "packed");
  const int64_t filters = filters_of(form), columns = winograd_kernels().columns;
  const Filter filter(weight, false);
  const int64_t panels = ceil_div(filter.k, columns);
  STD_TORCH_CHECK(packed.dim() == 4 && packed.size(0) == filters &&
                      is_filters(packed, panels, filter.c, columns),
                  "packed must be [", filters, ", ", panels, ", ", filter.c, ", ", columns,
                  "], contiguous but for its points, got ", shape_of(packed), " with strides ",
                  strides_of(packed));
  check_memory({{"packed", packed, Access::whole}}, {{"weight", weight, Access::whole}});
  filter.to_points(form, static_cast<float*>(packed.mutable_data_ptr()), packed.stride(0));
}

// Sums over this many channels are added up apart: rounding errors grow with the longest chain, and
// F(4×4) makes them larger, beside stock's the more the fewer channels there are. A panel's filters
// for so many stay in an L1 cache.
int64_t chain_channels(int form, int64_t channels) {
  if (form != kF4) return 256;
  return channels <= 64 ? 16 : channels < 512 ? 32 : 128;
}

// What lies outside of an image, for the length of one op.
const float* zeros(int64_t values) {
  float* const memory = thread_scratch<kOutside>(values);
  std::fill(memory, memory + values, 0.0f);
  return memory;
}

// One convolution: what every block of tiles needs.
struct Convolution {
  const WinogradKernels& kernels;
  int form;
  int64_t points, c, k, tiles;
  const float* u = nullptr;
  int64_t u_stride = 0;  // from filter to filter
  WinogradInput input{};
  WinogradOutput output{};

  Convolution(const Tensor& x, int form_, const Tensor& out)
      : kernels(winograd_kernels()),
        form(form_),
        points(side() * side()),
        c(x.size(1)),
        k(out.size(1)) {
    const int64_t p = out.size(2), q = out.size(3), tile = kWinogradForms[form].tile;
    const TileGrid grid{x.size(2), x.size(3), p, q, ceil_div(p, tile), ceil_div(q, tile)};
    tiles = x.size(0) * grid.rows * grid.columns;
    input.grid = output.grid = grid;
    input.channels = input.part = c;
    input.zeros = zeros(side() * c);
    input.x = static_cast<const float*>(x.const_data_ptr());
    output.channels = output.out_channels = k;
    output.out = static_cast<float*>(out.mutable_data_ptr());
  }

  int64_t side() const { return kWinogradForms[form].points; }
  // call(point) for all whose products take this filter
  template <class Call>
  void for_each_point(int64_t filter, Call call) const {
    const int64_t filters = kWinogradForms[form].filters;
    const int64_t row = filter / filters, column = filter % filters;
    const auto end = [&](int64_t i) { return i == filters - 1 ? side() : i + 1; };
    for (int64_t i = row; i < end(row); ++i) {
      for (int64_t j = column; j < end(column); ++j) call(i * side() + j);
    }
  }
  int64_t panels() const { return ceil_div(k, kernels.columns); }
  int64_t panel_columns(int64_t panel) const {
    return std::min<int64_t>(kernels.columns, k - panel * kernels.columns);
  }
  int64_t filter_bytes() const { return filters_of(form) * c * k * int64_t{sizeof(float)}; }

  int64_t block_floats(int64_t count) const {
    return points * (count * (c + k) + 2 * kPointPadding);
  }

  void to_points(int64_t begin, int64_t end, float* v, int64_t first, int64_t count) const {
    WinogradInput t = input;
    t.begin = begin;
    t.end = end;
    t.point_stride = count * c + kPointPadding;
    t.v = v + (begin - first) * c;
    kernels.input[form](t);
  }

  // products [begin, end) of a block of `count` tiles
  void multiply(int64_t begin, int64_t end, const float* v, float* m, int64_t count) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t filter = i / panels(), panel = i % panels();
      WinogradProduct t{};
      t.tiles = count;
      t.channels = t.v_stride = c;
      t.chain = chain_channels(form, c);
      t.columns = panel_columns(panel);
      t.u = u + filter * u_stride + panel * c * kernels.columns;
      t.m_stride = k;
      for_each_point(filter, [&](int64_t point) {
        t.v = v + point * (count * c + kPointPadding);
        t.m = m + point * (count * k + kPointPadding) + panel * kernels.columns;
        kernels.product(t);
      });
    }
  }

  void from_points(int64_t begin, int64_t end, const float* m, int64_t first, int64_t count) const {
    WinogradOutput t = output;
    t.begin = begin;
    t.end = end;
    t.point_stride = count * k + kPointPadding;
    t.m = m + (begin - first) * k;
    kernels.output[form](t);
  }

  int64_t products() const { return filters_of(form) * panels(); }

  // With filters that are there.
  void run() const {
    if (filter_bytes() <= kPrivateWeightBytes) {
      run_private();
    } else {
      run_shared();
    }
  }

  // With filters that are used once.
  void run(const Filter& filter) {
    const int64_t threads = torch::stable::get_num_threads();
    const bool large = filter_bytes() > kPanelWeightBytes;
    if (large && tiles <= kMostPanelBlocks * kPanelTiles && panels() >= threads) {
      run_by_panels(filter);
      return;
    }
    u_stride = panels() * c * kernels.columns + kPointPadding;
    float* const memory = thread_scratch<kShared>(filters_of(form) * u_stride);
    filter.to_points(form, memory, u_stride);
    u = memory;
    run();
  }

  void run_private() const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t fitting =
        std::max(kLeastTiles, kBlockBytes / (points * (c + k) * int64_t{sizeof(float)}));
    // as many blocks for each thread, all of about one size
    const int64_t rounds = ceil_div(tiles, fitting * threads);
    const int64_t count = std::max(kLeastTiles, ceil_div(tiles, rounds * threads));
    share_out(0, ceil_div(tiles, count), 1, [&](int64_t begin, int64_t end) {
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
      share_out(first, first + size, kTileGrain,
                [&](int64_t begin, int64_t end) { to_points(begin, end, v, first, size); });
      share_out(0, products(), 1,
                [&](int64_t begin, int64_t end) { multiply(begin, end, v, m, size); });
      share_out(first, first + size, kTileGrain,
                [&](int64_t begin, int64_t end) { from_points(begin, end, m, first, size); });
    }
  }

  // Each thread takes panels; a panel's filters and products stay in its L2 cache.
  void run_by_panels(const Filter& filter) const {
    const int64_t blocks = ceil_div(tiles, kPanelTiles), count = ceil_div(tiles, blocks);
    const int64_t channels = chain_channels(form, c), parts = ceil_div(c, channels);
    const int64_t columns = kernels.columns;
    const int64_t filter_stride = channels * columns + kPointPadding;
    const int64_t product_stride = count * columns + kPointPadding;
    const int64_t v_stride = count * channels + kPointPadding, part_stride = points * v_stride;
    float* const v = thread_scratch<kShared>(parts * part_stride);
    for (int64_t first = 0; first < tiles; first += count) {
      const int64_t size = std::min(count, tiles - first);
      share_out(first, first + size, kTileGrain, [&](int64_t begin, int64_t end) {
        WinogradInput t = input;
        t.begin = begin;
        t.end = end;
        t.point_stride = v_stride;
        t.part = channels;
        t.part_stride = part_stride;
        t.v = v + (begin - first) * channels;
        kernels.input[form](t);
      });
      share_out(0, panels(), 1, [&](int64_t begin, int64_t end) {
        const int64_t filter_floats = filters_of(form) * filter_stride;
        float* const filters = thread_scratch(filter_floats + points * product_stride);
        float* const m = filters + filter_floats;
        for (int64_t panel = begin; panel < end; ++panel) {
          WinogradProduct t{};
          t.tiles = size;
          t.chain = t.v_stride = channels;
          t.columns = t.m_stride = panel_columns(panel);
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t channel = part * channels;
            t.channels = std::min(channels, c - channel);
            t.add = part > 0;
            filter.to_points(panel, channel, channel + t.channels, form, filters, filter_stride);
            for (int64_t at = 0; at < filters_of(form); ++at) {
              t.u = filters + at * filter_stride;
              for_each_point(at, [&](int64_t point) {
                t.v = v + part * part_stride + point * v_stride;
                t.m = m + point * product_stride;
                kernels.product(t);
              });
            }
          }
          WinogradOutput out = output;
          out.begin = first;
          out.end = first + size;
          out.channels = t.columns;
          out.m = m;
          out.point_stride = product_stride;
          out.out += panel * columns;
          if (out.residual) out.residual += panel * columns;
          kernels.output[form](out);
        }
      });
    }
  }
};

void check_convolution(const Tensor& x, const char* x_name, const Tensor& z, const char* z_name,
                       int64_t stride) {
  check_activation(x, x_name);
  check_float(x, x_name);
  check_activation(z, z_name);
  check_float(z, z_name);
  const int64_t c = x.size(1), k = z.size(1), lanes = winograd_kernels().lanes;
  const int64_t p = ceil_div(x.size(2), stride), q = ceil_div(x.size(3), stride);
  STD_TORCH_CHECK(z.size(0) == x.size(0) && z.size(2) == p && z.size(3) == q, z_name, " must be [",
                  x.size(0), ", K, ", p, ", ", q, "], got ", shape_of(z));
  STD_TORCH_CHECK(c % lanes == 0 && k % lanes == 0, "channels must be multiples of ", lanes,
                  ", got C = ", c, ", K = ", k);
}

const float* floats(const OptionalTensor& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// out = act(conv(x, weight)·scale + shift + residual), or act(…) + residual; padding 1.
void winograd_conv(const Tensor& x, const Tensor& packed, const OptionalTensor& scale,
                   const OptionalTensor& shift, const OptionalTensor& residual, bool relu,
                   bool add_after_act, int64_t stride, const Tensor& out) {
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  check_convolution(x, "x", out, "out", stride);
  check_activation_like(residual, "residual", out, "out");
  check_channel_vector(scale, "scale", out);
  check_channel_vector(shift, "shift", out);
  check_float(packed, "packed");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift must come together");
  const WinogradKernels& kernels = winograd_kernels();
  const int64_t c = x.size(1), k = out.size(1);
  const bool f4 = packed.dim() == 4 && packed.size(0) == filters_of(kF4);
  const int form = stride == 2 ? kF2Stride2 : f4 ? kF4 : kF2;
  STD_TORCH_CHECK(packed.dim() == 4 && packed.size(0) == filters_of(form) &&
                      is_filters(packed, ceil_div(k, kernels.columns), c, kernels.columns),
                  "packed must be what winograd_weight made for C = ", c, ", K = ", k,
                  " on this instruction set, got ", shape_of(packed));
  check_memory({{"out", out, Access::whole}}, {{"x", x, Access::whole},
                                               {"packed", packed, Access::whole},
                                               {"scale", scale, Access::whole},
                                               {"shift", shift, Access::whole}});
  check_memory({{"out", out}}, {{"residual", residual}});
  if (out.numel() == 0) return;

  Convolution conv(x, form, out);
  conv.u = static_cast<const float*>(packed.const_data_ptr());
  conv.u_stride = packed.stride(0);
  conv.output.scale = floats(scale);
  conv.output.shift = floats(shift);
  conv.output.residual = floats(residual);
  conv.output.relu = relu;
  conv.output.add_after_act = add_after_act;
  conv.run();
}

// out = conv(x, weight) + residual, or with its transpose turned by 180°: at stride 1 the input's
// gradient; padding 1.
void winograd_conv_once(const Tensor& x, const Tensor& weight, bool transposed,
                        const OptionalTensor& residual, int64_t tile, int64_t stride,
                        const Tensor& out) {
  const int form = find_form(tile, stride);
  check_filter(weight);
  check_convolution(x, "x", out, "out", stride);
  check_activation_like(residual, "residual", out, "out");
  STD_TORCH_CHECK(weight.size(transposed ? 0 : 1) == x.size(1) &&
                      weight.size(transposed ? 1 : 0) == out.size(1),
                  "weight must be [K, C, 3, 3] for C = ", transposed ? out.size(1) : x.size(1),
                  ", K = ", transposed ? x.size(1) : out.size(1), ", got ", shape_of(weight));
  check_memory({{"out", out, Access::whole}},
               {{"x", x, Access::whole}, {"weight", weight, Access::whole}});
  check_memory({{"out", out}}, {{"residual", residual}});
  if (out.numel() == 0) return;
  Convolution conv(x, form, out);
  conv.output.residual = floats(residual);
  conv.run(Filter(weight, transposed));
}

// dweight = Σ over images and places of dz·x: at each point a product over the tiles, so the same
// number of multiplications is saved. Chains end at kTilesInChain; their sums are added in order.
struct WeightGradient {
  static constexpr int64_t kTilesInChain = 32;
  static constexpr int64_t kMostInTask = 64, kChannelsInTask = 48;
  static constexpr int64_t kChannelsInLine = 16;

  const WinogradKernels& kernels;
  int form;
  int64_t points, c, k, tiles;
  int64_t task_channels;  // of x
  WinogradInput input{}, gradient{};
  WinogradWeightGradient output{};

  WeightGradient(const Tensor& x, const Tensor& dz, int form_, const Tensor& dweight)
      : kernels(winograd_kernels()), form(form_), c(x.size(1)), k(dz.size(1)) {
    const int64_t h = x.size(2), w = x.size(3);
    const int64_t tile = kWinogradForms[form].tile, side = kWinogradForms[form].points;
    const TileGrid grid{h, w, h, w, ceil_div(h, tile), ceil_div(w, tile)};
    points = side * side;
    task_channels = c <= kMostInTask ? std::max<int64_t>(c, 1) : kChannelsInTask;
    tiles = x.size(0) * grid.rows * grid.columns;
    input.grid = gradient.grid = grid;
    input.channels = c;
    input.zeros = gradient.zeros = zeros(side * std::max(c, k));
    input.x = static_cast<const float*>(x.const_data_ptr());
    gradient.channels = k;
    gradient.x = static_cast<const float*>(dz.const_data_ptr());
    output.w = static_cast<float*>(dweight.mutable_data_ptr());
    output.column_stride = dweight.stride(0);
    output.channel_stride = dweight.stride(1);
    output.row_stride = dweight.stride(2);
    output.tap_stride = dweight.stride(3);
  }

  int64_t panels() const { return ceil_div(k, kernels.columns); }
  int64_t panel_columns(int64_t panel) const {
    return std::min<int64_t>(kernels.columns, k - panel * kernels.columns);
  }
  int64_t tasks() const { return ceil_div(c, task_channels); }

  // Tiles at the points: [parts][points][tiles][channels of a part]. Parts are as wide as a product
  // reads them: tiles of many channels would share a few sets of the cache.
  struct Block {
    int64_t first, size;
    float* v;
    int64_t part;

    int64_t point_stride() const { return size * part + kPointPadding; }
  };

  int64_t tiles_in(int64_t bytes) const {
    return std::max<int64_t>(1, bytes / (points * (c + k) * int64_t{sizeof(float)}));
  }
  int64_t block_floats(int64_t count, int64_t channels, int64_t part) const {
    return ceil_div(channels, part) * points * (count * part + kPointPadding);
  }

  void to_points(const Block& v, const Block& d) const {
    share_out(v.first, v.first + v.size, kTileGrain, [&](int64_t begin, int64_t end) {
      const auto transform = [&](const WinogradInput& whole, const Block& b, auto kernel) {
        WinogradInput t = whole;
        t.begin = begin;
        t.end = end;
        t.v = b.v + (begin - b.first) * b.part;
        t.point_stride = b.point_stride();
        t.part = b.part;
        t.part_stride = points * b.point_stride();
        kernel(t);
      };
      transform(input, v, kernels.input[form]);
      transform(gradient, d, kernels.gradient[form]);
    });
  }

  // One point's sums of a part's channels of x and of d's panel of dz's.
  void correlate(const Block& v, const Block& d, int64_t point, int64_t part, int64_t channels,
                 int64_t panel, float* sums, int64_t sum_stride) const {
    WinogradCorrelation t{};
    t.channels = channels;
    t.columns = panel_columns(panel);
    t.v_stride = v.part;
    t.d_stride = d.part;
    t.sums = sums;
    t.sum_stride = sum_stride;
    const float* const v_point = v.v + (part * points + point) * v.point_stride();
    const float* const d_point = d.v + (panel * points + point) * d.point_stride();
    for (int64_t chain = 0; chain < v.size; chain += kTilesInChain) {
      t.tiles = std::min(kTilesInChain, v.size - chain);
      t.v = v_point + chain * v.part;
      t.d = d_point + chain * d.part;
      t.add = v.first + chain > 0;
      kernels.correlation(t);
    }
  }

  void from_points(int64_t channel, int64_t channels, int64_t panel, const float* sums,
                   int64_t sum_stride, int64_t point_stride) const {
    WinogradWeightGradient t = output;
    t.channels = channels;
    t.columns = panel_columns(panel);
    t.sums = sums;
    t.sum_stride = sum_stride;
    t.point_stride = point_stride;
    t.w += panel * kernels.columns * t.column_stride + channel * t.channel_stride;
    kernels.weight_gradient[form](t);
  }

  void run() const {
    // Many sums of few tiles are made and used a part at a time: they would go through memory.
    const int64_t sum_bytes = points * c * k * int64_t{sizeof(float)};
    if (sum_bytes > kSharedBytes && tiles > 0 && tiles <= tiles_in(kWholeBytes)) {
      run_by_panels();
    } else {
      run_by_points();
    }
  }

  void run_by_panels() const {
    const int64_t columns = kernels.columns;
    float* const memory = thread_scratch<kShared>(block_floats(tiles, c, task_channels) +
                                                  block_floats(tiles, k, columns));
    const Block v{0, tiles, memory, task_channels};
    const Block d{0, tiles, memory + block_floats(tiles, c, task_channels), columns};
    to_points(v, d);
    const int64_t point_stride = task_channels * columns + kPointPadding;
    share_out(0, panels() * tasks(), 1, [&](int64_t begin, int64_t end) {
      float* const sums = thread_scratch(points * point_stride);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i / tasks(), task = i % tasks(), channel = task * task_channels;
        const int64_t channels = std::min(task_channels, c - channel);
        for (int64_t point = 0; point < points; ++point) {
          correlate(v, d, point, task, channels, panel, sums + point * point_stride, columns);
        }
        from_points(channel, channels, panel, sums, columns, point_stride);
      }
    });
  }

  void run_by_points() const {
    const int64_t count =
        std::min(std::max<int64_t>(1, tiles), round_up(tiles_in(kSharedBytes), kTilesInChain));
    const int64_t sum_stride = c * k + kPointPadding;
    const int64_t columns = kernels.columns, v_floats = block_floats(count, c, task_channels);
    float* const memory =
        thread_scratch<kShared>(v_floats + block_floats(count, k, columns) + points * sum_stride);
    float* const sums = memory + v_floats + block_floats(count, k, columns);
    if (tiles == 0) std::fill(sums, sums + points * sum_stride, 0.0f);
    for (int64_t first = 0; first < tiles; first += count) {
      const int64_t size = std::min(count, tiles - first);
      const Block v{first, size, memory, task_channels};
      const Block d{first, size, memory + v_floats, columns};
      to_points(v, d);
      share_out(0, points * tasks(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t point = i / tasks(), task = i % tasks(), channel = task * task_channels;
          float* const rows = sums + point * sum_stride + channel * k;
          for (int64_t panel = 0; panel < panels(); ++panel) {
            correlate(v, d, point, task, std::min(task_channels, c - channel), panel,
                      rows + panel * columns, k);
          }
        }
      });
    }
    share_out(0, ceil_div(c, kChannelsInLine), 1, [&](int64_t begin, int64_t end) {
      const int64_t channel = begin * kChannelsInLine;
      const int64_t channels = std::min(c, end * kChannelsInLine) - channel;
      for (int64_t panel = 0; panel < panels(); ++panel) {
        from_points(channel, channels, panel, sums + channel * k + panel * kernels.columns, k,
                    sum_stride);
      }
    });
  }
};

void winograd_wgrad(const Tensor& x, const Tensor& dz, int64_t tile, const Tensor& dweight) {
  const int form = find_form(tile, 1);
  check_convolution(x, "x", dz, "dz", 1);
  check_float(dweight, "dweight");
  STD_TORCH_CHECK(dweight.dim() == 4 && dweight.size(0) == dz.size(1) &&
                      dweight.size(1) == x.size(1) && dweight.size(2) == 3 && dweight.size(3) == 3,
                  "dweight must be [", dz.size(1), ", ", x.size(1), ", 3, 3], got ",
                  shape_of(dweight));
  check_memory({{"dweight", dweight, Access::whole}},
               {{"x", x, Access::whole}, {"dz", dz, Access::whole}});
  WeightGradient(x, dz, form, dweight).run();
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&resfast::winograd_weight));
  m.impl("winograd_conv", TORCH_BOX(&resfast::winograd_conv));
  m.impl("winograd_conv_once", TORCH_BOX(&resfast::winograd_conv_once));
  m.impl("winograd_wgrad", TORCH_BOX(&resfast::winograd_wgrad));
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CompositeExplicitAutograd, m) {
  m.impl("panel_columns", TORCH_BOX(&resfast::panel_columns));
}
