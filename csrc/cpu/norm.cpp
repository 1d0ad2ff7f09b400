// Batch-norm ops on NHWC activations: entry points, the cut into tiles, the merge of their results.
//
// An activation is a matrix of N·H·W rows by C channels. Tiles are cut by its shape alone, never by
// the number of threads, and merged in order, so that results do not depend on either.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "checks.h"
#include "cpu/norm_common.h"
#include "cpu/norm_kernels.h"
#include "cpu/sharing.h"

namespace resfast {
namespace {

constexpr int64_t kTileBytes = 128 * 1024;  // of one operand
constexpr int64_t kSmallTileBytes = 32 * 1024;
constexpr int64_t kTilesWanted = 64;  // smaller tiles rather than idle threads
constexpr int64_t kStripBytes = 2048;
constexpr int64_t kMaxFoldedChannels = 2048;

// Consecutive rows of an activation, seen as `rows` rows of `groups` runs of its channels each,
// and the grid of tiles over them.
struct Segment {
  int64_t first;  // element
  int64_t rows, groups, channels;
  int64_t tile_rows, row_tiles, strip, strips;

  Segment(int64_t first_element, int64_t row_count, int64_t group_count, int64_t channel_count,
          int64_t element_size)
      : first(first_element), rows(row_count), groups(group_count), channels(channel_count) {
    constexpr int64_t kAlign = 64;  // lanes of any vector
    strips = std::max<int64_t>(1, channels * element_size / kStripBytes);
    strip = round_up(ceil_div(channels, strips), kAlign);
    strips = ceil_div(channels, strip);
    const int64_t bytes = rows * channels * element_size;
    const int64_t wanted = std::clamp(bytes / kTilesWanted, kSmallTileBytes, kTileBytes);
    const int64_t most = std::max<int64_t>(8, wanted / (strip * element_size));
    row_tiles = ceil_div(rows, most);
    tile_rows = round_up(ceil_div(rows, row_tiles), 8);
    row_tiles = ceil_div(rows, tile_rows);
  }

  int64_t last_rows() const { return rows - (row_tiles - 1) * tile_rows; }

  // f(row tile, first row, rows, first channel, channels)
  template <class F>
  void for_each_tile(const F& f) const {
    share_out(0, row_tiles * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t tile = i / strips;
        const int64_t row = tile * tile_rows;
        const int64_t c = i % strips * strip;
        f(tile, row, std::min(tile_rows, rows - row), c, std::min(strip, channels - c));
      }
    });
  }
};

// The activation's shape and its cut. Rows that would leave vectors half empty (few channels, or a
// count that is no multiple of the vector) are taken several at a time as one longer row.
struct Plan {
  int64_t rows, channels;
  int64_t element_size, acc_size;
  Storage storage;
  const NormKernels& norm;
  int64_t fold = 1;
  std::vector<Segment> segments;

  explicit Plan(const Tensor& z)
      : rows(z.size(0) * z.size(2) * z.size(3)),
        channels(z.size(1)),
        element_size(static_cast<int64_t>(z.element_size())),
        acc_size(element_size == 8 ? 8 : 4),
        storage(storage_of(z)),
        norm(norm_kernels()) {
    if (rows == 0 || channels == 0) return;
    const int64_t lanes = norm.vector_bytes / acc_size;
    int64_t wanted = lanes / std::gcd(channels, lanes);
    while (channels * wanted < 4 * lanes) wanted *= 2;
    if (channels * wanted <= kMaxFoldedChannels && rows >= 8 * wanted) fold = wanted;
    segments.emplace_back(0, rows / fold, fold, channels * fold, element_size);
    if (rows % fold) {
      segments.emplace_back(rows / fold * fold * channels, rows % fold, 1, channels, element_size);
    }
  }

  // Partial results that a merge takes in.
  int64_t values_per_channel() const {
    int64_t values = 0;
    for (const Segment& s : segments) values += s.row_tiles * s.groups;
    return values;
  }
};

