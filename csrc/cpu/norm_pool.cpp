// Normalise + ReLU + max-pool on NHWC activations (the stem of a ResNet), and max-pool alone: entry
// points.
//
// Work is cut into lines of pixels by the shape alone and merged in order, as in norm.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"
#include "cpu/norm_common.h"
#include "cpu/norm_pool_kernels.h"
#include "cpu/sharing.h"

namespace resfast {
namespace {

constexpr int64_t kTileBytes = 128 * 1024;

const NormPoolKernels& pool_kernels() {
  return RESFAST_PICK(norm_pool_kernels);
}

PoolShape check_pool(const Tensor& z, int64_t kernel, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(kernel >= 1 && kernel <= kMaxPoolKernel, "kernel must be 1 to ", kMaxPoolKernel,
                  ", got ", kernel);
  STD_TORCH_CHECK(stride >= 1, "stride must be at least 1, got ", stride);
  STD_TORCH_CHECK(padding >= 0 && padding <= kernel / 2,
                  "padding must be 0 to half the kernel size, got ", padding, " for kernel ",
                  kernel);
  PoolShape p{};
  p.height = z.size(2);
  p.width = z.size(3);
  p.channels = z.size(1);
  p.kernel = kernel;
  p.stride = stride;
  p.padding = padding;
  STD_TORCH_CHECK(p.height + 2 * padding >= kernel && p.width + 2 * padding >= kernel, "kernel ",
                  kernel, " with padding ", padding, " is larger than z ", shape_of(z));
  p.out_height = (p.height + 2 * padding - kernel) / stride + 1;
  p.out_width = (p.width + 2 * padding - kernel) / stride + 1;
  return p;
}

// A tensor of the pool's output shape.
void check_pooled(const Tensor& t, const char* name, ScalarType dtype, const Tensor& z,
                  const PoolShape& p) {
  check_cpu(t, name);
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == z.size(0) && t.size(1) == p.channels &&
                      t.size(2) == p.out_height && t.size(3) == p.out_width,
                  name, " must have the pooled shape [", z.size(0), ", ", p.channels, ", ",
                  p.out_height, ", ", p.out_width, "], got ", shape_of(t));
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(t.scalar_type()));
  check_nhwc(t, name);
}

int64_t lines_per_tile(const Tensor& z, int64_t line_pixels) {
  const int64_t bytes = line_pixels * z.size(1) * static_cast<int64_t>(z.element_size());
  return std::max<int64_t>(1, kTileBytes / std::max<int64_t>(1, bytes));
}

template <class F>
void for_each_tile(int64_t lines, int64_t per_tile, const F& f) {
  share_out(0, ceil_div(lines, per_tile), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      f(tile, tile * per_tile, std::min(lines, (tile + 1) * per_tile));
    }
  });
}

// The kernel on all lines, which t leaves open.
template <class T>
void run_lines(int64_t lines, int64_t per_tile, Storage storage, const T& t,
               void (*kernel)(Storage, const T&)) {
  for_each_tile(lines, per_tile, [&](int64_t, int64_t begin, int64_t end) {
    T tile = t;
    tile.begin = begin;
    tile.end = end;
    kernel(storage, tile);
  });
}

const void* data(const OptionalTensor& t) {
  return t ? t->const_data_ptr() : nullptr;
}

void norm_apply_max_pool(const Tensor& z, const Tensor& mean, const Tensor& scale,
                         const Tensor& beta, int64_t kernel, int64_t stride, int64_t padding,
                         const Tensor& out, const OptionalTensor& index) {
  check_activation(z, "z");
  check_affine(mean, scale, beta, z);
  const PoolShape p = check_pool(z, kernel, stride, padding);
  check_pooled(out, "out", z.scalar_type(), z, p);
  if (index) check_pooled(*index, "index", ScalarType::Byte, z, p);
  check_memory({{"out", out, Access::whole}, {"index", index, Access::whole}},
               {{"z", z}, {"mean", mean}, {"scale", scale}, {"beta", beta}});

  PoolApplyTile t{};
  t.shape = p;
  t.z = z.const_data_ptr();
  t.mean = mean.const_data_ptr();
  t.scale = scale.const_data_ptr();
  t.beta = beta.const_data_ptr();
  t.out = out.mutable_data_ptr();
  t.index = index ? static_cast<uint8_t*>(index->mutable_data_ptr()) : nullptr;
  run_lines(z.size(0) * p.out_height, lines_per_tile(z, p.width * stride), storage_of(z), t,
            pool_kernels().apply);
}

// out = max_pool2d(z): NaN where a window holds one.
void max_pool(const Tensor& z, int64_t kernel, int64_t stride, int64_t padding, const Tensor& out) {
  check_activation(z, "z");
  const PoolShape p = check_pool(z, kernel, stride, padding);
  check_pooled(out, "out", z.scalar_type(), z, p);
  check_memory({{"out", out, Access::whole}}, {{"z", z}});

  MaxPoolTile t{};
  t.shape = p;
  t.z = z.const_data_ptr();
  t.out = out.mutable_data_ptr();
  run_lines(z.size(0) * p.out_height, lines_per_tile(z, p.width * stride), storage_of(z), t,
            pool_kernels().max);
}