// A per-channel vector, repeated to the length of a folded row.
class Channels {
 public:
  Channels(const Tensor& t, const Plan& plan)
      : acc_size_(plan.acc_size), data_(static_cast<const char*>(t.const_data_ptr())) {
    if (plan.fold == 1) return;
    const int64_t bytes = plan.channels * acc_size_;
    repeated_ = Buffer(bytes * plan.fold);
    for (int64_t i = 0; i < plan.fold; ++i) {
      std::memcpy(repeated_.get() + i * bytes, data_, bytes);
    }
    data_ = repeated_.get();
  }
  Channels(const OptionalTensor& t, const Plan& plan)
      : Channels(t ? Channels(*t, plan) : Channels()) {}

  const void* at(int64_t channel) const { return data_ ? data_ + channel * acc_size_ : nullptr; }

 private:
  Channels() = default;

  int64_t acc_size_ = 0;
  const char* data_ = nullptr;
  Buffer repeated_;
};

class Activation {
 public:
  Activation(const Tensor& t, const Plan& plan)
      : element_size_(plan.element_size),
        data_(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))) {}
  Activation(const OptionalTensor& t, const Plan& plan)
      : element_size_(plan.element_size),
        data_(t ? static_cast<char*>(const_cast<void*>(t->const_data_ptr())) : nullptr) {}

  void* at(int64_t element) const { return data_ ? data_ + element * element_size_ : nullptr; }

 private:
  int64_t element_size_;
  char* data_;
};

// Per-tile results of one segment: `kinds` matrices [row tiles, channels] of acc_t.
class Partials {
 public:
  Partials(const Segment& s, const Plan& plan, int64_t kinds)
      : channels_(s.channels),
        acc_size_(plan.acc_size),
        plane_(round_up(s.row_tiles * s.channels * plan.acc_size, 64)),
        data_(plane_ * kinds) {}

  void* at(int64_t kind, int64_t tile, int64_t channel) const {
    return data_.get() + kind * plane_ + (tile * channels_ + channel) * acc_size_;
  }

 private:
  int64_t channels_, acc_size_, plane_;
  Buffer data_;
};

// ---- ops

void norm_stats(const Tensor& z, const Tensor& mean, const Tensor& m2) {
  check_activation(z, "z");
  check_statistic(mean, "mean", z);
  check_statistic(m2, "m2", z);
  check_memory({{"mean", mean, Access::whole}, {"m2", m2, Access::whole}}, {{"z", z}});

  const Plan plan(z);
  const Activation z_data(z, plan);
  std::vector<Partials> partials;
  for (const Segment& s : plan.segments) {
    const Partials& p = partials.emplace_back(s, plan, 3);
    s.for_each_tile([&](int64_t tile, int64_t row, int64_t rows, int64_t c, int64_t channels) {
      StatsTile t{};
      t.rows = rows;
      t.channels = channels;
      t.stride = s.channels;
      t.z = z_data.at(s.first + row * s.channels + c);
      t.pilot = p.at(0, tile, c);
      t.sum = p.at(1, tile, c);
      t.square = p.at(2, tile, c);
      plan.norm.stats(plan.storage, t);
    });
  }

  std::vector<double> mean_total(plan.channels);
  std::vector<double> m2_total(plan.channels);
  for_each_channel_range(plan.channels, plan.values_per_channel(), [&](int64_t begin, int64_t end) {
    double count = 0;
    for (size_t i = 0; i < plan.segments.size(); ++i) {
      const Segment& s = plan.segments[i];
      MergeStats m{};
      m.tiles = s.row_tiles;
      m.groups = s.groups;
      m.period = plan.channels;
      m.begin = begin;
      m.end = end;
      m.rows = s.tile_rows;
      m.last_rows = s.last_rows();
      m.pilot = partials[i].at(0, 0, 0);
      m.sum = partials[i].at(1, 0, 0);
      m.square = partials[i].at(2, 0, 0);
      m.mean = mean_total.data();
      m.m2 = m2_total.data();
      m.count = count;
      plan.norm.merge_stats(plan.storage, m);
      count += static_cast<double>(s.rows * s.groups);
    }
    put(mean, mean_total, begin, end);
    put(m2, m2_total, begin, end);
  });
}

void norm_apply(const Tensor& z, const Tensor& mean, const Tensor& scale, const Tensor& beta,
                const OptionalTensor& residual, const OptionalTensor& residual_mean,
                const OptionalTensor& residual_scale, const OptionalTensor& residual_beta,
                bool relu, bool add_after_act, const Tensor& out) {
  check_activation(z, "z");
  check_affine(mean, scale, beta, z);
  check_residual(residual, residual_mean, residual_scale, residual_beta, z);
  check_activation_like(out, "out", z, "z");
  check_memory({{"out", out}}, {{"z", z},
                                {"residual", residual},
                                {"mean", mean, Access::whole},
                                {"scale", scale, Access::whole},
                                {"beta", beta, Access::whole},
                                {"residual_mean", residual_mean, Access::whole},
                                {"residual_scale", residual_scale, Access::whole},
                                {"residual_beta", residual_beta, Access::whole}});

  const Plan plan(z);
  const Activation z_data(z, plan), residual_data(residual, plan), out_data(out, plan);
  const Channels means(mean, plan), scales(scale, plan), betas(beta, plan);
  const Channels residual_means(residual_mean, plan), residual_scales(residual_scale, plan),
      residual_betas(residual_beta, plan);
  for (const Segment& s : plan.segments) {
    s.for_each_tile([&](int64_t, int64_t row, int64_t rows, int64_t c, int64_t channels) {
      const int64_t at = s.first + row * s.channels + c;
      ApplyTile t{};
      t.rows = rows;
      t.channels = channels;
      t.stride = s.channels;
      t.z = z_data.at(at);
      t.mean = means.at(c);
      t.scale = scales.at(c);
      t.beta = betas.at(c);
      t.residual = residual_data.at(at);
      t.residual_mean = residual_means.at(c);
      t.residual_scale = residual_scales.at(c);
      t.residual_beta = residual_betas.at(c);
      t.relu = relu;
      t.add_after_act = add_after_act;
      t.out = out_data.at(at);
      plan.norm.apply(plan.storage, t);
    });
  }
}

Mask mask_of(bool relu, const OptionalTensor& y) {
  return !relu ? Mask::none : y ? Mask::from_y : Mask::recompute;
}

void norm_backward_reduce(const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                          const OptionalTensor& y, const OptionalTensor& scale,
                          const OptionalTensor& beta, bool relu, const Tensor& sum_du,
                          const Tensor& sum_du_xhat, const OptionalTensor& activation) {
  check_activation(z, "z");
  check_activation_like(dy, "dy", z, "z");
  check_channel_vector(mean, "mean", z);
  check_channel_vector(rstd, "rstd", z);
  check_activation_like(y, "y", z, "z");
  check_channel_vector(scale, "scale", z);
  check_channel_vector(beta, "beta", z);
  check_channel_vector(sum_du, "sum_du", z);
  check_channel_vector(sum_du_xhat, "sum_du_xhat", z);
  check_activation_like(activation, "activation", z, "z");
  const bool has_affine = scale.has_value() && beta.has_value();
  STD_TORCH_CHECK(has_affine || !relu || y,
                  "relu needs y, or scale and beta to recompute it from; got neither");
  STD_TORCH_CHECK(has_affine || !activation, "activation needs scale and beta");
  check_memory({{"sum_du", sum_du, Access::whole},
                {"sum_du_xhat", sum_du_xhat, Access::whole},
                {"activation", activation}},
               {{"dy", dy},
                {"z", z},
                {"y", y},
                {"mean", mean, Access::whole},
                {"rstd", rstd, Access::whole},
                {"scale", scale, Access::whole},
                {"beta", beta, Access::whole}});

  const Plan plan(z);
  const Activation dy_data(dy, plan), z_data(z, plan), y_data(y, plan);
  const Activation activation_data(activation, plan);
  const Channels means(mean, plan), scales(scale, plan), betas(beta, plan);
  std::vector<Partials> partials;
  for (const Segment& s : plan.segments) {
    const Partials& p = partials.emplace_back(s, plan, 2);
    s.for_each_tile([&](int64_t tile, int64_t row, int64_t rows, int64_t c, int64_t channels) {
      const int64_t at = s.first + row * s.channels + c;
      BackwardReduceTile t{};
      t.rows = rows;
      t.channels = channels;
      t.stride = s.channels;
      t.mask = mask_of(relu, y);
      t.relu = relu;
      t.dy = dy_data.at(at);
      t.z = z_data.at(at);
      t.y = y_data.at(at);
      t.mean = means.at(c);
      t.scale = scales.at(c);
      t.beta = betas.at(c);
      t.sum = p.at(0, tile, c);
      t.product = p.at(1, tile, c);
      t.activation = activation_data.at(at);
      plan.norm.backward_reduce(plan.storage, t);
    });
  }

  std::vector<double> total_sum(plan.channels);
  std::vector<double> total_product(plan.channels);
  for_each_channel_range(plan.channels, plan.values_per_channel(), [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < plan.segments.size(); ++i) {
      const Segment& s = plan.segments[i];
      MergeSums m{};
      m.tiles = s.row_tiles;
      m.groups = s.groups;
      m.period = plan.channels;
      m.begin = begin;
      m.end = end;
      m.sum = partials[i].at(0, 0, 0);
      m.product = partials[i].at(1, 0, 0);
      m.total_sum = total_sum.data();
      m.total_product = total_product.data();
      plan.norm.merge_sums(plan.storage, m);
    }
    scale_by(total_product, rstd, begin, end);
    put(sum_du, total_sum, begin, end);
    put(sum_du_xhat, total_product, begin, end);
  });
}