void norm_max_pool_backward_reduce(const Tensor& dy, const Tensor& z, const Tensor& mean,
                                   const Tensor& rstd, const Tensor& scale, const Tensor& beta,
                                   const Tensor& index, int64_t kernel, int64_t stride,
                                   int64_t padding, const Tensor& sum_du,
                                   const Tensor& sum_du_xhat) {
  check_activation(z, "z");
  check_channel_vector(mean, "mean", z);
  check_channel_vector(rstd, "rstd", z);
  check_channel_vector(scale, "scale", z);
  check_channel_vector(beta, "beta", z);
  const PoolShape p = check_pool(z, kernel, stride, padding);
  check_pooled(dy, "dy", z.scalar_type(), z, p);
  check_pooled(index, "index", ScalarType::Byte, z, p);
  check_channel_vector(sum_du, "sum_du", z);
  check_channel_vector(sum_du_xhat, "sum_du_xhat", z);
  check_memory({{"sum_du", sum_du, Access::whole}, {"sum_du_xhat", sum_du_xhat, Access::whole}},
               {{"dy", dy},
                {"z", z},
                {"mean", mean},
                {"rstd", rstd},
                {"scale", scale},
                {"beta", beta},
                {"index", index}});

  const NormPoolKernels& kernels = pool_kernels();
  const int64_t lines = z.size(0) * p.out_height;
  const int64_t per_tile = lines_per_tile(z, p.width * stride);
  const int64_t tiles = ceil_div(lines, per_tile);
  const int64_t acc_size = static_cast<int64_t>(mean.element_size());
  const int64_t plane = tiles * p.channels * acc_size;
  const Buffer sums(plane), products(plane);
  PoolBackwardReduceTile t{};
  t.shape = p;
  t.dy = dy.const_data_ptr();
  t.z = z.const_data_ptr();
  t.mean = mean.const_data_ptr();
  t.scale = scale.const_data_ptr();
  t.beta = beta.const_data_ptr();
  t.index = static_cast<const uint8_t*>(index.const_data_ptr());
  for_each_tile(lines, per_tile, [&](int64_t i, int64_t begin, int64_t end) {
    PoolBackwardReduceTile tile = t;
    tile.begin = begin;
    tile.end = end;
    tile.sum = sums.get() + i * p.channels * acc_size;
    tile.product = products.get() + i * p.channels * acc_size;
    kernels.backward_reduce(storage_of(z), tile);
  });

  std::vector<double> total_sum(p.channels);
  std::vector<double> total_product(p.channels);
  for_each_channel_range(p.channels, tiles, [&](int64_t begin, int64_t end) {
    MergeSums m{};
    m.tiles = tiles;
    m.groups = 1;
    m.period = p.channels;
    m.begin = begin;
    m.end = end;
    m.sum = sums.get();
    m.product = products.get();
    m.total_sum = total_sum.data();
    m.total_product = total_product.data();
    norm_kernels().merge_sums(storage_of(z), m);
    scale_by(total_product, rstd, begin, end);
    put(sum_du, total_sum, begin, end);
    put(sum_du_xhat, total_product, begin, end);
  });
}

void norm_max_pool_backward_apply(const Tensor& dy, const Tensor& z, const Tensor& mean,
                                  const Tensor& scale, const Tensor& beta, const Tensor& index,
                                  int64_t kernel, int64_t stride, int64_t padding,
                                  const OptionalTensor& coef_z, const OptionalTensor& coef_1,
                                  const Tensor& dz) {
  check_activation(z, "z");
  check_affine(mean, scale, beta, z);
  const PoolShape p = check_pool(z, kernel, stride, padding);
  check_pooled(dy, "dy", z.scalar_type(), z, p);
  check_pooled(index, "index", ScalarType::Byte, z, p);
  check_channel_vector(coef_z, "coef_z", z);
  check_channel_vector(coef_1, "coef_1", z);
  check_activation_like(dz, "dz", z, "z");
  check_memory({{"dz", dz}}, {{"z", z},
                              {"dy", dy, Access::whole},
                              {"index", index, Access::whole},
                              {"mean", mean, Access::whole},
                              {"scale", scale, Access::whole},
                              {"beta", beta, Access::whole},
                              {"coef_z", coef_z, Access::whole},
                              {"coef_1", coef_1, Access::whole}});

  PoolBackwardApplyTile t{};
  t.shape = p;
  t.dy = dy.const_data_ptr();
  t.z = z.const_data_ptr();
  t.mean = mean.const_data_ptr();
  t.scale = scale.const_data_ptr();
  t.beta = beta.const_data_ptr();
  t.index = static_cast<const uint8_t*>(index.const_data_ptr());
  t.coef_z = data(coef_z);
  t.coef_1 = data(coef_1);
  t.dz = dz.mutable_data_ptr();
  run_lines(z.size(0) * p.height, lines_per_tile(z, p.width), storage_of(z), t,
            pool_kernels().backward_apply);
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("norm_apply_max_pool", TORCH_BOX(&resfast::norm_apply_max_pool));
  m.impl("max_pool", TORCH_BOX(&resfast::max_pool));
  m.impl("norm_max_pool_backward_reduce", TORCH_BOX(&resfast::norm_max_pool_backward_reduce));
  m.impl("norm_max_pool_backward_apply", TORCH_BOX(&resfast::norm_max_pool_backward_apply));
}