void norm_backward_apply(const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& scale,
                         const OptionalTensor& beta, const OptionalTensor& y, bool relu,
                         const OptionalTensor& coef_z, const OptionalTensor& coef_1,
                         const Tensor& dz, const OptionalTensor& du) {
  check_activation(z, "z");
  check_activation_like(dy, "dy", z, "z");
  check_affine(mean, scale, beta, z);
  check_activation_like(y, "y", z, "z");
  check_channel_vector(coef_z, "coef_z", z);
  check_channel_vector(coef_1, "coef_1", z);
  check_activation_like(dz, "dz", z, "z");
  check_activation_like(du, "du", z, "z");
  STD_TORCH_CHECK(!relu || y || beta, "relu needs y, or beta to recompute it from; got neither");
  check_memory({{"dz", dz}, {"du", du}}, {{"dy", dy},
                                          {"z", z},
                                          {"y", y},
                                          {"mean", mean, Access::whole},
                                          {"scale", scale, Access::whole},
                                          {"beta", beta, Access::whole},
                                          {"coef_z", coef_z, Access::whole},
                                          {"coef_1", coef_1, Access::whole}});

  const Plan plan(z);
  const Activation dy_data(dy, plan), z_data(z, plan), y_data(y, plan);
  const Activation dz_data(dz, plan), du_data(du, plan);
  const Channels means(mean, plan), scales(scale, plan), betas(beta, plan);
  const Channels coefs_z(coef_z, plan), coefs_1(coef_1, plan);
  for (const Segment& s : plan.segments) {
    s.for_each_tile([&](int64_t, int64_t row, int64_t rows, int64_t c, int64_t channels) {
      const int64_t at = s.first + row * s.channels + c;
      BackwardApplyTile t{};
      t.rows = rows;
      t.channels = channels;
      t.stride = s.channels;
      t.mask = mask_of(relu, y);
      t.dy = dy_data.at(at);
      t.z = z_data.at(at);
      t.y = y_data.at(at);
      t.mean = means.at(c);
      t.scale = scales.at(c);
      t.beta = betas.at(c);
      t.coef_z = coefs_z.at(c);
      t.coef_1 = coefs_1.at(c);
      t.dz = dz_data.at(at);
      t.du = du_data.at(at);
      plan.norm.backward_apply(plan.storage, t);
    });
  }
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("norm_stats", TORCH_BOX(&resfast::norm_stats));
  m.impl("norm_apply", TORCH_BOX(&resfast::norm_apply));
  m.impl("norm_backward_reduce", TORCH_BOX(&resfast::norm_backward_reduce));
  m.impl("norm_backward_apply", TORCH_BOX(&resfast::norm_backward_apply));
}
